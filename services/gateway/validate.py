"""What a client may ask for, pure. Whatever passes is feasible for its model and within the client's rights; what does not
raises the typed error that names the field.

The prompt has one name for callers, `prompt`, however it was given. All limits are in `llmos.protocol.limits`.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping

import msgspec

from llmos.encoders import CLASSIFY, GENERATE
from llmos.errors import ContextTooLong, InvalidRequest, NotFound, PermissionRefused, ProtocolError
from llmos.protocol import limits
from llmos.protocol.checks import (
    check_after,
    check_deadline,
    check_fork,
    check_kill,
    check_nice,
    check_page_fate,
    check_tenant,
    check_tenant_set,
)
from llmos.protocol.codec import unpack_i32
from llmos.protocol.messages import (
    After,
    Append,
    Attach,
    ChatMessage,
    Continue,
    ControlVerb,
    Deadline,
    Detokenize,
    Embed,
    Fork,
    Generate,
    Kill,
    ModelInfo,
    Nice,
    RestartService,
    Spawn,
    Suspend,
    TenantSet,
    Tokenize,
)
from llmos.protocol.params import SamplingParams
from llmos.tools import check_tools, forced_grammar, is_forced

_TOO_LARGE = 2**63  # numbers of sequences and offsets are below
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """A request whose model, form and parameters are good. Its prompt's tokens are checked when they are known."""

    model: ModelInfo
    params: SamplingParams


def check_generate(message: Generate, models: Mapping[str, ModelInfo], is_administrator: bool) -> Checked:
    """Everything that can be checked before the prompt is encoded."""
    info = _generator(message.model, models)
    _check_prompt(message.text, message.messages, message.token_ids, info)
    _check_terms(message, is_administrator)
    check_deadline(message.deadline_ms)
    return _checked(hold_to_call(message, message.params, info), info)


def check_embed(message: Embed, models: Mapping[str, ModelInfo], is_administrator: bool) -> ModelInfo:
    info = find_model(message.model, models)
    if info.task == GENERATE:
        raise InvalidRequest(f"model {info.model!r} generates text; it is no encoder", field="model")
    _check_prompt(message.text, None, message.token_ids, info)
    if message.second is not None:
        _check_second(message, info)
    _check_terms(message, is_administrator)
    check_deadline(message.deadline_ms)
    return info


def _check_second(message: Embed, info: ModelInfo) -> None:
    if info.task != CLASSIFY:
        raise InvalidRequest(f"second: model {info.model!r} embeds texts, it does not judge pairs", field="second")
    if message.text is None:
        raise InvalidRequest("second: only beside a text, not beside token ids", field="second")
    size = len(message.text.encode()) + len((message.second or "").encode())
    if size > limits.MAX_PROMPT_BYTES:
        raise InvalidRequest(
            f"second: {size} bytes with the text, the limit is {limits.MAX_PROMPT_BYTES}", field="second"
        )


def check_spawn(message: Spawn, models: Mapping[str, ModelInfo], is_administrator: bool) -> ModelInfo:
    """As `check_generate`; there may be no prompt, and empty text stands for the tokens that the tokenizer puts in front."""
    info = _generator(message.model, models)
    given = sum(part is not None for part in (message.text, message.token_ids, message.messages))
    if given > 1:
        raise InvalidRequest(
            f"prompt: at most one of text, token_ids and messages may be set, {given} are", field="prompt"
        )
    if message.text or message.token_ids or message.messages is not None:
        _check_prompt(message.text, message.messages, message.token_ids, info)
    _check_terms(message, is_administrator)
    return info


def check_append(message: Append, models: Mapping[str, ModelInfo]) -> ModelInfo:
    _check_rid("rid", message.rid)
    info = find_model(message.model, models)
    _check_prompt(message.text, None, message.token_ids, info)
    return info


def check_continue(message: Continue, models: Mapping[str, ModelInfo]) -> Checked:
    """How much room there is for output only the microkernel knows."""
    _check_rid("rid", message.rid)
    check_deadline(message.deadline_ms)
    if message.params.prompt_logprobs is not None:
        text = "prompt_logprobs: not for an open sequence, whose tokens are computed already"
        raise InvalidRequest(text, field="prompt_logprobs")
    return _checked(message.params, _generator(message.model, models))


def check_attach(message: Attach) -> None:
    _check_rid("rid", message.rid)
    if not 0 <= message.offset < _TOO_LARGE:
        raise InvalidRequest(f"offset: {message.offset} is outside [0, {_TOO_LARGE - 1}]", field="offset")


def check_tokenize(message: Tokenize, models: Mapping[str, ModelInfo]) -> ModelInfo:
    info = find_model(message.model, models)
    _check_prompt(message.text, message.messages, None, info)
    check_tools(message.tools, "auto")
    if message.tools and info.tools is None:
        raise InvalidRequest(f"tools: the chat template of {info.model} knows none", field="tools")
    return info


def check_detokenize(message: Detokenize, models: Mapping[str, ModelInfo]) -> ModelInfo:
    info = find_model(message.model, models)
    _check_size(message.token_ids)
    _check_ids(message.token_ids, info)
    return info


