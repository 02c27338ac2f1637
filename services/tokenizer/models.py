"""The models that a tokenizer process serves: one `ServedModel` per configured model, loaded once, never changed.

A directory without any tokenizer is served too: it takes and gives token ids only. Its `ModelInfo` has no chat
template, encoding text is refused with a typed error, and decoding gives empty text.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer
from tokenizers import Encoding, Tokenizer

from llmos.errors import InvalidRequest, LlmosError, ModelError, NotFound
from llmos.protocol.messages import ChatMessage, ModelInfo, Tool, ToolFormat
from llmos.protocol.params import Grammar
from llmos.services.grammar.compile import normal
from llmos.services.grammar.vocabulary import make_vocabulary
from llmos.services.text.directory import ModelDirectory
from llmos.services.text.loading import load_tokenizer
from llmos.services.tokenizer.chat import ChatTemplate, find_template
from llmos.services.tokenizer.incremental import DecodePlan, plain_bytes, token_bytes
from llmos.services.tokenizer.stream import TextStream
from llmos.tools import FAMILIES, find_family

log = logging.getLogger(__name__)

_FAKE_VOCAB_SIZE, _FAKE_CONTEXT = 32_000, 8192  # the fake executor's, where there is no config.json


class ServedModel:
    """Text <-> token ids of one model."""

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer | None, chat: ChatTemplate | None) -> None:
        self.info = info
        self._vocabulary: LLTokenizer | ModelError | None = None
        self._lock = threading.Lock()
        self._tokenizer = tokenizer
        self._chat = chat
        self._continuing = without_prefix_space(tokenizer) if tokenizer else None
        marks = () if info.tools is None else (FAMILIES[info.tools.family].begin, FAMILIES[info.tools.family].end)
        self._plan = DecodePlan(tokenizer, frozenset(marks)) if tokenizer else None
        self._byte_level = tokenizer is not None and "ByteLevel" in _decoder_json(tokenizer)

    def encode_text(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of a plain prompt, with the special tokens that the tokenizer itself adds (BOS).

        `continues`: the text goes on from other tokens; nothing is put around it, and no space in front.
        """
        if continues:
            return self._encode(text, self._continuing, add_special_tokens=False)
        return self._encode(text, self._tokenizer, add_special_tokens=True)

    def encode_whole(self, text: str, second: str | None, *, truncate: bool) -> tuple[list[int], int]:
        """(ids, where the second text begins as the tokenizer marks it, or 0) of a text, or of two, for an encoder."""
        tokenizer = self._needed(self._tokenizer, "text")
        parts = [self._parts(tokenizer, part) for part in (text, second) if part is not None]
        if truncate:
            room = self.info.max_context - tokenizer.num_special_tokens_to_add(len(parts) == 2)
            _shorten(parts, max(0, room))
        whole = tokenizer.post_process(parts[0], parts[1] if len(parts) == 2 else None, True)
        ids: list[int] = whole.ids
        types: list[int] = whole.type_ids
        return ids, types.index(1) if 1 in types else 0

    def encode_chat(self, messages: tuple[ChatMessage, ...], tools: tuple[Tool, ...] = ()) -> list[int]:
        """Ids of a conversation by the model's chat template, which writes its own special tokens."""
        if self._chat is None:
            raise InvalidRequest(
                f"model {self.info.model} has no chat template: send text or token_ids", field="messages"
            )
        return self._encode(self._chat.render(messages, tools), self._tokenizer, add_special_tokens=False)

    def grammar(self, grammar: Grammar) -> Grammar:
        """The grammar as executors take it; raises `InvalidRequest`. Thread-safe."""
        vocabulary = self.vocabulary()
        if not isinstance(vocabulary, LLTokenizer):
            raise InvalidRequest(f"grammar: {vocabulary.message}", field="grammar")
        return normal(grammar, vocabulary)

    def vocabulary(self) -> LLTokenizer | ModelError:
        """What grammars are compiled for; made when it is first needed."""
        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = make_vocabulary(self._needed(self._tokenizer, "grammar"), self.info.vocab_size)
                except ModelError as error:
                    self._vocabulary = error
            return self._vocabulary

    def pieces(self, ids: Iterable[int]) -> tuple[str, ...]:
        """Each token alone, as text for people; a part of a character shows as U+FFFD."""
        tokenizer = self._needed(self._tokenizer, "token_ids")
        tokens = [tokenizer.id_to_token(token_id) or "" for token_id in ids]
        if self._byte_level:
            return tuple(token_bytes(token).decode(errors="replace") for token in tokens)
        return tuple(token.replace("\u2581", " ") for token in tokens)

    def piece_bytes(self, ids: Iterable[int]) -> tuple[bytes, ...]:
        """Each token alone, as the bytes it stands for; empty if it stands for nothing."""
        tokenizer = self._needed(self._tokenizer, "token_ids")
        tokens = [tokenizer.id_to_token(token_id) or "" for token_id in ids]
        if self._byte_level:
            return tuple(map(token_bytes, tokens))
        return tuple(map(plain_bytes, tokens))

    def open_stream(self, stops: tuple[str, ...]) -> TextStream:
        return TextStream(self._plan, stops)

    def describe(self) -> str:
        """One phrase for the line that people see at start."""
        if self._tokenizer is None:
            return f"{self.info.model}: vocab {self.info.vocab_size}, no tokenizer (token ids only)"
        chat = "chat template" if self._chat else "no chat template"
        return f"{self.info.model}: vocab {self.info.vocab_size}, {chat}"

    def _encode(self, text: str, which: Tokenizer | None, *, add_special_tokens: bool) -> list[int]:
        tokenizer = self._needed(which, "text")
        try:  # the batch call works outside the interpreter lock; the plain one does not
            encoded = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except Exception as error:  # noqa: BLE001  (the Rust library raises bare Exception, e.g. no unknown token)
            raise InvalidRequest(f"text: the model's tokenizer can not encode it: {error}", field="text") from None
        ids: list[int] = encoded[0].ids
        return ids

    def _parts(self, tokenizer: Tokenizer, text: str) -> Encoding:
        """A text without the special tokens around it."""
        try:
            return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        except Exception as error:  # noqa: BLE001  (as in `_encode`)
            raise InvalidRequest(f"text: the model's tokenizer can not encode it: {error}", field="text") from None

    def _needed(self, tokenizer: Tokenizer | None, field: str) -> Tokenizer:
        if tokenizer is None:
            raise InvalidRequest(f"model {self.info.model} has no tokenizer: send token_ids", field=field)
        return tokenizer


