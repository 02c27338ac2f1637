"""The client port: clients and gateway."""

from __future__ import annotations

from llmos.protocol.messages.base import Message, Part
from llmos.protocol.params import SamplingParams


class ToolCall(Part, frozen=True):
    """A call that an earlier answer made. `arguments`: JSON text of an object."""

    name: str
    arguments: str
    id: str | None = None


class ChatMessage(Part, frozen=True):
    """`tool_calls`: of role assistant. `tool_call_id`, `name`: of role tool, which call its content answers."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


class Tool(Part, frozen=True):
    """A function that the model may call. `parameters`: JSON schema of an object as text, "" = it takes none."""

    name: str
    description: str | None = None
    parameters: str = ""


class Usage(Part, frozen=True):
    """What a sequence consumed. Times in milliseconds, by the microkernel's monotonic clock."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    queue_ms: float
    total_ms: float


class TokenLogprobs(Part, frozen=True):
    """Log-probabilities (natural) at one output position: the chosen token's, then the best ones, most likely first."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Generate(Message, tag=10, frozen=True):
    """Client -> gateway. Exactly one of `text`, `token_ids`, `messages` is set. `req` is chosen by the client.

    `nice`: -20 (most urgent) to 19; below 0 is for administrators. `deadline_ms`: from now; a sequence still waiting then is ended,
    one that can not be done by then is refused. `parent`: the sequence whose job it belongs to. `after`: it waits until these have
    ended, and ends itself if one of them does badly. `again`: it may have been accepted before, under the same `client_request_id`.

    `tools`: what the model may call, only with `messages`. `tool_choice`: "auto", "none", "required", or "function:NAME"; the last two
    make a call certain by a grammar. `parallel_tool_calls` False: such a call is the only one.
    """

    req: int
    model: str | None
    text: str | None
    token_ids: bytes | None
    messages: tuple[ChatMessage, ...] | None
    params: SamplingParams
    client_request_id: str | None = None
    nice: int = 0
    deadline_ms: float | None = None
    parent: int | None = None
    after: tuple[int, ...] = ()
    again: bool = False
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True


class Accepted(Message, tag=11, frozen=True):
    """`tool_family`: how the text of a `Generate` with tools writes calls, for `llmos.tools.CallParser`."""

    req: int
    rid: int
    model: str
    prompt_tokens: int
    tool_family: str | None = None


class Tokens(Message, tag=12, frozen=True):
    """Gateway -> client: output tokens from `offset` on. `text` may lag behind `ids` (UTF-8, stop strings)."""

    req: int
    offset: int
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None = None


class Finished(Message, tag=13, frozen=True):
    """The one terminal record of an accepted request. `text` is what was still held back."""

    req: int
    rid: int
    reason: int
    text: str
    usage: Usage
    stop_string: str | None = None


class Ack(Message, tag=14, frozen=True):
    """Client -> gateway: all output tokens below `upto` have been read."""

    req: int
    upto: int


class Cancel(Message, tag=15, frozen=True):
    """Client -> gateway: end request `req`. Idempotent; the answer is its `Finished`."""

    req: int


class Tokenize(Message, tag=16, frozen=True):
    """Client -> gateway. Exactly one of `text`, `messages`."""

    req: int
    model: str | None
    text: str | None
    messages: tuple[ChatMessage, ...] | None
    tools: tuple[Tool, ...] = ()


class Tokenized(Message, tag=17, frozen=True):
    req: int
    model: str
    token_ids: bytes
    pieces: tuple[str, ...]


class Spawn(Message, tag=18, frozen=True):
    """Client -> gateway: make an open sequence, which lives until `Close`, `Kill` or idleness, whoever is connected.

    At most one of `text`, `token_ids`, `messages`; its tokens are prefilled at once. The answer is `Spawned`. `parent`, `after`: as in
    `Generate`.
    """

    req: int
    model: str | None
    text: str | None = None
    token_ids: bytes | None = None
    messages: tuple[ChatMessage, ...] | None = None
    nice: int = 0
    parent: int | None = None
    after: tuple[int, ...] = ()
    client_request_id: str | None = None


class Spawned(Message, tag=19, frozen=True):
    """`num_tokens`: how long the sequence is."""

    req: int
    rid: int
    model: str
    num_tokens: int


class Append(Message, tag=20, frozen=True):
    """Client -> gateway: more input for an open sequence that is not generating. Exactly one of `text`, `token_ids`.

    Text is encoded without the tokens that a tokenizer puts in front of a new text. `model` is the sequence's own. The answer is
    `Appended`.
    """

    req: int
    rid: int
    model: str
    text: str | None
    token_ids: bytes | None


class Appended(Message, tag=21, frozen=True):
    """`num_tokens`: how long the sequence is now."""

    req: int
    rid: int
    num_tokens: int


class Continue(Message, tag=22, frozen=True):
    """Client -> gateway: let an open sequence generate. Answered like `Generate`: `Accepted`, `Tokens`, `Finished`; offsets count from
    the start of this output. `model` is the sequence's own. `Cancel` ends the output, not the sequence; if the client leaves, the
    sequence goes on alone."""

    req: int
    rid: int
    model: str
    params: SamplingParams
    deadline_ms: float | None = None


class Attach(Message, tag=23, frozen=True):
    """Client -> gateway: read the output of a sequence from `offset` on, also if it has ended (for a limited time). For an open
    sequence: the output it is generating, or its last one. Answered like `Generate`; old tokens come without log-probabilities.

    A sequence has one reader: an earlier one is told that it was replaced (`Error` WRONG_STATE).
    """

    req: int
    rid: int
    offset: int = 0


class Embed(Message, tag=24, frozen=True):
    """Client -> gateway: what an encoder model makes of a text: its embedding, or the scores of its classes. Exactly one of `text`,
    `token_ids`. The answer is `Embedded`.

    `second`: another text that is read together with `text`, for models that judge pairs. `truncate`: a text that is too long is cut
    instead of refused. The others as in `Generate`.
    """

    req: int
    model: str | None
    text: str | None
    token_ids: bytes | None = None
    second: str | None = None
    truncate: bool = False
    client_request_id: str | None = None
    nice: int = 0
    deadline_ms: float | None = None
    parent: int | None = None
    after: tuple[int, ...] = ()


class Embedded(Message, tag=25, frozen=True):
    """`values`: float32[n]. `labels`: what each number stands for, if the model has names for classes."""

    req: int
    rid: int
    model: str
    values: bytes
    labels: tuple[str, ...]
    usage: Usage


class PromptLogprobs(Message, tag=26, frozen=True):
    """Gateway -> client, to who asked for `prompt_logprobs`: records of the prompt's tokens from `start` on, each with `top` best ones;
    before the first `Tokens`. Section 3.6 has their form. An `Attach` gets all of them again."""

    req: int
    start: int
    top: int
    values: bytes


class Detokenize(Message, tag=30, frozen=True):
    """Client -> gateway: token ids (int32[n]) back to text."""

    req: int
    model: str | None
    token_ids: bytes


class Detokenized(Message, tag=31, frozen=True):
    """`text`: of all of them, without special tokens. `pieces`: the bytes of each token alone, which may be a part of a character."""

    req: int
    model: str
    text: str
    pieces: tuple[bytes, ...]
