"""The text port: gateway and tokenizer."""

from __future__ import annotations

from llmos.protocol.messages.base import Message, Part
from llmos.protocol.messages.client import ChatMessage, Tool
from llmos.protocol.params import Grammar, SamplingParams


class ToolFormat(Part, frozen=True):
    """How a model writes calls of tools. `marker`: the special token that a call begins with, if one does."""

    family: str
    marker: int | None = None


class ModelInfo(Part, frozen=True):
    """What a gateway must know of a model. `defaults` are the model's own generation settings. `task`: what it is for: generate, embed or
    classify. `labels`: names of the classes, if it classifies and has some. `tools`: None if its chat template knows no tools.
    `has_grammar`: outputs can be held to a grammar."""

    model: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    defaults: SamplingParams
    task: str = "generate"
    labels: tuple[str, ...] = ()
    tools: ToolFormat | None = None
    has_grammar: bool = False


class ModelInfoGet(Message, tag=40, frozen=True):
    req: int


class ModelInfoList(Message, tag=41, frozen=True):
    req: int
    models: tuple[ModelInfo, ...]


class Encode(Message, tag=42, frozen=True):
    """Exactly one of `text`, `messages`; neither if only a `grammar` is to be compiled. `pieces`: also return each token as text.
    `continues`: the text goes on from other tokens, so nothing is put in front of it. `second`: a text that is read together with the
    first. `truncate`: cut what is longer than the model's context."""

    req: int
    model: str
    text: str | None
    messages: tuple[ChatMessage, ...] | None
    pieces: bool = False
    continues: bool = False
    second: str | None = None
    truncate: bool = False
    tools: tuple[Tool, ...] = ()
    grammar: Grammar | None = None


class Encoded(Message, tag=43, frozen=True):
    """`second_at`: where the second text begins, as the tokenizer marks it; 0 = there is none, or it is not marked. `grammar`: as
    executors take it."""

    req: int
    token_ids: bytes
    pieces: tuple[str, ...] = ()
    second_at: int = 0
    grammar: Grammar | None = None


class DecodeOpen(Message, tag=44, frozen=True):
    """Start incremental decoding of one stream. `stream` is chosen by the gateway, never reused on a connection."""

    stream: int
    model: str
    stop: tuple[str, ...]


class DecodeItem(Part, frozen=True):
    """Next output tokens of a stream; `final` flushes what is held back and closes the stream."""

    stream: int
    ids: tuple[int, ...]
    final: bool


class DecodeStep(Message, tag=45, frozen=True):
    """All streams that got tokens in one step, in one message."""

    items: tuple[DecodeItem, ...]


class DecodedItem(Part, frozen=True):
    """`text` is safe to show. If `stop` is set, it was found: `used` of the item's tokens belong to the output, the stream is closed."""

    stream: int
    text: str
    used: int
    stop: str | None = None
    final: bool = False


class Decoded(Message, tag=46, frozen=True):
    items: tuple[DecodedItem, ...]


class DecodeClose(Message, tag=47, frozen=True):
    """The stream's owner left; drop its state without an answer."""

    stream: int


class Render(Message, tag=55, frozen=True):
    """Token ids to text, all at once."""

    req: int
    model: str
    token_ids: bytes


class Rendered(Message, tag=56, frozen=True):
    req: int
    text: str
    pieces: tuple[bytes, ...]
