"""Sends hostile frames to every port of a private llmosd, while an innocent client streams beside it.

    python bench/fuzz.py --frames 1000000                       # on each port, one after the other
    python bench/fuzz.py --frames 50000 --port kernel,executor --seed 7
    python bench/fuzz.py --frames 1000000 --port inside         # the microkernel without sockets: five times as fast

Ports: client, client-control (as a client), kernel, kernel-control, text (as a corrupt gateway), supervisor (as a corrupt child), executor
(as a corrupt executor on the kernel port, which the microkernel must throw out), inside (all roles at once against the pure microkernel).
Frames: random bytes, messages with extreme values, damaged ones, ones with fields swapped or of other types; connections that speak no
ZeroMQ between them. The executors are fake ones.

Exit code 0: no process died (but the corrupt executor's), memory stayed within --memory-mib of where it was, and every token of the
innocent client was right.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hostile.attackers import ROLES, Attacker, Stuck
from hostile.inside import Inside
from hostile.neighbour import Neighbour
from hostile.report import add_options, report, show_log
from hostile.target import Target

from llmos.services.executor.fake import STEP_MS_VARIABLE

INSIDE = "inside"
MEND_EVERY, CHECK_EVERY = 300, 500
STEP_MS = "5"  # of the fake models: so fast as they can be, the innocent client's steps would take most of the machine


def main() -> int:
    arguments = parse_arguments()
    rows = (inside(arguments) if port == INSIDE else attack(port, arguments) for port in arguments.port)
    return report(rows, arguments.out)


def attack(port: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One port of a daemon of its own."""
    started = time.monotonic()
    trouble = ""
    with Target(environment={STEP_MS_VARIABLE: STEP_MS}) as target, Neighbour(target.run_dir) as neighbour:
        attacker = Attacker(port, target, arguments.seed, lambda sent: progress(port, sent, arguments.frames))
        try:
            attacker.run(arguments.frames)
        except Stuck as error:
            trouble = str(error)
        finally:
            attacker.close()
        deaths = target.deaths()
        memory = target.memory()
        log = target.log.read_text().splitlines()
    bad_deaths = {name: count for name, count in deaths.items() if name not in ROLES[port].may_die}
    grown = {name: most - first for name, (first, most) in memory.items()}
    good = not (trouble or bad_deaths or neighbour.failures) and neighbour.streams > 0
    good = good and max(grown.values()) <= arguments.memory_mib
    if not good:
        show_log(log, arguments.log_lines)
    return {
        "port": port, "seed": arguments.seed, "frames": attacker.sent, "good": good, "trouble": trouble,
        "seconds": round(time.monotonic() - started, 1), "deaths": deaths, "memory_mib": memory,
        "innocent_streams": neighbour.streams, "innocent_failures": neighbour.failures,
        "innocent_longest_pause_s": round(neighbour.longest_pause_s, 2), "log_lines": len(log),
    }  # fmt: skip


def inside(arguments: argparse.Namespace) -> dict[str, Any]:
    """The pure microkernel; an exception is what would have ended its process."""
    started = time.monotonic()
    world = Inside(arguments.seed)
    trouble = ""
    before = resident_mib()
    try:
        for number in range(1, arguments.frames + 1):
            world.attack()
            if not number % MEND_EVERY:
                world.mend()
            if not number % CHECK_EVERY:
                world.kernel.check()
            if not number % 2048:
                progress(INSIDE, number, arguments.frames)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        traceback.print_exc()
        trouble = f"{type(error).__name__}: {error}"
    grown = resident_mib() - before
    return {
        "port": INSIDE, "seed": arguments.seed, "frames": world.frames, "good": not trouble and grown <= arguments.memory_mib,
        "trouble": trouble, "seconds": round(time.monotonic() - started, 1), "decoded": world.decoded,
        "innocent_streams": world.finished, "grown_mib": grown,
    }  # fmt: skip


def resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


def progress(port: str, sent: int, frames: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{port}: {sent} of {frames}", end="", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--frames", type=positive, required=True, help="on each port")
    add(
        "--port",
        type=ports,
        default=tuple(ROLES),
        metavar="PORT,...",
        help=f"of {', '.join(ROLES)}, {INSIDE} (default: all with sockets)",
    )
    add("--seed", type=int, default=1, help="default %(default)s")
    add("--memory-mib", type=int, default=192, help="that a process may grow by (default %(default)s)")
    add_options(parser)
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def ports(text: str) -> tuple[str, ...]:
    known = (*ROLES, INSIDE)
    found = tuple(known if text == "all" else dict.fromkeys(text.split(",")))
    for name in found:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of all, {', '.join(known)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
