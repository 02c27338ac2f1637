"""How model families write calls of tools. Pure.

hermes    <tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call>, one block for each call (Hermes 2 Pro, Qwen 2.5 and 3)
llama3    {"name": NAME, "parameters": {...}} as the whole answer, perhaps after <|python_tag|>; more calls after "; " (Llama 3.1 to 3.3)
mistral   [TOOL_CALLS] [{"name": NAME, "arguments": {...}}, ...] (Mistral 7B v0.3, Nemo, Small)
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

_ID_LENGTH = 9  # Mistral's templates accept nothing else: nine letters and digits


@dataclass(frozen=True, slots=True)
class Family:
    """`begin`: what a call begins with; "" = the answer itself is the call. `end`: what follows one. `separator`: between calls in one
    block. `is_list`: the calls of a block stand in a JSON array. `arguments`: the key of the arguments."""

    name: str
    begin: str
    end: str = ""
    separator: str = ""
    is_list: bool = False
    arguments: str = "arguments"
    is_bare: bool = False  # a call may come without `begin`, as the first thing of an answer


FAMILIES = {
    family.name: family
    for family in (
        Family("hermes", "<tool_call>", "</tool_call>"),
        Family("llama3", "<|python_tag|>", separator=";", arguments="parameters", is_bare=True),
        Family("mistral", "[TOOL_CALLS]", is_list=True),
    )
}


def find_family(template: str) -> str | None:
    """The family whose calls a chat template writes; None if it shows the model no tools that we could read back."""
    if not re.search(r"\btools\b", template):
        return None
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return None if "<function=" in template else "hermes"  # Qwen3-Coder puts XML in the same tags
    if "<|python_tag|>" in template or '"parameters"' in template:
        return "llama3"
    return None


def call_id(rid: int, index: int) -> str:
    """An id for a call of a sequence, the same whenever it is asked for."""
    digest = hashlib.blake2b(f"{rid}:{index}".encode(), digest_size=8).hexdigest()
    return digest[:_ID_LENGTH]
