"""How many planted bugs the tests of the microkernel notice. Goal: at least 95 %, each survivor with its reason.

    python bench/planted_bugs.py --jobs 2            # about twenty minutes; --json FILE keeps what came out
    python bench/planted_bugs.py --only rows.py      # bugs whose file or name has this in it

The bugs are data in tests/support/planted_bugs.py; each is planted in a copy of the package, never in the tree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))  # whose planted_bugs is the list

from planted_bugs import BUGS, SURVIVORS, Bug
from planting import Verdict, as_row, judge, plant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--lives", type=int, default=25, help="of the simulation, for each bug")
    parser.add_argument("--only", default="", help="part of a file's or a bug's name")
    parser.add_argument("--json", type=Path, help="write what came out to this file")
    args = parser.parse_args()
    chosen = [bug for bug in BUGS if args.only in bug.file or args.only in bug.breaks]
    started = time.perf_counter()
    sane = _try(Bug("kernel.py", "no bug", "class Kernel:", "class Kernel:"), args.lives)
    if sane.caught:
        print(f"without a bug: {sane.by}: {sane.how}")
        return 1
    with ThreadPoolExecutor(args.jobs) as pool:
        verdicts = []
        for verdict in pool.map(lambda bug: _try(bug, args.lives), chosen):
            verdicts.append(verdict)
            print(f"{verdict.by:12} {verdict.file:18} {verdict.bug:75} {verdict.how}"[:220], flush=True)
    record = _record(verdicts)
    record["seconds"] = round(time.perf_counter() - started)
    print(json.dumps({name: value for name, value in record.items() if name not in ("bugs", "what")}))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["share"] >= 0.95 else 1


def _try(bug: Bug, lives: int) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="planted-") as directory:
        plant(Path(directory), bug.file, bug.old, bug.new)
        return judge(Path(directory), bug.breaks, bug.file, lives=lives, unit=True)


def _record(verdicts: list[Verdict]) -> dict[str, object]:
    caught = sum(verdict.caught for verdict in verdicts)
    survivors = {v.bug: SURVIVORS.get(v.bug, "not known yet") for v in verdicts if not v.caught}
    return {
        "what": "bugs planted in the microkernel, one at a time, and who noticed",
        "planted": len(verdicts),
        "caught": caught,
        "share": round(caught / max(1, len(verdicts)), 3),
        "by": dict(Counter(verdict.by for verdict in verdicts)),
        "survivors": survivors,
        "bugs": [as_row(verdict) for verdict in verdicts],
    }


if __name__ == "__main__":
    sys.exit(main())
