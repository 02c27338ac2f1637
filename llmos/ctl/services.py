"""`llmosctl restart`: another process in the place of one of llmosd's. Arguments, help, and waiting until it is there.

The answers to the waiting may pass through the very process that is replaced: what is lost on the way is asked again.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from llmos.client.sync import Client
from llmos.codes import ServiceState
from llmos.ctl.arguments import Json, RunDir, connect, wants_json
from llmos.ctl.errors import EXIT_HELP, command
from llmos.ctl.render import printable, write_json
from llmos.errors import DaemonNotRunning, InvalidRequest, LlmosError, NotFound, RequestTimeout, Unavailable
from llmos.protocol.messages import ServiceStatus

app = typer.Typer()
_POLL_S = 0.05
_PASSING = (Unavailable, DaemonNotRunning, RequestTimeout)  # while a process on the way is replaced
_ON_THE_WAY = frozenset({"gateway", "microkernel"})


@app.command(epilog=EXIT_HELP)
@command
def restart(
    context: typer.Context,
    service: Annotated[str, typer.Argument(help="Its name, as status shows it.", metavar="SERVICE")],
    timeout: Annotated[
        float, typer.Option("--timeout", help="Longest time until another process is ready, in seconds.")
    ] = 120.0,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Let llmosd end a service's process and start another one, for administrators. What runs goes on after a pause."""
    if not timeout > 0:
        raise InvalidRequest(f"--timeout {timeout:g}: a time above 0 is needed", field="timeout")
    began = time.monotonic()
    with connect(context, run_dir) as client:
        old = _find(client, service)
        try:
            client.restart_service(service)
        except _PASSING:
            if service not in _ON_THE_WAY:
                raise
        new = _wait(client, service, old.pid, began + timeout)
    seconds = time.monotonic() - began
    if wants_json(context, as_json):
        write_json({"service": service, "old_pid": old.pid, "pid": new.pid, "seconds": round(seconds, 3)})
    else:
        before = f"pid {old.pid}" if old.pid else "no process"
        sys.stdout.write(f"{printable(service)}: {before} -> pid {new.pid}, ready after {seconds:.1f} s\n")


def _find(client: Client, name: str) -> ServiceStatus:
    services = {service.name: service for service in client.status().services}
    if name not in services:
        raise NotFound(f"no service {name!r}; there are: {', '.join(sorted(services))}", field="name")
    return services[name]


def _wait(client: Client, name: str, old_pid: int, until: float) -> ServiceStatus:
    """The service when another process of it is ready."""
    last = "no word from llmosd"
    while time.monotonic() < until:
        try:
            service = _find(client, name)
        except (*_PASSING, NotFound) as error:  # NotFound: a new microkernel has not heard of its services yet
            last = error.message
        else:
            state = ServiceState(service.state)
            if state is ServiceState.RUNNING and service.pid != old_pid:
                return service
            if state is ServiceState.FATAL and service.pid == 0 and old_pid:
                raise LlmosError(f"{name} is down and stays down: {service.detail}")
            last = f"it is {state.name.lower()}"
        time.sleep(_POLL_S)
    raise RequestTimeout(f"{name} is not ready in time; {last}", field="timeout")
