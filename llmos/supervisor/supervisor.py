"""The process tree of one daemon: start in order, watch, report deaths, stop in reverse order.

One thread, one poller (children's messages, pidfds, signals, the microkernel's answers). Never waits for a child
without a time limit. A child that dies while the daemon serves is reaped, reported to the microkernel and started again
(policy.py); one whose work loop is silent for too long is killed first. The daemon keeps running whichever child it was.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import zmq

from llmos.codes import ErrorCode, ServiceState
from llmos.config import DaemonConfig
from llmos.killpoints import ARMED, reach
from llmos.ports.core import Peer
from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Listener
from llmos.protocol.codec import Schema
from llmos.protocol.messages import (
    Draining,
    Heartbeat,
    KernelRestarted,
    KillService,
    RestartService,
    ServiceDown,
    ServiceFailed,
    ServiceReady,
    ServiceReport,
    Stop,
    ToSupervisor,
)
from llmos.supervisor.drain import Drain
from llmos.supervisor.kernel_link import KernelLink
from llmos.supervisor.notify import Notifier, status_line
from llmos.supervisor.plan import Stages
from llmos.supervisor.policy import Action, RestartPolicy, on_exit
from llmos.supervisor.service import Service
from llmos.supervisor.signals import StopSignals

EXIT_CONFIG = 72  # also what a child exits with after a typed error
_STATE_AFTER = {
    Action.EXPECTED: ServiceState.STOPPED,
    Action.RENEW: ServiceState.STOPPED,
    Action.ABORT_START: ServiceState.FATAL,
    Action.RESTART: ServiceState.BACKOFF,
    Action.GIVE_UP: ServiceState.FATAL,
}
_POLICY = RestartPolicy()
# What strangers can reach is never given up: it is they who would decide that.
_PATIENT = RestartPolicy(longest_pause_s=5.0, most_in_a_row=sys.maxsize)
_POLICIES = {"gateway": _PATIENT, "http": _PATIENT, "tokenizer": _PATIENT}
_ROLES = frozenset({"microkernel", "executor", "tokenizer", "storage", "gateway", "http"})
_IDLE_TURN_S = 1.0  # also how often uptimes are reported
_LONG_WORK = 12  # times the usual patience with one that announced long work
_DRAIN_TURN_S = 0.1
_MAX_MESSAGES_PER_TURN = 256  # a child that talks without end must not keep us from the others
_OPENING_TURN_S = 0.02  # while the microkernel has not answered our hello
log = logging.getLogger(__name__)


class StartFailed(Exception):
    """The daemon can not start; the message names the service and the reason."""

    def __init__(self, service: Service, reason: str, exit_code: int = 1) -> None:
        super().__init__(f"{service.name} failed to start: {reason}")
        self.exit_code = exit_code


class StopRequested(Exception):
    """A stop signal came before the daemon served."""


class Supervisor:
    """Owner of all children. Use: `start()`, `serve()`, and in any case `stop()`."""

    def __init__(
        self, stages: Stages, run_dir: RunDir, limits: DaemonConfig, signals: StopSignals, notifier: Notifier
    ) -> None:
        self._limits = limits
        self._signals = signals
        self._notifier = notifier
        self._doing = "starting"
        self._stages = [[Service(spec) for spec in stage] for stage in stages]
        self.services = {service.name: service for stage in self._stages for service in stage}
        schema: Schema[Any] = Schema(ToSupervisor)
        self._listener: Listener[Any] = Listener(run_dir, "supervisor", schema, _ROLES)
        self._starting = True
        self._turned_at = 0.0
        self._drain: Drain | None = None
        self._changed = False
        self._next_report = 0.0
        self._poller = zmq.Poller()
        self._link = KernelLink(run_dir, self._poller)
        self._poller.register(self._listener.socket, zmq.POLLIN)
        self._poller.register(signals.fd, zmq.POLLIN)

    def start(self) -> None:
        """Start all stages; returns when everything is ready. Raises `StartFailed` or `StopRequested`."""
        for stage in self._stages:
            for service in stage:
                self._spawn(service)
                if ARMED:
                    reach("supervisor.start.first")
            while any(service.state is not ServiceState.RUNNING for service in stage):
                self._turn(self._time_left(stage))
                self._restart_due()
                if self._signals.count:
                    raise StopRequested
                for service in stage:
                    self._check_start(service)
        if ARMED:
            reach("supervisor.start.ready")
        self._starting = False
        self._turned_at = time.monotonic()
        self._do("serving")
        self._notifier.ready()

    def serve(self) -> None:
        """Watch the children until a stop signal comes."""
        while not self._signals.count:
            self._keep_up(_IDLE_TURN_S)

    def drain(self) -> None:
        """Let what runs end: no new work, and at most `drain_s`. A second stop signal skips it. Deaths are mended meanwhile."""
        drain = self._drain = Drain(self._limits.drain_s, time.monotonic())
        microkernel = next(service for service in self.services.values() if service.spec.role == "microkernel")
        while self._signals.count < 2 and microkernel.state is not ServiceState.FATAL:
            now = time.monotonic()
            if not (left := drain.time_left(now)):
                break
            if (word := drain.word(now)) is not None:
                log.info("draining: %s, %.0f s left", word, left)
                self._do(f"draining, {word};")
            self._link.drain()
            self._keep_up(min(_DRAIN_TURN_S, left))
        if drain.running:
            log.info("%d not ended; the journal keeps what it holds for the next start", drain.running)

    def stop(self) -> None:
        """Stop all children, last started first; a further stop signal kills them at once."""
        self._starting = False
        self._notifier.stopping()
        self._do("stopping")
        signals_before = self._signals.count
        for service in self.services.values():
            service.renewing = False
            if service.state is ServiceState.BACKOFF:
                service.give_up_restart()
        for stage in reversed(self._stages):
            alive = [service for service in stage if service.process]
            for service in alive:
                if service.state is not ServiceState.STOPPING:
                    self._ask_to_stop(service)
            while alive := [service for service in alive if service.process]:
                now = time.monotonic()
                for service in alive:
                    if now >= service.stop_by or self._signals.count > signals_before:
                        log.warning("%s does not stop: killing it", service.name)
                        service.kill_group()
                        service.stop_by = now + 1.0
                self._turn(max(0.0, min(service.stop_by for service in alive) - now))
        self._link.close()
        self._listener.close()

    def _spawn(self, service: Service) -> None:
        service.start(time.monotonic())
        self._poller.register(service.pidfd, zmq.POLLIN)
        log.info("%s started, pid %d", service.name, service.pid)
        self._changed = True

    def _keep_up(self, timeout_s: float) -> None:
        """One turn of a daemon that serves."""
        services, now = self.services.values(), time.monotonic()
        if now - self._turned_at > self._limits.hang_timeout_s / 2:
            for service in services:  # we were the ones who gave no sign of life: their beats are still to be read
                service.beat_at = now
        due = [service.restart_at for service in services if service.state is ServiceState.BACKOFF]
        due += [service.stop_by for service in services if service.state is ServiceState.STOPPING]
        self._turn(max(0.0, min([timeout_s, *(moment - now for moment in due)])))
        self._restart_due()
        self._kill_silent()
        self._turned_at = time.monotonic()

    def _restart_due(self) -> None:
        now = time.monotonic()
        for service in self.services.values():
            if service.state is ServiceState.BACKOFF and now >= service.restart_at:
                self._spawn(service)
                if ARMED:
                    reach("supervisor.started")

    def _kill_silent(self) -> None:
        """A process that hangs is worse than one that died: make it that."""
        now = time.monotonic()
        for service in self.services.values():
            patience = self._limits.hang_timeout_s * (_LONG_WORK if service.working else 1)
            if service.state is ServiceState.RUNNING and now - service.beat_at > patience:
                log.error("%s (pid %d) gave no sign of life for %g s: killing it", service.name, service.pid, patience)
            elif service.state is ServiceState.STARTING and now - service.started_at > self._limits.start_timeout_s:
                log.error("%s (pid %d) is not ready after %g s: killing it", service.name, service.pid,
                          self._limits.start_timeout_s)  # fmt: skip
            elif service.state is ServiceState.STOPPING and now >= service.stop_by:
                log.warning("%s does not stop: killing it", service.name)
            else:
                continue
            service.kill_group()
            service.beat_at = service.started_at = now  # once: its death comes through the pidfd
            service.stop_by = now + 1.0

    def _kill(self, name: str, reason: str) -> None:
        """The microkernel knows better than its beats that it hangs. One that is being started is another one than was meant."""
        service = self.services.get(name)
        if service is not None and service.state is ServiceState.RUNNING:
            log.error("%s (pid %d): %s: killing it", name, service.pid, reason)
            service.kill_group()

    def _renew(self, name: str) -> None:
        """Somebody wants this service's process to be another one."""
        service = self.services.get(name)
        if service is None or self._doing == "stopping":
            log.warning("can not start %s again: %s", name, "no such service" if service is None else "stopping")
            return
        log.info("%s: asked to start it again", name)
        service.forgive()
        if service.state in (ServiceState.STARTING, ServiceState.RUNNING):
            service.renewing = True
            self._ask_to_stop(service)
        elif service.state is ServiceState.BACKOFF:
            service.restart_at = time.monotonic()
        elif service.state is ServiceState.FATAL:
            service.restarts += 1
            self._spawn(service)

    def _ask_to_stop(self, service: Service) -> None:
        """The signal before the message: one that comes while the child, told by the message, already exits would kill it."""
        service.ask_to_stop(time.monotonic() + self._limits.stop_timeout_s)
        if service.peer is not None:
            self._listener.send(service.peer, Stop())
        self._changed = True

    def _time_left(self, stage: list[Service]) -> float:
        started = [service.started_at for service in stage if service.state is ServiceState.STARTING]
        if not started:
            return _OPENING_TURN_S  # one that was killed waits to be started again
        return max(0.0, min(started) + self._limits.start_timeout_s - time.monotonic())

    def _check_start(self, service: Service) -> None:
        if service.failure is not None:
            raise StartFailed(service, service.failure.message, _exit_code(service.failure))
        late = time.monotonic() - service.started_at > self._limits.start_timeout_s
        if service.state is ServiceState.STARTING and late:
            raise StartFailed(service, f"not ready within {self._limits.start_timeout_s:g} s (daemon.start_timeout_s)")

    def _turn(self, timeout_s: float) -> None:
        """One round of the loop: wait, then serve whatever came. Messages go before deaths: they are older."""
        limit = _OPENING_TURN_S if self._link.opening else _IDLE_TURN_S
        self._poller.poll(int(min(timeout_s, limit, self._notifier.interval_s / 2) * 1000) + 1)
        self._notifier.beat(time.monotonic())
        self._signals.drain()
        for _ in range(_MAX_MESSAGES_PER_TURN):
            if (received := self._listener.receive()) is None:
                break
            self._on_message(*received)
        for service in self.services.values():
            if service.has_exited():
                self._on_exit(service)
        self._report()

    def _on_message(self, peer: Peer, message: Any) -> None:
        service = self.services.get(peer.name)
        if service is None or service.pid != peer.pid:
            log.warning("ignored %s of unknown process %s, pid %d", type(message).__name__, peer.name, peer.pid)
            return
        service.peer = peer
        if isinstance(message, Heartbeat):
            service.beat(message, time.monotonic())
        elif isinstance(message, ServiceReady) and service.state is ServiceState.STARTING:
            self._on_ready(service, message.detail)
        elif isinstance(message, ServiceFailed):
            service.failure = message
            self._listener.send(peer, Stop())  # the child waits for this before it exits

    def _on_ready(self, service: Service, detail: str) -> None:
        now = time.monotonic()
        service.ready(detail, now)
        log.info("%s is ready after %.2f s: %s", service.name, now - service.started_at, detail)
        self._changed = True
        if service.spec.role == "microkernel":
            self._link.open()
            for other in self.services.values():
                if other.peer is not None and other is not service:
                    self._listener.send(other.peer, KernelRestarted())

    def _on_exit(self, service: Service) -> None:
        if ARMED:
            reach("supervisor.death.seen")
        now, pid = time.monotonic(), service.pid
        policy = _POLICY if self._starting else _POLICIES.get(service.spec.role, _POLICY)
        if service.state is not ServiceState.STOPPING:
            service.count_death(policy.stable_s, now)
        hopeless = service.failure is not None and _exit_code(service.failure) == EXIT_CONFIG
        deaths = service.deaths_in_a_row
        action = on_exit(
            service.state,
            policy,
            deaths,
            starting_up=self._starting,
            hopeless=hopeless,
            renewing=service.renewing,
            killed=service.was_killed(),
        )
        self._poller.unregister(service.pidfd)
        if service.peer is not None:
            self._listener.core.forget(service.peer)
        exit_code, ending = service.reap(_STATE_AFTER[action])
        if ARMED:
            reach("supervisor.death.reaped")
        self._changed = True
        if service.spec.role == "microkernel":
            self._link.close()
            self._hear_of_drain(None)
        if action is Action.EXPECTED:
            log.info("%s stopped (%s)", service.name, ending)
        elif action is Action.RENEW:
            log.info("%s stopped (%s); starting it again", service.name, ending)
            self._link.down(ServiceDown(service.spec.role, service.name, pid, replaced=True, asked=True))
            service.restarts += 1
            self._spawn(service)
        elif action is Action.ABORT_START:
            if service.failure is not None:
                raise StartFailed(service, service.failure.message, _exit_code(service.failure))
            raise StartFailed(
                service, f"{ending}; its own words are above", EXIT_CONFIG if exit_code == EXIT_CONFIG else 1
            )
        else:
            restart = action is Action.RESTART
            self._link.down(ServiceDown(service.spec.role, service.name, pid, replaced=restart))
            if restart:
                pause = policy.pause_s(service.deaths_in_a_row)
                service.wait_for_restart(now + pause)
                log.error("%s (pid %d) is down: %s; starting it again in %g s", service.name, pid, ending, pause)
            else:
                log.error("%s (pid %d) is down and stays down: %s", service.name, pid, ending)

    def _report(self) -> None:
        """Tell the microkernel and the service manager how the services are, if that is news."""
        now = time.monotonic()
        if self._changed or now >= self._next_report:
            self._changed, self._next_report = False, now + _IDLE_TURN_S
            report = ServiceReport(tuple(service.status(now) for service in self.services.values()))
            self._link.report(report)
            self._notifier.status(status_line(self._doing, report.services))
        for message in self._link.pump():
            if isinstance(message, RestartService):
                self._renew(message.name)
            elif isinstance(message, KillService):
                self._kill(message.name, message.reason)
            elif isinstance(message, Draining):
                self._hear_of_drain(message)
        if ARMED and any(service.state is ServiceState.BACKOFF for service in self.services.values()):
            reach("supervisor.death.told")

    def _hear_of_drain(self, message: Draining | None) -> None:
        if self._drain is not None:
            self._drain.heard(message)

    def _do(self, what: str) -> None:
        """Say from now on that this is what the daemon does."""
        self._doing = what
        self._changed = True
        self._report()


def _exit_code(failure: ServiceFailed) -> int:
    return EXIT_CONFIG if failure.code in (ErrorCode.CONFIG, ErrorCode.MODEL) else 1
