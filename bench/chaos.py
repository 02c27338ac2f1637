"""Kills processes of llmos under load and judges what its clients saw.

    python bench/chaos.py --minutes 10                          # all kinds of process, kill -9 about every two seconds
    python bench/chaos.py --minutes 1 --kinds executor,storage --faults kill,stop
    python bench/chaos.py --minutes 5 --model demo              # a real model on the CPU instead of the fake one
    python bench/chaos.py --points --pairs                      # at each named point of the code, and two at once (about ten minutes)
    python bench/chaos.py --points microkernel.journal,gateway  # at some of them

A real llmosd runs in a private folder, under a stand-in for systemd that starts it again when it is killed itself. Clients stream
generations whose right answers are known, and write down what they see. A seeded script of faults hits one process after another.
A checker that does not know the SDK reads the histories: has every accepted request ended as it had to, with every token once, in
order and right?

Exit code: 0 nothing failed, lost, duplicated or changed, everything recovered and nothing was left behind; else 1. Ctrl-C ends the
run early with the table of what was seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import signal
import sys
import time
from pathlib import Path

from chaos.report import as_json, progress_line, text
from chaos.run import ChaosRun, Options, Outcome
from chaos.script import FAULTS, KINDS
from common import machine, versions

from llmos.killpoints import POINTS

QUIET_EVERY_S = 10.0  # without a terminal


def main() -> int:
    arguments = parse_arguments()
    options = Options(
        minutes=arguments.minutes, seed=arguments.seed, clients=arguments.clients, kinds=arguments.kinds,
        faults=arguments.faults, mean_s=arguments.mean_seconds, model=arguments.model, step_ms=arguments.step_ms,
        hang_s=arguments.hang_seconds, keep=arguments.keep, points=arguments.points, pairs=arguments.pairs,
    )  # fmt: skip
    facts = {"machine": machine(), "versions": versions(), "command": shlex.join(["python", *sys.argv])}
    print(json.dumps(facts["machine"]), json.dumps(facts["versions"]), facts["command"], sep="\n", flush=True)
    outcome = asyncio.run(run(options))
    print(text(outcome))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(as_json(outcome, options, facts), indent=1) + "\n")
        print(f"written to {arguments.out}")
    return 0 if outcome.is_good else 1


async def run(options: Options) -> Outcome:
    chaos = ChaosRun(options, Progress())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, chaos.stop)
    return await chaos.run()


class Progress:
    """One line that is written over on a terminal; else a line now and then."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, run: ChaosRun) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            print(f"\r\033[K{progress_line(run, now)}", end="", file=sys.stderr, flush=True)
        elif now >= self._next:
            self._next = now + QUIET_EVERY_S
            print(progress_line(run, now), file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=positive, help="how long faults are injected")
    add(
        "--points",
        nargs="?",
        const=(),
        type=known_points,
        metavar="POINT,...",
        help="kill at named points of the code instead (llmos/killpoints.py): names or their beginnings, without any all of them",
    )
    add("--pairs", action="store_true", help="with --points: then two processes at once at some of them")
    add("--seed", type=int, default=1, help="of the script of faults and of what clients ask (default %(default)s)")
    add("--clients", type=int, default=32, help="each with a connection of its own (default %(default)s)")
    add("--kinds", type=words(KINDS), default=KINDS, metavar="KIND,...", help=f"of {', '.join(KINDS)} (default: all)")
    add(
        "--faults",
        type=words(FAULTS),
        default=("kill",),
        metavar="FAULT,...",
        help="kill = SIGKILL, stop = SIGSTOP, which has to be noticed (default: kill)",
    )
    add("--mean-seconds", type=positive, default=2.0, help="between two faults (default %(default)s)")
    add("--model", choices=("fake", "demo"), default="fake", help="default %(default)s")
    add("--step-ms", type=positive, default=40.0, help="length of a step of the fake model (default %(default)s)")
    add("--hang-seconds", type=positive, default=3.0, help="daemon.hang_timeout_s of the run (default %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON")
    add("--keep", action="store_true", help="keep the run's folder: histories, logs, journal")
    arguments = parser.parse_args()
    if (arguments.minutes is None) == (arguments.points is None):
        parser.error("one of --minutes and --points is needed")
    if arguments.pairs and arguments.points is None:
        parser.error("--pairs needs --points")
    arguments.minutes = arguments.minutes or 0.0
    if arguments.clients < 1:
        parser.error("--clients must be at least 1")
    return arguments


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def known_points(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    for name in found:
        if not any(point.startswith(name) for point in POINTS):
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(POINTS)}")
    return found


def words(known: tuple[str, ...]) -> object:
    """A parser of comma-separated words."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(text.split(",")))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return found

    return parse


if __name__ == "__main__":
    sys.exit(main())