def check_req(req: int) -> None:
    """The client's own number for a request."""
    if not 0 < req < _TOO_LARGE:
        raise InvalidRequest(f"req: {req} is outside [1, {_TOO_LARGE - 1}]", field="req")


def check_control(request: ControlVerb, is_administrator: bool) -> None:
    """Values of a control verb; who may ask for it is in rights.py, whose sequences it may touch the microkernel decides by `owner`."""
    check_req(request.req)
    if isinstance(request, Kill):
        _check_kill(request)
    elif (rid := getattr(request, "rid", None)) is not None:
        _check_rid("rid", rid)
    if isinstance(request, Nice):
        _check_nice(request.nice, is_administrator)
    elif isinstance(request, Suspend):
        check_page_fate(request.pages)
    elif isinstance(request, Fork):
        check_fork(request.count)
    elif isinstance(request, Deadline):
        check_deadline(request.deadline_ms)
    elif isinstance(request, After):
        _check_after(request.after)
    elif isinstance(request, TenantSet):
        check_tenant_set(request)
    elif isinstance(request, RestartService) and not 0 < len(request.name) <= limits.MAX_SERVICE_NAME_CHARS:
        text = f"name: {len(request.name)} characters, allowed are 1 to {limits.MAX_SERVICE_NAME_CHARS}"
        raise InvalidRequest(text, field="name")


def find_model(name: str | None, models: Mapping[str, ModelInfo]) -> ModelInfo:
    """The named model; without a name, the first one served."""
    if not models:
        raise NotFound("no model is served", field="model")
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise NotFound(
            f"model {name[: limits.MAX_MODEL_NAME_CHARS]!r} is not served; served are: {', '.join(sorted(models))}",
            field="model",
        )
    return models[name]


def _generator(name: str | None, models: Mapping[str, ModelInfo]) -> ModelInfo:
    """A model that generates text."""
    info = find_model(name, models)
    if info.task != GENERATE:
        raise InvalidRequest(f"model {info.model!r} is an encoder ({info.task}); it generates no text", field="model")
    return info


def complete_params(params: SamplingParams, info: ModelInfo) -> SamplingParams:
    """Fill what the caller left open from the model's defaults; add the model's own stop tokens."""
    filled = {}
    for name, neutral in _NEUTRAL.items():
        if getattr(params, name) is None:
            default = getattr(info.defaults, name)
            filled[name] = neutral if default is None else default
    for token, _ in params.logit_bias:
        _check_token("logit_bias", token, info)
    for token in params.stop_token_ids:
        _check_token("stop_token_ids", token, info)
    eos = () if params.ignore_eos else info.eos_token_ids
    stops = tuple(dict.fromkeys((*params.stop_token_ids, *eos)))
    if len(stops) > limits.MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids: {len(stops)} entries with the model's own, the limit is {limits.MAX_STOP_TOKEN_IDS}",
            field="stop_token_ids",
        )
    return msgspec.structs.replace(params, stop_token_ids=stops, **filled)


def check_tokens(prompt: bytes, params: SamplingParams, info: ModelInfo) -> SamplingParams:
    """Judge the encoded prompt; returns `params` with `max_tokens` within the room that is left."""
    room = info.max_context - len(check_ids(prompt, info, needs_room=params.max_tokens != 0))
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    return msgspec.structs.replace(params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens))


def check_ids(prompt: bytes, info: ModelInfo, *, may_be_empty: bool = False, needs_room: bool = True) -> array[int]:
    """Token ids that the model knows, not more than its context holds; fewer, if it `needs_room` for another one."""
    ids = _check_ids(prompt, info)
    if not ids:
        if may_be_empty:
            return ids
        raise InvalidRequest("prompt is empty", field="prompt")
    if len(ids) + needs_room > info.max_context:
        more = ", which must hold at least one token more" if needs_room else ""
        raise ContextTooLong(
            f"prompt has {len(ids)} tokens; {info.model} has a context of {info.max_context}{more}", field="prompt"
        )
    return ids


def _checked(params: SamplingParams, info: ModelInfo) -> Checked:
    params.check()
    if params.grammar is not None and not info.has_grammar:
        raise InvalidRequest(f"grammar: outputs of {info.model} can not be held to one", field="grammar")
    complete = complete_params(params, info)
    if complete.grammar is not None and not complete.stop_token_ids:
        text = f"grammar: {info.model} has no end token to end with; name one in stop_token_ids"
        raise InvalidRequest(text, field="grammar")
    return Checked(info, complete)


def hold_to_call(message: Generate, params: SamplingParams, info: ModelInfo) -> SamplingParams:
    """Check the tools of a request; `params` with the grammar that makes a call certain, where one has to be."""
    check_tools(message.tools, message.tool_choice)
    if not message.tools:
        return params
    if message.messages is None:
        raise InvalidRequest("tools: only with messages, whose template shows them to the model", field="tools")
    if info.tools is None:
        raise InvalidRequest(f"tools: the chat template of {info.model} knows none", field="tools")
    if not is_forced(message.tool_choice):
        return params
    if params.grammar is not None:
        text = f"tool_choice: {message.tool_choice!r} needs a grammar of its own, and there is another"
        raise InvalidRequest(text, field="tool_choice")
    grammar = forced_grammar(info.tools, message.tools, message.tool_choice, parallel=message.parallel_tool_calls)
    return msgspec.structs.replace(params, grammar=grammar)


