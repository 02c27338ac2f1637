"""Crowds and greedy clients against a private llmosd, while two innocent clients stream beside them.

    python bench/flood.py                                      # all scenarios, at full size
    python bench/flood.py --scenario multipart --scale 0.5

Scenarios:
    connections   5,000 that finish ZeroMQ's handshake
    half-open     5,000 that do not
    multipart     an unfinished message of 1 GiB
    descriptors   a gateway that may open 64 files only
    unread        16 clients that stop reading beside 16 that read
    overload      ten times as many requests as there is room for
    texts         one that the tokenizer never ends with, one that takes all its memory
    stopped       SIGSTOP to each service in turn
    stuck         each service in turn is stuck in C with the interpreter's lock held

Exit code 0: nobody died but who had to (the gateway where its memory or descriptors are at an end, and it was back within a second; the
tokenizer of a bad text; what hung); the gateway's memory stayed within its limit; the innocent clients got every token.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from hostile.neighbour import Neighbour
from hostile.report import add_options, report, show_log
from hostile.scenarios import MAY_DIE, OPTIONS, SCENARIOS
from hostile.target import Target


def main() -> int:
    arguments = parse_arguments()
    return report((run(name, arguments) for name in arguments.scenario or SCENARIOS), arguments.out)


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    options = dict(OPTIONS.get(name, {}))
    more = f"[gateway]\nmemory_mib = {arguments.gateway_mib}\n" + options.pop("more", "")
    with Target(more=more, **options) as target:
        with (
            Neighbour(target.run_dir, tokens=arguments.tokens) as one,
            Neighbour(target.run_dir, tokens=arguments.tokens, first_seed=10**6) as other,
        ):
            facts = SCENARIOS[name](target, arguments.scale)
        deaths, memory = target.deaths(), target.memory()
        log = target.log.read_text().splitlines()
    conditions = (
        set(deaths) <= MAY_DIE.get(name, set()),
        not (one.failures or other.failures),
        min(one.streams, other.streams) > 0,
        facts["gateway_mib"] <= arguments.gateway_mib,
        (facts.get("back_s") or 0.0) <= arguments.back_seconds,
        *(value for key, value in facts.items() if key.endswith("_ok")),
    )
    good = all(conditions)
    if not good:
        show_log(log, arguments.log_lines)
    return {
        "scenario": name, "good": good, **facts, "deaths": deaths, "memory_mib": memory,
        "innocent_streams": one.streams + other.streams, "innocent_failures": one.failures + other.failures,
        "innocent_longest_pause_s": round(max(one.longest_pause_s, other.longest_pause_s), 2),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scenario", action="append", choices=SCENARIOS, help="may be given several times (default: all)")
    add("--scale", type=float, default=1.0, help="of the crowd (default %(default)s)")
    add("--tokens", type=int, default=200, help="of each stream of an innocent client (default %(default)s)")
    add("--gateway-mib", type=int, default=512, help="gateway.memory_mib (default %(default)s)")
    add(
        "--back-seconds",
        type=float,
        default=1.0,
        help="within which a gateway that died must be back (default %(default)s)",
    )
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
