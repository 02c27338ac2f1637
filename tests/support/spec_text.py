"""How `llmos/protocol/spec.md` writes things, so that the page can be compared with the code.

Run as a script it rewrites what is generated in the page: the schema hash and the frames of the examples (from their
readable form), and prints the rows of message types that the page lacks.
"""

from __future__ import annotations

import ast
import re
import sys
import typing
from pathlib import Path
from typing import Any

import msgspec

from llmos.protocol import codec, messages, params

PAGE = Path(codec.__file__).with_name("spec.md")
_EXAMPLE = re.compile(r"^    (?P<text>\w+\(.*\))\n(?P<hex>(?:    (?:[0-9a-f]{2} ?)+\n)*)", re.MULTILINE)


def structs(base: type) -> list[type[msgspec.Struct]]:
    """Message types by number, or parts in order of appearance."""
    found = [
        cls for cls in vars(messages).values() if isinstance(cls, type) and issubclass(cls, base) and cls is not base
    ]
    return sorted(found, key=number_of) if base is messages.Message else found


def documented() -> list[type[msgspec.Struct]]:
    """Everything that needs a row on the page."""
    return [*structs(messages.Message), *structs(messages.Part), params.Grammar, params.SamplingParams]


def number_of(cls: type[msgspec.Struct]) -> int:
    return int(cls.__struct_config__.tag)  # type: ignore[arg-type]


def type_text(kind: Any) -> str:
    """`str?` for `str | None`, `[X]` for `tuple[X, ...]`, `(X, Y)` for `tuple[X, Y]`."""
    args = typing.get_args(kind)
    if type(None) in args:
        return type_text(next(arg for arg in args if arg is not type(None))) + "?"
    if Ellipsis in args:
        return f"[{type_text(args[0])}]"
    if args:
        return f"({', '.join(map(type_text, args))})"
    return str(kind.__name__)


def fields_text(cls: type[msgspec.Struct]) -> str:
    """The cell of a message's fields, in wire order."""
    parts = []
    for field in msgspec.structs.fields(cls):
        default = "" if field.default is msgspec.NODEFAULT else f" = {default_text(field.default)}"
        parts.append(f"`{field.name}` {type_text(field.type)}{default}")
    return ", ".join(parts) or "none"


def default_text(value: Any) -> str:
    if value is None:
        return "nil"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "[]" if value == () else str(value)


def row_start(cls: type[msgspec.Struct]) -> str:
    """How the table row of a message or part begins."""
    return f"{row_head(cls)} | {fields_text(cls)} |"


def row_head(cls: type[msgspec.Struct]) -> str:
    number = cls.__struct_config__.tag
    return f"| {number} `{cls.__name__}`" if number is not None else f"| `{cls.__name__}`"


def examples(page: str) -> list[tuple[str, bytes]]:
    """(readable form, frame) of each example."""
    return [(match["text"], bytes.fromhex(match["hex"])) for match in _EXAMPLE.finditer(page)]


def read_example(text: str) -> messages.Message:
    """The message that `Name(field=value, ...)` means; only names of the protocol are known to it."""
    names = {cls.__name__: cls for cls in documented()}

    def read(node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            return names[node.func.id](**{str(keyword.arg): read(keyword.value) for keyword in node.keywords})
        if isinstance(node, ast.Tuple):
            return tuple(read(entry) for entry in node.elts)
        return ast.literal_eval(node)

    message = read(ast.parse(text, mode="eval").body)
    assert isinstance(message, messages.Message)
    return message


def frame_text(message: messages.Message) -> str:
    blob = codec.encode(message)
    lines = [blob[at : at + 32].hex(" ") for at in range(0, len(blob), 32)]
    return "".join(f"    {line}\n" for line in lines)


def refresh(page: str) -> str:
    """The page with today's schema hash and frames."""
    page = re.sub(r"(?<=Schema hash of this version: `)[0-9a-f]{16}", codec.SCHEMA_HASH, page)
    page = re.sub(r"(?<=schema_hash=')[0-9a-f]{16}", codec.SCHEMA_HASH, page)
    for cls in documented():
        head = row_head(cls)
        page = re.sub(rf"^{re.escape(head)} \|[^|\n]*\|", lambda _: row_start(cls), page, flags=re.MULTILINE)  # noqa: B023
    return _EXAMPLE.sub(lambda match: f"    {match['text']}\n{frame_text(read_example(match['text']))}", page)


if __name__ == "__main__":
    PAGE.write_text(refresh(PAGE.read_text()))
    for missing in documented():
        if row_start(missing) not in PAGE.read_text():
            sys.stdout.write(row_start(missing) + " |\n")
