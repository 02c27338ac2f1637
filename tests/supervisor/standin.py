"""A stand-in for every child of the daemon: speaks the real lifeline, behaves as its first argument says, loads nothing.

Run as `python standin.py BEHAVIOUR ROLE --run-dir D --name N [...]`. The microkernel stand-in appends what the supervisor
tells it to RUN_DIR/told.txt, asks for the restart of what RUN_DIR/restart.txt names, and says that RUN_DIR/generating.txt sequences run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from llmos.codes import ServiceState
from llmos.errors import ModelError
from llmos.ports.sync import Listener, PortSet
from llmos.protocol.codec import Schema
from llmos.protocol.messages import Drain, Draining, RestartService, ServiceDown, ServiceReport, ToKernel
from llmos.services.base import service_main

BEHAVIOUR = sys.argv.pop(1)
ROLE = sys.argv.pop(1)
ROLES = frozenset({"supervisor", "storage", "executor", "gateway"})


def run(context, lifeline):
    if BEHAVIOUR == "typed_failure":
        raise ModelError("model directory /nowhere has no config.json", field="models.path")
    if BEHAVIOUR == "bug":
        raise RuntimeError("wheel fell off")
    if BEHAVIOUR == "silent_exit":
        os._exit(5)
    first_start = not (context.run_dir.path / f"{context.name}.started.txt").exists()
    (context.run_dir.path / f"{context.name}.started.txt").touch()
    if BEHAVIOUR == "hopeless_later" and not first_start:
        raise ModelError("the model's files are gone", field="models.path")
    if BEHAVIOUR == "dies_later" and not first_start:
        os._exit(5)
    if BEHAVIOUR == "grandchild":
        assert CHILD is not None
        (context.run_dir.path / "grandchild.txt").write_text(str(CHILD.pid))
    if BEHAVIOUR == "deaf":
        lifeline.ready("deaf")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1000)
    kernel = Listener(context.run_dir, "kernel-control", Schema(ToKernel), ROLES) if ROLE == "microkernel" else None
    if BEHAVIOUR != "never_ready":
        lifeline.ready(f"stand-in {context.name}")
    ports = PortSet(lifeline.port, *([kernel] if kernel else []))
    turns = 0
    restarts_told = 0
    while not lifeline.stopping:
        ports.wait(0.1)
        lifeline.poll()
        lifeline.beat(turns, time.monotonic())
        turns += 1
        if lifeline.kernel_restarts > restarts_told:
            restarts_told = lifeline.kernel_restarts
            (context.run_dir.path / f"{context.name}.regreets.txt").write_text(str(restarts_told))
        if kernel is not None:
            write_down(kernel, context.run_dir.path)
            ask(kernel, context.run_dir.path / "restart.txt")


def ask(kernel, path: Path):
    supervisors = [peer for peer in kernel.core.peers.values() if peer.role == "supervisor"]
    if supervisors and path.exists():
        name = path.read_text()
        path.unlink()
        kernel.send(supervisors[0], RestartService(0, name))


def write_down(kernel, folder: Path):
    generating = folder / "generating.txt"
    with (folder / "told.txt").open("a") as file:
        while (received := kernel.receive()) is not None:
            peer, message = received
            assert peer.role == "supervisor"
            if isinstance(message, Drain):
                running = int(generating.read_text() or 0) if generating.exists() else 0
                kernel.send(peer, Draining(running, 300.0))
                file.write("drain\n")
            if isinstance(message, ServiceDown):
                file.write(
                    f"down {message.role} {message.name} {message.pid}{' replaced' * message.replaced}{' asked' * message.asked}\n"
                )
            elif isinstance(message, ServiceReport):
                states = ",".join(f"{service.name}={ServiceState(service.state).name}" for service in message.services)
                file.write(f"report {states}\n")


if __name__ == "__main__":
    # Before: a service may not start programs.
    CHILD = subprocess.Popen(["sleep", "1000"]) if BEHAVIOUR == "grandchild" else None
    service_main(ROLE, run)
