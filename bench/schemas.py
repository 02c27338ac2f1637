"""JSON schemas of mixed difficulty from a seed: what `structured.py` and tests hold the demonstration model to.

Every schema that comes out can be satisfied, uses only supported keywords, and usually lets an output end within some hundred tokens.
"""

from __future__ import annotations

import random
from typing import Any

LEVELS = 5
_PATTERNS = (
    "^[a-z]{1,8}$",
    r"^\d{3}-\d{2}$",
    "^(red|green|blue)$",
    "^[A-Z][a-z]{1,5}( [A-Z][a-z]{1,5})?$",
    "^x?y+z{2,4}$",
    r"^\w{2,6}$",
)
_FORMATS = ("date", "date-time", "time", "email", "ipv4", "ipv6", "uuid")
_WORDS = (
    "id",
    "name",
    "kind",
    "tags",
    "größe",
    "a b",
    "x-y",
    "末",
    'quo"te',
    "back\\slash",
    "size",
    "next",
    "value",
    "0",
)

Schema = dict[str, Any]


def make_schema(seed: int) -> tuple[int, Schema]:
    """(level 1 to 5, schema)."""
    maker = _Maker(random.Random(f"schema {seed}"))
    level = seed % LEVELS + 1
    return level, maker.root(level)


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def root(self, level: int) -> Schema:
        if level == 1:
            return self.leaf()
        if level == 5 and self.rng.random() < 0.4:
            return self.recursive()
        return self.object(level) if self.rng.random() < 0.7 else self.any(level)

    def any(self, level: int) -> Schema:
        if level <= 1:
            return self.leaf()
        makers = [self.object, self.array, self.tuple, self.either, self.one_of, self.both, lambda _: self.leaf()]
        return self.rng.choice(makers)(level)

    def leaf(self) -> Schema:
        makers = (self.string, self.string, self.integer, self.number, self.listed, lambda: {"type": "boolean"})
        return self.rng.choice(makers)()

    def string(self) -> Schema:
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": rng.choice(_PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": rng.choice(_FORMATS)}
        low = rng.randint(0, 5)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 15)}

    def integer(self) -> Schema:
        rng = self.rng
        low = rng.randint(-1000, 1000)
        found: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randint(10, 5000)}
        if rng.random() < 0.3:
            return {"type": "integer", "multipleOf": rng.choice((2, 3, 5, 7)), "minimum": 0, "maximum": 500}
        if rng.random() < 0.3:
            found["exclusiveMinimum"] = found.pop("minimum")
        return found

    def number(self) -> Schema:
        low = self.rng.randint(-50, 50)
        kind = ("minimum", "maximum") if self.rng.random() < 0.5 else ("exclusiveMinimum", "exclusiveMaximum")
        return {"type": "number", kind[0]: low, kind[1]: low + self.rng.randint(1, 90) + 0.5, **self.step()}

    def step(self) -> Schema:
        """Mostly a few digits are enough: without a step a number may have any number of them."""
        return {"multipleOf": self.rng.choice((0.5, 0.25))} if self.rng.random() < 0.8 else {}

    def listed(self) -> Schema:
        values = [None, True, 0, -7, 2.5, "", "yes", "no", "a longer text", [1, "two"], {"k": None}, "é末\n"]
        chosen = self.rng.sample(values, self.rng.randint(1, 5))
        return {"const": chosen[0]} if len(chosen) == 1 else {"enum": chosen}

    def object(self, level: int) -> Schema:
        rng = self.rng
        names = rng.sample(_WORDS, rng.randint(1, min(5, level + 1)))
        found: Schema = {
            "type": "object",
            "properties": {name: self.any(level - 1) for name in names},
            "required": rng.sample(names, rng.randint(1, len(names))),
            "additionalProperties": False,
        }
        if rng.random() < 0.05:
            found["additionalProperties"] = self.leaf()
        if rng.random() < 0.2:
            found |= {"title": "T", "description": "told to people only", "$comment": "so is this"}
        return found

    def array(self, level: int) -> Schema:
        low = self.rng.randint(0, 2)
        return {
            "type": "array",
            "items": self.any(level - 1),
            "minItems": low,
            "maxItems": low + self.rng.randint(0, 2) or 1,
        }

    def tuple(self, level: int) -> Schema:
        parts = [self.any(level - 1) for _ in range(self.rng.randint(1, 3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}

    def either(self, level: int) -> Schema:
        return {"anyOf": [self.any(level - 1) for _ in range(self.rng.randint(2, 3))]}

    def one_of(self, level: int) -> Schema:
        branches = []
        for kind in self.rng.sample(["cat", "dog", "eel"], 2):
            branch = self.object(level - 1)
            branch["properties"]["kind"] = {"const": kind}
            branch["required"] = sorted({*branch["required"], "kind"})
            branches.append(branch)
        if self.rng.random() < 0.3:
            branches.append({"type": "null"})
        return {"oneOf": branches}

    def both(self, level: int) -> Schema:
        """`allOf` of two objects that speak of different properties."""
        first, second = self.rng.sample(_WORDS, 2)
        parts = [
            {"type": "object", "properties": {name: self.any(level - 1)}, "required": [name]}
            for name in (first, second)
        ]
        return {"allOf": parts}

    def recursive(self) -> Schema:
        """A list or a tree by `$ref`."""
        node: Schema = {
            "type": "object",
            "properties": {"value": self.leaf(), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        if self.rng.random() < 0.5:
            node["properties"]["next"] = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}
        return {"$ref": "#/$defs/node", "$defs": {"node": node}}
