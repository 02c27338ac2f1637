"""Plant a bug (planted_bugs.py) in a copy of the package and see whether tests notice. The tree itself is never changed.

Each bug gets a process of its own that imports the copy: first some lives of the simulation, then the fast unit tests of the microkernel.
This file is also that process: `python -P planting.py COPY LIVES UNIT`. It exits with 1 if something noticed, which its last line tells;
whoever does not come to an end noticed too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
PACKAGE = ROOT / "llmos"
_EVENTS = 400  # of a life
_LIMIT_S = 300.0
# Long, or about something else than what the microkernel decides.
_SLOW = (
    "test_simulation",
    "test_planted_bugs",
    "test_freeze",
    "test_recorder",
    "test_replay",
    "test_transcript",
    "test_shell",
)
_LAST = ("test_fairness", "test_fast_path")  # the first failure ends it, and these take longest
_SLOW_TESTS = ("test_weights_1_to_3_under_backlog_share_tokens_1_to_3",)


@dataclass(frozen=True)
class Verdict:
    """`by`: simulation, unit tests, no end, or nobody. `how`: what was violated."""

    bug: str
    file: str
    by: str
    how: str
    seconds: float

    @property
    def caught(self) -> bool:
        return self.by != "nobody"


def places(old: str, file: str) -> int:
    """How often a text occurs."""
    return (PACKAGE / "microkernel" / file).read_text().count(old)


def plant(directory: Path, file: str, old: str, new: str) -> None:
    """A copy of the package with one text replaced, as `directory`/llmos."""
    shutil.copytree(PACKAGE, directory / "llmos", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    target = directory / "llmos" / "microkernel" / file
    text = target.read_text()
    assert text.count(old) == 1, f"{file}: {old!r} occurs {text.count(old)} times"
    target.write_text(text.replace(old, new))


def judge(directory: Path, name: str, file: str, *, lives: int, unit: bool) -> Verdict:
    """Run the tests against the copy in `directory`."""
    command = [sys.executable, "-P", str(SUPPORT / "planting.py"), str(directory), str(lives), str(int(unit))]
    environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Verdict(name, file, "no end", "", _LIMIT_S)
    lines = done.stdout.splitlines()
    seconds = round(time.perf_counter() - started, 1)
    if done.returncode not in (0, 1) or not lines or not lines[-1].startswith('{"by"'):
        assert done.returncode, f"{name}: {done.stderr[-2000:]}"
        return Verdict(name, file, "no end", (lines or [""])[-1][:300], seconds)
    said = json.loads(lines[-1])
    assert done.returncode == (said["by"] != "nobody"), f"{name}: {done.stderr[-2000:]}"
    return Verdict(name, file, said["by"], said["how"], seconds)


# ------------------------------------------------------------ in the process with the bug


def main(copy: str, lives: int, unit: bool) -> int:
    import llmos

    assert Path(llmos.__file__).resolve().is_relative_to(Path(copy).resolve()), f"imported {llmos.__file__}"
    sys.path.append(str(SUPPORT))
    verdict = _simulate(lives) or (_unit_tests() if unit else None) or {"by": "nobody", "how": ""}
    print("\n" + json.dumps(verdict))
    return int(verdict["by"] != "nobody")


def _simulate(lives: int) -> dict[str, str] | None:
    from simulation.shrink import find

    for seed in range(lives):
        _, violation = find(seed, _EVENTS)
        if violation is not None:
            return {"by": "simulation", "how": f"seed {seed}: {violation.text}"[:300]}
    return None


def _unit_tests() -> dict[str, str] | None:
    import pytest

    class Failures:
        """The first test that fails."""

        first = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not self.first:
                self.first = report.nodeid.rpartition("/")[2]

    failures = Failures()
    files = [path for path in sorted(ROOT.glob("tests/microkernel/test_*.py")) if path.stem not in _SLOW]
    files.sort(key=lambda path: path.stem in _LAST)
    chosen = ["-k", " and ".join(f"not {name}" for name in _SLOW_TESTS)]
    code = pytest.main(
        [*map(str, files), "-x", "-q", "--timeout=60", "-p", "no:cacheprovider", *chosen],
        plugins=[failures],
    )
    return {"by": "unit tests", "how": failures.first or f"pytest says {int(code)}"} if code else None


def as_row(verdict: Verdict) -> dict[str, object]:
    return asdict(verdict)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3]))))
