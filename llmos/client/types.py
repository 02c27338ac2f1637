"""What the SDK returns.

Rows of `ps`, `status`, `models` and `tenants` and the answers of `explain` and `stat` are the protocol's own structs, so that
nothing gets lost on the way.
"""

from __future__ import annotations

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
    "Completion",
    "Ending",
    "Explained",
    "JobRow",
    "LaneStatus",
    "ModelRow",
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
    tool_calls: tuple[ToolCall, ...] = ()
    said: str | None = None

    @property
    def content(self) -> str:
        """The text without calls of tools."""
        return self.text if self.said is None else self.said

    def __str__(self) -> str:
        return self.text


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
