"""The long run of the microkernel's simulation: any number of events over many seeds, all invariants checked after each of them.

    python bench/simulate.py --events 2000000 --jobs 2            # about a quarter of an hour; --json FILE keeps the figures
    python bench/simulate.py --seed 17 --events-per-seed 600      # one seed again, as a failure says; it is cut down to what is needed
    python bench/simulate.py --crash-everywhere --seeds 200 --events-per-seed 40 --jobs 2  # it dies at every place of 200 lives

A seed decides everything: the machine, what happens, when. Exits with 1 if a seed violates an invariant; see tests/support/simulation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from common import machine, versions
from simulation.everywhere import crashes
from simulation.run import setup_of
from simulation.shrink import find, shrink, story


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=0, help="how many in all; 0: those of one seed")
    parser.add_argument("--seeds", type=int, default=1, help="at least so many")
    parser.add_argument(
        "--crash-everywhere", action="store_true", help="once for each place of each life, with a crash there"
    )
    parser.add_argument("--events-per-seed", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--stride", type=int, default=1, help="every so manieth seed only")
    parser.add_argument("--shrink-s", type=float, default=120.0, help="seconds to spend on cutting a failure down")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    started = time.perf_counter()
    done = _spread(args) if args.jobs > 1 else _run(args)
    done |= {"seconds": round(time.perf_counter() - started, 1), "jobs": args.jobs}
    print(json.dumps(done))
    if args.json is not None:
        record = {"what": "simulation of the microkernel", "machine": machine(), "versions": versions(), **done}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if done["violations"] else 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """Seed after seed in this process. Ends at the first violation."""
    events = seeds = violations = steps = 0
    digest = 0
    lives = 0
    while seeds < args.seeds or events < args.events:
        seed = args.seed + seeds * args.stride
        seeds += 1
        if args.crash_everywhere:
            for inserted, violation in crashes(seed, args.events_per_seed):
                lives, events = lives + 1, events + len(inserted)
                if violation is not None:
                    print(story(seed, args.events_per_seed, setup_of(seed), shrink(setup_of(seed), violation, args.shrink_s)),
                          file=sys.stderr, flush=True)  # fmt: skip
                    return _result(events, steps, seeds, 1, digest, lives)
            continue
        lives += 1
        life, violation = find(seed, args.events_per_seed)
        if violation is not None:
            violations += 1
            events += len(violation.events)
            print(f"seed {seed}: {violation.text}\ncutting down {len(violation.events)} events ...", file=sys.stderr)
            found = shrink(setup_of(seed), violation, args.shrink_s)
            print(story(seed, args.events_per_seed, setup_of(seed), found), file=sys.stderr, flush=True)
            break
        assert life is not None
        events, steps, digest = events + life.count, steps + life.steps, digest ^ life.digest
    return _result(events, steps, seeds, violations, digest, lives)


def _result(events: int, steps: int, seeds: int, violations: int, digest: int, lives: int) -> dict[str, Any]:
    return {
        "events": events,
        "steps": steps,
        "seeds": seeds,
        "lives": lives,
        "violations": violations,
        "digest": f"{digest:08x}",
    }


def _spread(args: argparse.Namespace) -> dict[str, Any]:
    """The same in several processes: each takes every so manieth seed and its share of the events."""
    command = [sys.executable, str(Path(__file__).resolve()), "--events-per-seed", str(args.events_per_seed)]
    command += [
        "--events",
        str(-(-args.events // args.jobs)),
        "--stride",
        str(args.jobs),
        "--shrink-s",
        str(args.shrink_s),
        "--seeds",
        str(-(-args.seeds // args.jobs)),
        *(["--crash-everywhere"] if args.crash_everywhere else []),
    ]
    children = [
        subprocess.Popen([*command, "--seed", str(args.seed + index)], stdout=subprocess.PIPE, text=True)
        for index in range(args.jobs)
    ]
    results = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    done = {
        name: sum(result[name] for result in results) for name in ("events", "steps", "seeds", "lives", "violations")
    }
    digest = 0
    for result in results:
        digest ^= int(result["digest"], 16)
    return done | {"digest": f"{digest:08x}"}


if __name__ == "__main__":
    sys.exit(main())
