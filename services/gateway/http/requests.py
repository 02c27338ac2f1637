"""What the generating endpoints of OpenAI's protocol have in common: their fields, and what becomes of them.

The structs are the documentation: `/openapi.json` is made from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request

from llmos.protocol import limits
from llmos.protocol.messages import ChatMessage, Generate, Tool
from llmos.protocol.params import Grammar, SamplingParams
from llmos.services.gateway.http.bodies import Refused
from llmos.services.gateway.http.failures import HttpError

MAX_SAMPLES = 64  # of one prompt
MAX_OUTPUTS = 256  # of one request
DEADLINE_HEADER = "llmos-deadline-ms"
KEY_HEADER = "idempotency-key"
# service_tier: nice. Below 0 is for administrators.
TIERS = {"auto": 0, "default": 0, "standard": 0, "flex": 10, "priority": -5}
WITHOUT_EFFECT = frozenset({"user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention"})
LATER = Refused("llmos does not do that yet")
_SEEDS = 2**63
# our name of a field: OpenAI's
NAMES = {"nice": "priority", "deadline_ms": DEADLINE_HEADER, "client_request_id": KEY_HEADER, "logprobs": "logprobs"}


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`include_usage`: the last event before [DONE] has the usage of the whole request. `include_obfuscation`: only false."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GrammarField(Struct, forbid_unknown_fields=True):
    """What the output has to look like: `kind` is json_schema, json_object, regex, choice, lark or gbnf (docs/structured.md)."""

    kind: str
    text: str = ""


class Sampling(Struct, forbid_unknown_fields=True, kw_only=True):
    """How tokens are chosen, and how many. Fields below `logit_bias` are llmos's own."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=limits.MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-limits.MAX_PENALTY_ABS, le=limits.MAX_PENALTY_ABS)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-limits.MAX_PENALTY_ABS, le=limits.MAX_PENALTY_ABS)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[int, float] | None = None
    service_tier: str | None = None
    priority: Annotated[int, Meta(ge=limits.MIN_NICE, le=limits.MAX_NICE)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=limits.MAX_REPETITION_PENALTY)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=limits.MAX_TOKENS)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    grammar: GrammarField | None = None


def sampling_params(
    given: Sampling, max_tokens: int | None, logprobs: int | None, grammar: Grammar | None = None
) -> SamplingParams:
    """Its ranges are checked by the gateway, as for everybody."""
    own: dict[str, Any] = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_tokens",
            "ignore_eos",
        )
        if (value := getattr(given, name)) is not None
    }
    if given.grammar is not None:
        if grammar is not None:
            raise HttpError(400, "grammar and response_format say the same: give one of them", param="grammar")
        grammar = Grammar(given.grammar.kind, given.grammar.text)
    return SamplingParams(
        **own,
        grammar=grammar,
        seed=None if given.seed is None else given.seed % _SEEDS,
        stop=stop_strings(given.stop),
        stop_token_ids=tuple(given.stop_token_ids or ()),
        logit_bias=tuple((given.logit_bias or {}).items()),
        max_tokens=max_tokens,
        logprobs=logprobs,
    )


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def nice_of(given: Sampling) -> int:
    """`priority` is the nice value itself; `service_tier` stands for one."""
    if given.service_tier is not None and given.service_tier not in TIERS:
        text = f"service_tier: {given.service_tier!r:.40} is none of {', '.join(TIERS)}"
        raise HttpError(400, text, param="service_tier", code="invalid_value")
    tier = TIERS[given.service_tier or "auto"]
    return given.priority if given.priority is not None else tier


def names_of(given: Sampling) -> dict[str, str]:
    """What this caller calls our fields."""
    return NAMES if given.priority is not None else NAMES | {"nice": "service_tier"}


class Wish(Struct, frozen=True):
    """One prompt, in one of three forms."""

    text: str | None = None
    token_ids: bytes | None = None
    messages: tuple[ChatMessage, ...] | None = None


class Tools(Struct, frozen=True):
    """What the model may call, as `Generate` has it."""

    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    parallel: bool = True


NO_TOOLS = Tools()


def wishes(
    request: Request,
    model: str | None,
    prompts: list[Wish],
    samples: int,
    params: SamplingParams,
    nice: int,
    tools: Tools = NO_TOOLS,
) -> list[Generate]:
    """The samples of each prompt, one after another. `req` is filled in when they are asked for."""
    if len(prompts) * samples > MAX_OUTPUTS:
        text = f"{len(prompts)} prompts with n = {samples} are more than {MAX_OUTPUTS} outputs"
        raise HttpError(400, text, param="n" if samples > 1 else "prompt", code="invalid_value")
    deadline = _deadline(request.headers)
    key = _request_key(request.headers, len(prompts) * samples > 1)
    found: list[Generate] = []
    for prompt in prompts:
        for sample in range(samples):
            seed = None if params.seed is None else (params.seed + sample) % _SEEDS
            index = len(found)
            found.append(
                Generate(
                    0,
                    model,
                    prompt.text,
                    prompt.token_ids,
                    prompt.messages,
                    msgspec.structs.replace(params, seed=seed),
                    key if key is None or not index else f"{key}~{index}",
                    nice,
                    deadline,
                    tools=tools.tools,
                    tool_choice=tools.choice,
                    parallel_tool_calls=tools.parallel,
                    again=key is not None,  # HTTP clients do not say whether they ask for the second time
                )
            )
    return found


def _deadline(headers: Mapping[str, str]) -> float | None:
    text = headers.get(DEADLINE_HEADER)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise HttpError(400, f"{DEADLINE_HEADER}: {text!r:.40} is not a number", param=DEADLINE_HEADER) from None


def _request_key(headers: Mapping[str, str], is_many: bool) -> str | None:
    """The caller's own name for the request: the same again is the same sequence, and who leaves comes back."""
    key = headers.get(KEY_HEADER)
    if key is None:
        return None
    room = limits.MAX_REQUEST_ID_CHARS - (4 if is_many else 0)
    if not 0 < len(key) <= room or key.startswith(limits.MADE_UP_REQUEST_ID):
        text = f"{KEY_HEADER}: 1 to {room} characters, not beginning with {limits.MADE_UP_REQUEST_ID!r}"
        raise HttpError(400, text, param=KEY_HEADER, code="invalid_value")
    return key
