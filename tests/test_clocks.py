"""Who looks at the wall clock. It may jump by years; what decides anything counts on the monotonic clock (T35).

Each use is listed with what it is for. A new one that is a matter of display, of a file's name or of records for people may be added; one
that a timeout, a deadline or an order depends on may not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
WALL = {
    ("time", "time"), ("time", "time_ns"), ("time", "localtime"), ("time", "gmtime"), ("time", "ctime"),
    ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today"), ("date", "today"),
}  # fmt: skip
ALLOWED = {
    "llmos/ctl/flight.py": "shows when a file was made",
    "llmos/http_links.py": "until when a one-time link is good: a jump may end it, and `llmosctl open` makes another",
    "llmos/keys/keyfile.py": "when a key was made or revoked, for people",
    "llmos/log.py": "times of log lines",
    "llmos/microkernel/journal.py": "how long the machine was off: only if it was booted meanwhile, and never less than nothing",
    "llmos/microkernel/main.py": "names of flight files",
    "services/gateway/audit.py": "times of audit lines",
    "services/gateway/http/access.py": "as one-time links: a browser may have to be let in again",
    "services/gateway/http/anthropic_messages.py": "`created` of an answer",
    "services/gateway/http/encoders.py": "`created` of an answer",
    "services/gateway/http/openai_chat.py": "`created` of an answer",
    "services/gateway/http/openai_completions.py": "`created` of an answer",
    "services/gateway/http/openai_responses.py": "`created_at` of an answer",
    "services/gateway/http/service.py": "when it was started, for people",
    "services/gateway/http/sse.py": "`created` of an answer",
    "services/gateway/service.py": "an incarnation that no earlier gateway had; nobody orders them",
    "services/storage/registry.py": "when a model was registered; name of a damaged file",
    "services/tokenizer/chat.py": "templates may ask for the date",
}
ALL_DAY = ("services/trainer/",)  # no service


def uses(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        if (owner, node.attr) in WALL or node.attr in ("CLOCK_REALTIME", "strftime_now"):
            yield f"{owner}.{node.attr}"


def test_only_these_files_look_at_the_wall_clock() -> None:
    found = {}
    for folder in ("llmos", "services"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith(ALL_DAY) and (names := sorted(set(uses(path.read_text())))):
                found[name] = names
    assert {name: names for name, names in found.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) - set(found) == set(), "looks at it no more"


def test_a_use_is_found() -> None:
    assert list(uses("import time\nx = time.time()")) == ["time.time"]
    assert list(uses("import datetime\nx = datetime.datetime.now(datetime.UTC)")) == ["datetime.now"]
    assert list(uses("import time\nx = time.monotonic()")) == []
