"""Grammars compiled for the demonstration model's vocabulary."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import llmos
from llmos.protocol.params import NORMAL_KINDS, Grammar
from llmos.services.grammar.compile import normal
from llmos.services.grammar.vocabulary import load_vocabulary

DEMO = Path(llmos.__file__).parent / "assets" / "demo-model"


@cache
def vocabulary() -> Any:
    return load_vocabulary(DEMO, 2048)


def compiled(kind: str, text: str) -> Grammar:
    found = normal(Grammar(kind, text), vocabulary())
    assert found.kind in NORMAL_KINDS
    assert normal(found, vocabulary()) == found or found.kind == "lark", "normal is normal"
    return found