def _shorten(parts: list[Encoding], room: int) -> None:
    """Cut the ends of texts until all fit into `room` tokens: of two, the longer one first."""
    lengths = [len(part.ids) for part in parts]
    if (excess := sum(lengths) - room) <= 0:
        return
    if len(parts) == 2:
        longer = int(lengths[1] > lengths[0])
        cut = min(excess, abs(lengths[0] - lengths[1]))
        lengths[longer] -= cut
        excess -= cut
        lengths[1 - longer] -= excess // 2
        excess -= excess // 2
        lengths[longer] -= excess
    else:
        lengths[0] -= excess
    for part, length in zip(parts, lengths):
        part.truncate(max(0, length))


def load_model(name: str, path: Path, *, max_context: int = 0, fake: bool = False) -> ServedModel:
    """Read one directory. `max_context` 0 = the model's own; `fake`: there may be no config.json."""
    directory = ModelDirectory(path, required=not fake)
    invented = fake and not directory.config
    if not directory.config and not fake:
        raise ModelError(f"{path / 'config.json'}: missing or empty", field="config.json")
    tokenizer = load_tokenizer(directory)
    template = find_template(path, directory.tokenizer) if tokenizer else None
    eos = directory.eos_token_ids()
    if not eos and tokenizer is not None and "eos_token" in directory.special_tokens:
        found = tokenizer.token_to_id(directory.special_tokens["eos_token"])
        eos = () if found is None else (found,)
    own_vocab = tokenizer.get_vocab_size() if tokenizer and not invented else _FAKE_VOCAB_SIZE
    info = ModelInfo(
        model=name,
        vocab_size=directory.vocab_size() or own_vocab,
        max_context=directory.max_context(max_context or (_FAKE_CONTEXT if invented else 0)),
        eos_token_ids=eos,
        has_chat_template=template is not None,
        defaults=directory.sampling_defaults(),
        task=directory.task,
        labels=directory.labels(),
        tools=_tool_format(template, tokenizer),
        has_grammar=tokenizer is not None and not fake,
    )
    chat = None if template is None else ChatTemplate(template, directory.special_tokens)
    return ServedModel(info, tokenizer, chat)


def _tool_format(template: str | None, tokenizer: Tokenizer | None) -> ToolFormat | None:
    """How the model writes calls of tools, as its chat template shows."""
    family = find_family(template) if template else None
    if family is None or tokenizer is None:
        return None
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return ToolFormat(family, special.get(FAMILIES[family].begin))


def without_prefix_space(tokenizer: Tokenizer) -> Tokenizer:
    """For text that does not begin a text: some tokenizers put a space in front of everything they encode."""
    parts = [json.loads(part.__getstate__()) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer) if part]
    if parts == [_spaceless(part) for part in parts]:
        return tokenizer
    spec = json.loads(tokenizer.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        spec[name] = _spaceless(spec[name])
    return Tokenizer.from_str(json.dumps(spec))


def _spaceless(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer as tokenizer.json describes it, less what puts something in front."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        if part["type"] == "Sequence" and name in part:
            return part | {name: [kept for each in part[name] if (kept := _spaceless(each)) is not None]}
    return part


def _decoder_json(tokenizer: Tokenizer) -> str:
    """The decoder as JSON text; "" if there is none."""
    return "" if tokenizer.decoder is None else tokenizer.decoder.__getstate__().decode()


class ModelTable:
    """All configured models by name. One that could not be loaded keeps its error and harms no other."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}
        self._failed: dict[str, LlmosError] = {}

    def add(self, model: ServedModel) -> None:
        self._models[model.info.model] = model

    def add_failed(self, name: str, error: LlmosError) -> None:
        log.error("model %s: %s", name, error.message)
        self._failed[name] = error

    def get(self, name: str) -> ServedModel:
        """The model; raises `NotFound`, or the error that loading it gave."""
        if name in self._failed:
            raise self._failed[name]
        if name not in self._models:
            raise NotFound(f"no model {name!r}; served: {', '.join(sorted(self._models))}", field="model")
        return self._models[name]

    def check(self) -> None:
        """Raise the first failure if there is nothing to serve."""
        if not self._models and self._failed:
            raise next(iter(self._failed.values()))

    def infos(self) -> tuple[ModelInfo, ...]:
        return tuple(model.info for model in self._models.values())

    def describe(self) -> str:
        failed = [f"{name}: failed" for name in self._failed]
        return "; ".join([*(model.describe() for model in self._models.values()), *failed])
