"""What llmosd itself has to do with HTTP: it makes the first key, opens the listening socket and leaves a note where that is. It never
reads from a connection.
"""

from __future__ import annotations

import logging
import socket
from types import TracebackType

from llmos.config import Config, state_dir
from llmos.http_place import HttpPlace, open_listener, remove_note, url_of, write_note
from llmos.keys.admin_key import FILE_NAME, make_admin_key
from llmos.ports.endpoint import RunDir

log = logging.getLogger(__name__)


class HttpDoor:
    """Open while the daemon lives. `fd` None and `url` "": HTTP is not served."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self._config = config
        self._run_dir = run_dir
        self._listener: socket.socket | None = None
        self.url = ""

    @property
    def fd(self) -> int | None:
        return None if self._listener is None else self._listener.fileno()

    def __enter__(self) -> HttpDoor:
        http = self._config.http
        if http.enabled:
            folder = state_dir(self._config.storage)
            self._listener = open_listener(http.address)
            if make_admin_key(folder):
                log.info("made the first key, an administrator's, for this machine: %s", folder / FILE_NAME)
            self.url = url_of(self._listener, tls=bool(http.tls_cert))
            write_note(self._run_dir.path, HttpPlace(self.url, str(folder)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listener is not None:
            self._listener.close()
            remove_note(self._run_dir.path)
