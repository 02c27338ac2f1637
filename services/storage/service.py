"""The storage service: knows the models of this box and answers the microkernel's questions about them; keeps tenants' limits.

After hello the microkernel gets all limits that were set in earlier lives, also if there are none.
States: registering (rows, no digests) -> ready -> hashing in slices between messages -> idle. A model without a
readable directory is registered as `failed`; others are `available` until the microkernel says `serving`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from llmos.config import EMBEDDED_MODEL, Config, ModelConfig, model_path, state_dir
from llmos.killpoints import ARMED, reach
from llmos.ports.lifeline import Lifeline
from llmos.ports.sync import Dialer, PortSet
from llmos.protocol import handshake
from llmos.protocol.codec import Schema
from llmos.protocol.messages import (
    Error,
    FromKernel,
    ModelsGet,
    ModelsReply,
    ModelState,
    TenantsStored,
    TenantStore,
    Welcome,
)
from llmos.services.base import ServiceContext
from llmos.services.storage.digest import Digester, model_files
from llmos.services.storage.registry import AVAILABLE, FAILED, SERVING, Registry

_SLICE_S = 0.02  # hashing between two looks at the ports
_IDLE_S = 0.2
_GREET_TIMEOUT_S = 10.0
log = logging.getLogger(__name__)


def run(context: ServiceContext, lifeline: Lifeline) -> None:
    """Body of the process."""
    os.nice(5)  # hashing gigabytes must not slow down the loading of the same weights
    registry = Registry(state_dir(context.config.storage))
    schema: Schema[Any] = Schema(FromKernel)
    kernel: Dialer[Any] = Dialer(context.run_dir, "kernel-control", schema)
    storage = Storage(registry, kernel)
    storage.register_models(context.config)
    if ARMED:
        reach("storage.start.registered")
    kernel.greet("storage", context.name, _GREET_TIMEOUT_S)
    storage.send_tenants()
    lifeline.ready(f"models: {len(registry.rows())}, in {registry.path}")
    ports = PortSet(lifeline.port, kernel)
    while not lifeline.stopping:
        ports.wait(0.0 if storage.has_work else _IDLE_S)
        lifeline.poll()
        if lifeline.kernel_restarts != storage.kernels_greeted:
            storage.greet_again(context.name, lifeline.kernel_restarts)
        storage.answer()
        storage.work(_SLICE_S)
        lifeline.beat(storage.progress, time.monotonic())
    storage.close()
    kernel.close()


class Storage:
    """Registry, hashing queue and the answers to the microkernel."""

    def __init__(self, registry: Registry, kernel: Any) -> None:
        self._registry = registry
        self._kernel = kernel
        self._to_hash: deque[tuple[str, Digester]] = deque()
        self.progress = 0
        self.kernels_greeted = 0  # since the first

    @property
    def has_work(self) -> bool:
        return bool(self._to_hash)

    def register_models(self, config: Config) -> None:
        """Bring the registry up to date: configured models, the embedded one, and those registered earlier."""
        models = {row.name: Path(row.path) for row in self._registry.rows()}
        models[EMBEDDED_MODEL] = model_path(ModelConfig(EMBEDDED_MODEL))
        models |= {model.name: model_path(model) for model in config.models}
        for name, path in models.items():
            self._register(name, path)

    def send_tenants(self) -> None:
        """Tell the microkernel what it set in earlier lives. The first thing after hello."""
        self._kernel.send(TenantsStored(self._registry.tenants()))

    def greet_again(self, name: str, kernel_restarts: int) -> None:
        """Another microkernel took over; once it answers, it gets the tenants."""
        if self._kernel.send(handshake.hello("storage", name)):  # else the socket has not found the new one yet
            self.kernels_greeted = kernel_restarts

    def answer(self) -> None:
        """Serve all messages of the microkernel that are here."""
        while (message := self._kernel.receive()) is not None:
            self.progress += 1
            if ARMED:
                reach("storage.received")
            if isinstance(message, Welcome):
                handshake.check_answer(message, "the microkernel")
                self.send_tenants()
            elif isinstance(message, ModelsGet):
                self._kernel.send(ModelsReply(message.req, self._registry.rows()))
            elif isinstance(message, ModelState):
                self._set_state(message)
            elif isinstance(message, TenantStore):
                self._registry.set_tenant(message.tenant)
                if ARMED:
                    reach("storage.tenant.stored")
            elif isinstance(message, Error):
                log.error("microkernel: %s", message.message)

    def work(self, budget_s: float) -> None:
        """Hash for about `budget_s`, if there is something to hash."""
        if not self._to_hash:
            return
        name, digester = self._to_hash[0]
        self.progress += 1
        try:
            digest = digester.work(budget_s)
        except OSError as error:
            log.error("model %s: cannot read its files: %s", name, error)
            digester.close()
            self._to_hash.popleft()
            return
        if digest is not None:
            self._registry.set_digest(name, digest)
            self._to_hash.popleft()
            log.info("model %s has digest %s", name, digest[:16])

    def close(self) -> None:
        for _, digester in self._to_hash:
            digester.close()
        self._registry.close()

    def _register(self, name: str, path: Path) -> None:
        files = model_files(path)
        architecture = _architecture(path)
        state = FAILED if architecture is None else AVAILABLE
        self._registry.register(name, str(path), architecture or "", sum(file.size for file in files), state)
        if files:
            self._to_hash.append((name, Digester(files, self._registry.known_file, self._registry.learn_file)))

    def _set_state(self, message: ModelState) -> None:
        if message.state not in (AVAILABLE, SERVING, FAILED):
            log.error("microkernel: model %s has unknown state %r", message.name, message.state)
        elif not self._registry.set_state(message.name, message.state):
            log.error("microkernel: unknown model %s is %s", message.name, message.state)


def _architecture(path: Path) -> str | None:
    """The class name in config.json; None if there is no such thing."""
    try:
        config = json.loads((path / "config.json").read_bytes())
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        log.warning("%s: no architecture in config.json (%s)", path, error)
        return None
