"""What the SDK returns.

Rows of `ps`, `status`, `models` and `tenants` and the answers of `explain` and `stat` are the protocol's own structs, so that
nothing gets lost on the way.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from llmos.codes import FinishReason
from llmos.protocol.messages import (
    ChatMessage,
    Explained,
    JobRow,
    LaneStatus,
    ModelRow,
    RecordWritten,
    SeqRow,
    ServiceStatus,
    Stats,
    StatusReply,
    TenantRow,
    TokenLogprobs,
    ToolCall,
    Usage,
)
from llmos.protocol.params import SamplingParams

__all__ = [
    "ChatMessage",
    "Chunk",
    "Classification",
    "Completion",
    "Embedding",
    "Ending",
    "Explained",
    "JobRow",
    "LaneStatus",
    "Likelihood",
    "ModelRow",
    "PromptToken",
    "RecordWritten",
    "SamplingParams",
    "SeqRow",
    "ServiceStatus",
    "Stats",
    "StatusReply",
    "TenantRow",
    "TokenLogprobs",
    "Tokenization",
    "ToolCall",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream. `offset` is the position of its first token in the output, `rid` the sequence's id.

    `text` may lag behind `token_ids`: half a character and the possible start of a stop string are held back.
    The last chunk may have text and no tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    offset: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    rid: int = 0

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A given token and its log-probability behind all tokens before it; NaN for the first one, of which nothing is expected."""

    token_id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer. `finish_reason`: stop, length, cancelled, killed, closed or idle; failures raise `SequenceFailed` instead.

    `stop_string` is the stop string that ended the text, which does not contain it. `tool_calls`: complete calls of tools in it, if it
    was asked for with tools.
    """

    rid: int
    model: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_string: str | None
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[PromptToken, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    said: str | None = None

    @property
    def content(self) -> str:
        """The text without calls of tools."""
        return self.text if self.said is None else self.said

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Embedding:
    """What an encoder makes of a text. `vector` is an array of float32, which numpy and torch read without a copy."""

    rid: int
    model: str
    vector: array[float]
    usage: Usage

    def __len__(self) -> int:
        return len(self.vector)


@dataclass(frozen=True, slots=True)
class Classification:
    """Scores of a classification model, one for each of `labels`, which are numbers where the model names none."""

    rid: int
    model: str
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    usage: Usage

    @property
    def label(self) -> str:
        """The one with the highest score."""
        return self.labels[max(range(len(self.scores)), key=self.scores.__getitem__)]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a model finds a text. `tokens`: all of it; those from `first` on count."""

    rid: int
    model: str
    tokens: tuple[PromptToken, ...]
    first: int
    usage: Usage

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of the tokens that count."""
        return tuple(token.logprobs.logprob for token in self.tokens[self.first :])

    @property
    def total(self) -> float:
        """Logarithm of the probability of all of them together."""
        return sum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Is each the likeliest one at its place?"""
        return all(token.token_id in token.logprobs.top_ids[:1] for token in self.tokens[self.first :])


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sequence ended: `reason` is the name of a `FinishReason`, in small letters."""

    rid: int
    reason: str
    usage: Usage

    @property
    def is_failure(self) -> bool:
        """True if nobody asked for this ending."""
        return FinishReason[self.reason.upper()].is_failure


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Token ids of a text, each with its own piece of it."""

    model: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)
