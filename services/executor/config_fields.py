"""Typed access to a JSON object that somebody else wrote, for `config.json` and the tables inside it. Imports no torch.

Each accessor names a key, checks its type and range and remembers that the key is known; `refuse_typos` then finds keys that look
like a misspelt known one. Every complaint is a `ModelError` with file, key and problem.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.errors import ModelError

MAX_JSON_BYTES = 16 * 1024 * 1024
_MAX_SIZE = 2**24  # no dimension of a supported model comes near
_TYPO_SIMILARITY = 0.88  # "hiden_size" is caught, "rope_scaling_factor" is not taken for "rope_scaling"


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON object, or a list if `kind` says so, from a file of bounded size; raises `ModelError`."""
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: can not be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ModelError(f"{path}: holds a JSON {type(found).__name__}, not {wanted}")
    return found


@dataclass(slots=True)
class ConfigFields:
    """One JSON object. A key whose value is null counts as absent."""

    path: str
    raw: dict[str, Any]
    known: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, directory: Path, name: str) -> ConfigFields:
        if not directory.is_dir():
            raise ModelError(f"{directory}: no such model directory")
        return cls(str(directory / name), read_json(directory / name))

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {key}: {problem}", field=key)

    def present(self, key: str) -> bool:
        self.known.add(key)
        return self.raw.get(key) is not None

    def integer(self, key: str, *, default: int | None = None, low: int = 1, high: int = _MAX_SIZE) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"{value!r} is not a whole number")
        if not low <= value <= high:
            raise self.error(key, f"{value} is outside [{low}, {high}]")
        return value

    def number(self, key: str, default: float | None, *, high: float = 1e9) -> float:
        """A finite number above zero."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, f"{value!r} is not a number")
        if not math.isfinite(value) or not 0 < value <= high:
            raise self.error(key, f"{value} is outside (0, {high:g}]")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key, None) if self.present(key) else None

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"{value!r} is not true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"{value!r} is not a string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.error(key, "is not a list of strings")
        return value

    def table(self, key: str) -> ConfigFields:
        """An object inside this one; empty if absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "is not an object")
        return ConfigFields(f"{self.path}: {key}", value)

    def require(self, key: str, value: Any) -> None:
        """The one value that is supported; absent counts as that value."""
        if self.present(key) and self.raw[key] != value:
            found = repr(self.raw[key]) if isinstance(self.raw[key], str | int | float) else "this setting"
            raise self.error(key, f"{found} is not supported" + (f", only {value!r}" if value is not None else ""))

    def refuse_typos(self) -> None:
        """Raise for a key that is not known but nearly equals a known key that is absent."""
        absent = [key for key in self.known if key not in self.raw]
        for key in self.raw:
            if key not in self.known and (near := _nearest(key, absent)):
                raise self.error(key, f"unknown key; did you mean {near!r}?")

    def _get(self, key: str, default: Any) -> Any:
        self.known.add(key)
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            near = _nearest(key, [found for found in self.raw if found not in self.known])
            raise self.error(key, "is missing" + (f"; did you mean it by {near!r}?" if near else ""))
        return default


def _nearest(key: str, candidates: list[str]) -> str | None:
    found = difflib.get_close_matches(key, candidates, n=1, cutoff=_TYPO_SIMILARITY)
    return found[0] if found else None
