"""What callers may pass, as types: prompts, references to sequences, and the keyword options of each call.

`Client`, `AsyncClient` and both kinds of sequence take them as `**options: Unpack[...]`, so an option is written down once. What
they mean for the wire is in `requests.py` and `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

from llmos.protocol.messages import ChatMessage, Tool
from llmos.protocol.params import Grammar, SamplingParams


class HasRid(Protocol):
    """A sequence, or whatever knows the number of one: a completion, a line of `ps`."""

    @property
    def rid(self) -> int: ...


class HasSchema(Protocol):
    """A pydantic model class."""

    def model_json_schema(self) -> dict[str, Any]: ...


ChatLike = ChatMessage | Mapping[str, Any]
PromptLike = str | Sequence[int] | Sequence[ChatLike]
TokensLike = str | Sequence[int]
SequenceLike = int | HasRid
PageWord = Literal["keep", "swap", "drop"]


class Sampling(TypedDict, total=False):
    """The fields of `SamplingParams`; they win over `params`. `json_schema` (a dict, text, a pydantic model, or True for any object),
    `regex` and `choice` are short for a `grammar`; a text as `grammar` is Lark."""

    params: SamplingParams | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Collection[tuple[int, float]]
    seed: int | None
    max_tokens: int | None
    min_tokens: int
    stop: str | Collection[str]
    stop_token_ids: Collection[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    grammar: Grammar | str | None
    json_schema: Mapping[str, Any] | str | bool | HasSchema | None
    regex: str | None
    choice: Collection[str] | None


class OutputOptions(Sampling, total=False):
    """`deadline_s`: a sequence that still waits this many seconds from now fails with `SequenceFailed`; one that can not be done by
    then is refused. `timeout_s`: the longest time for the whole answer, by this client's clock."""

    deadline_s: float | None
    timeout_s: float | None


class Placement(TypedDict, total=False):
    """`nice`: 19 waits for everybody, -20 (below 0: administrators) for nobody. `parent`: the sequence whose job this one belongs
    to. `after`: the sequences that have to end, and end well, before this one begins."""

    model: str | None
    nice: int
    parent: SequenceLike | None
    after: SequenceLike | Iterable[SequenceLike]


class SpawnOptions(Placement, total=False):
    client_request_id: str | None


class SampleOptions(OutputOptions, Placement, total=False):
    pass


class EncodeOptions(SpawnOptions, total=False):
    """`truncate`: cut a text that is too long instead of refusing it. The others as in `generate`."""

    truncate: bool
    deadline_s: float | None
    timeout_s: float | None


class ScoringOptions(SpawnOptions, total=False):
    deadline_s: float | None
    timeout_s: float | None


class GenerateOptions(OutputOptions, SpawnOptions, total=False):
    """`tools`: functions that the model may call, as `Tool`s or as dicts in OpenAI's form; a chat only. `tool_choice`: "auto", "none",
    "required" or "function:NAME". `parallel_tool_calls` False: a required call is the only one."""

    tools: Iterable[Tool | Mapping[str, Any]]
    tool_choice: str
    parallel_tool_calls: bool
