"""Start a child that can not outlive us: own session and process group, SIGKILL from the system when llmosd dies.

Must be called from the main thread: PDEATHSIG fires when the thread that forked ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import warnings
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def spawn(
    command: Sequence[str], environment: Mapping[str, str] | None = None, inherits: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Run `command` with stdin from /dev/null and stdout and stderr on our stderr.

    `environment`: defaults for the child; what llmosd itself was started with wins. `inherits`: descriptors that it keeps.
    """
    assert threading.current_thread() is threading.main_thread()
    parent = os.getpid()

    def tie_to_parent() -> None:
        # In the child between fork and exec: two system calls, no locks, no allocation to speak of.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    with warnings.catch_warnings():
        # Python >= 3.12 warns about fork beside threads; ours are libzmq's and hold no Python lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        return subprocess.Popen(
            command,
            env={**(environment or {}), **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=2,
            stderr=2,
            start_new_session=True,
            preexec_fn=tie_to_parent,
            pass_fds=tuple(inherits),
        )