def _check_terms(message: Generate | Spawn | Embed, is_administrator: bool) -> None:
    """What a new sequence may ask of the scheduler."""
    key = message.client_request_id
    if key is not None and not 0 < len(key) <= limits.MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"client_request_id: 1 to {limits.MAX_REQUEST_ID_CHARS} characters", field="client_request_id"
        )
    _check_nice(message.nice, is_administrator)
    if message.parent is not None:
        _check_rid("parent", message.parent)
    _check_after(message.after)


def _check_rid(field: str, rid: int) -> None:
    if not 0 < rid < _TOO_LARGE:
        raise InvalidRequest(f"{field}: {rid} is outside [1, {_TOO_LARGE - 1}]", field=field)


def _check_after(after: tuple[int, ...]) -> None:
    check_after(after)
    for rid in after:
        _check_rid("after", rid)
    if len(set(after)) != len(after):
        twice = next(rid for rid in after if after.count(rid) > 1)
        raise InvalidRequest(f"after: sequence {twice} is named twice", field="after")


def _check_kill(request: Kill) -> None:
    check_kill(request)
    for field, rid in (("rid", request.rid), ("job", request.job)):
        if rid is not None:
            _check_rid(field, rid)
    if request.tenant is not None:
        check_tenant(request.tenant)
    if request.model is not None and not 0 < len(request.model) <= limits.MAX_MODEL_NAME_CHARS:
        raise InvalidRequest(
            f"model: {len(request.model)} characters, allowed are 1 to {limits.MAX_MODEL_NAME_CHARS}", field="model"
        )


def _check_nice(nice: int, is_administrator: bool) -> None:
    check_nice(nice)
    if nice < 0 and not is_administrator:
        raise PermissionRefused(f"nice: {nice} is below 0, which is for administrators only", field="nice")


def _check_prompt(
    text: str | None, messages: tuple[ChatMessage, ...] | None, token_ids: bytes | None, info: ModelInfo
) -> None:
    given = sum(part is not None for part in (text, messages, token_ids))
    if given != 1:
        raise InvalidRequest(
            f"prompt: exactly one of text, token_ids and messages must be set, {given} are", field="prompt"
        )
    if not (text or messages or token_ids):
        raise InvalidRequest("prompt is empty", field="prompt")
    if token_ids is not None:
        _check_size(token_ids)
        return
    if messages is not None:
        _check_chat(messages, info)
    size = len(text.encode()) if text else sum(size_of(message) for message in messages or ())
    if size > limits.MAX_PROMPT_BYTES:
        raise InvalidRequest(f"prompt: {size} bytes, the limit is {limits.MAX_PROMPT_BYTES}", field="prompt")


def _check_size(token_ids: bytes) -> None:
    if len(token_ids) > 4 * limits.MAX_PROMPT_TOKENS:
        raise InvalidRequest(
            f"prompt: {len(token_ids) // 4} token ids, the limit is {limits.MAX_PROMPT_TOKENS}", field="prompt"
        )


def _check_ids(token_ids: bytes, info: ModelInfo) -> array[int]:
    """Whole numbers, and in the vocabulary."""
    try:
        ids = unpack_i32(token_ids)
    except ProtocolError as error:
        raise InvalidRequest(f"prompt: {error.message}", field="prompt") from None
    lowest, highest = min(ids, default=0), max(ids, default=0)
    if lowest < 0 or highest >= info.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequest(
            f"prompt: token id {wrong} is outside [0, {info.vocab_size}), the vocabulary of {info.model}",
            field="prompt",
        )
    return ids


def size_of(message: ChatMessage) -> int:
    """Bytes of text in it."""
    calls = [part for call in message.tool_calls for part in (call.name, call.arguments, call.id or "")]
    parts = [message.role, message.content, message.tool_call_id or "", message.name or "", *calls]
    return sum(len(part.encode()) for part in parts)


def _check_chat(messages: tuple[ChatMessage, ...], info: ModelInfo) -> None:
    if len(messages) > limits.MAX_CHAT_MESSAGES:
        raise InvalidRequest(
            f"prompt: {len(messages)} messages, the limit is {limits.MAX_CHAT_MESSAGES}", field="prompt"
        )
    # The field tells this refusal from all others: callers may fall back to plain text.
    if not info.has_chat_template:
        raise InvalidRequest(f"{info.model} has no chat template; send plain text or token ids", field="messages")


def _check_token(field: str, token: int, info: ModelInfo) -> None:
    if not 0 <= token < info.vocab_size:
        raise InvalidRequest(f"{field}: token id {token} is outside [0, {info.vocab_size})", field=field)
