"""`llmosctl restart` and `upgrade`: other processes in the place of llmosd's. Arguments, help, and waiting until they are there.

The answers to the waiting may pass through the very process that is replaced: what is lost on the way is asked again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
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
    _check_timeout(timeout)
    with connect(context, run_dir) as client:
        done = _replace(client, service, timeout)
        if wants_json(context, as_json):
            write_json(asdict(done))
        else:
            _say(done)


@app.command(epilog=EXIT_HELP)
@command
def upgrade(
    context: typer.Context,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Longest time until another process is ready, in seconds, for each.")
    ] = 120.0,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Restart all services, one after another, so that they run what is installed now, for administrators.

    What runs goes on, with pauses. llmosd itself stays as it is, as does its plan which services there are. An installation that speaks
    another protocol than the running one is refused before anything is touched: then stop llmosd and start it again; what runs waits in
    the journal.
    """
    _check_timeout(timeout)
    with connect(context, run_dir) as client:
        names = [service.name for service in client.status().services]
        done = []
        for name in sorted(names, key=lambda name: (name.split(".")[0] in _ON_THE_WAY, name)):
            done.append(_replace(client, name, timeout))
            if not wants_json(context, as_json):
                _say(done[-1])
        if wants_json(context, as_json):
            write_json([asdict(each) for each in done])


@dataclass(frozen=True)
class _Replaced:
    service: str
    old_pid: int
    pid: int
    seconds: float


def _check_timeout(timeout: float) -> None:
    if not timeout > 0:
        raise InvalidRequest(f"--timeout {timeout:g}: a time above 0 is needed", field="timeout")


def _replace(client: Client, service: str, timeout: float) -> _Replaced:
    began = time.monotonic()
    old = _find(client, service)
    try:
        client.restart_service(service)
    except _PASSING:
        if service not in _ON_THE_WAY:
            raise
    new = _wait(client, service, old.pid, began + timeout)
    return _Replaced(service, old.pid, new.pid, round(time.monotonic() - began, 3))


def _say(done: _Replaced) -> None:
    before = f"pid {done.old_pid}" if done.old_pid else "no process"
    sys.stdout.write(f"{printable(done.service)}: {before} -> pid {done.pid}, ready after {done.seconds:.1f} s\n")
    sys.stdout.flush()


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
