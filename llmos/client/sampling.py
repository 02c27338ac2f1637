"""From keyword arguments to `SamplingParams`, pure. Whatever comes in, the only exception that comes out is `InvalidRequest`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from llmos.client.checked import utf8_size
from llmos.client.grammars import GRAMMAR_OPTIONS, take_grammar
from llmos.errors import InvalidRequest
from llmos.protocol.params import SamplingParams

FIELDS = SamplingParams.__struct_fields__
OPTIONS = (*FIELDS, *GRAMMAR_OPTIONS)


def merge_params(params: SamplingParams | None, sampling: Mapping[str, Any]) -> SamplingParams:
    """`params` with keyword arguments on top, checked. `stop` may be one string, `logit_bias` a dict."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params: expected SamplingParams, got {type(params).__name__}", field="params")
    refuse_unknown(sampling, OPTIONS)
    given = dict(sampling)
    take_grammar(given)
    values: dict[str, Any] = {name: getattr(params or SamplingParams(), name) for name in FIELDS} | given
    if isinstance(values["stop"], str):
        values["stop"] = (values["stop"],)
    if isinstance(values["logit_bias"], Mapping):
        values["logit_bias"] = tuple(values["logit_bias"].items())
    try:
        merged = msgspec.convert([values[name] for name in FIELDS], SamplingParams)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    merged.check()
    for text in merged.stop:
        utf8_size("stop", text)
    return merged


def refuse_unknown(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """A misspelt option must not be silently without effect."""
    names = sorted(known)
    for name in options:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise InvalidRequest(f"unknown option {name!r}; did you mean {nearest!r}?", field=name)


def _wrong_type(text: str) -> InvalidRequest:
    """msgspec says "Expected `float`, got `str` - at `$[2]`"; say which parameter that is."""
    what, _, path = text.rpartition(" - at ")
    place = path.strip("`").removeprefix("$[").partition("]")[0]
    field = FIELDS[int(place)] if place.isdigit() and int(place) < len(FIELDS) else None
    return InvalidRequest(f"{field or 'params'}: {what or text}", field=field or "params")
