"""Incremental decoding: token ids in, text out, never a half character.

Invariant: for any cut of the ids into pieces, the pieces' texts joined (with `flush` at the end) equal the decode of
all ids at once, special tokens skipped. Each token costs O(its own length): nothing is decoded twice.

A tokenizer's decoder is a chain of stages over token strings. Each stage here is the streaming form of one of them;
what a stage can not know yet it keeps:
    ByteLevel      the first bytes of an unfinished UTF-8 character
    ByteFallback   the current run of <0xNN> tokens: one invalid byte changes the text of the whole run
    BPEDecoder     one token: the last one is treated differently
    anything else  everything until `flush` (`streams` is False)
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import Decoder

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_WORDPIECE_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class Stage(Protocol):
    """One decoder over a stream of tokens. The last stage's output is text, in pieces."""

    def push(self, tokens: list[str]) -> list[str]: ...

    def flush(self) -> list[str]: ...


class DecodePlan:
    """What all streams of one tokenizer share: the token table and how to build the stages. `shown`: special tokens that are text all
    the same, because they say that a call of a tool begins."""

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[str] = frozenset()) -> None:
        self._tokenizer = tokenizer
        added_tokens = tokenizer.get_added_tokens_decoder().items()
        self._skipped = {token for token, added in added_tokens if added.special and added.content not in shown}
        self._tokens: dict[int, str | None] = {}
        spec = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        makers = _stage_makers(spec)
        self.streams = makers is not None
        self._makers = makers or [lambda: _Whole(tokenizer.decoder)]

    def token(self, token_id: int) -> str | None:
        """The token's string; None if it leaves no text (special, or beyond the vocabulary)."""
        try:
            return self._tokens[token_id]
        except KeyError:
            known = 0 <= token_id < 2**32 and token_id not in self._skipped
            found = self._tokenizer.id_to_token(token_id) if known else None
            if known and found is not None:  # only real tokens are remembered: a peer must not fill the table
                self._tokens[token_id] = found
            return found

    def open(self) -> IncrementalDecoder:
        return IncrementalDecoder(self)

    def stages(self) -> list[Stage]:
        return [make() for make in self._makers]


class IncrementalDecoder:
    """The decoder of one stream."""

    def __init__(self, plan: DecodePlan) -> None:
        self._plan = plan
        self._stages = plan.stages()

    def push(self, ids: Iterable[int]) -> str:
        """Text that these tokens made certain."""
        tokens = [token for token in map(self._plan.token, ids) if token is not None]
        for stage in self._stages:
            tokens = stage.push(tokens)
        return "".join(tokens)

    def flush(self) -> str:
        """The rest; no `push` may follow."""
        tokens: list[str] = []
        for stage in self._stages:
            tokens = stage.push(tokens) + stage.flush()
        return "".join(tokens)


def _stage_makers(spec: dict[str, Any] | None) -> list[Callable[[], Stage]] | None:
    """Stages for a decoder as tokenizer.json describes it; None if some part has no streaming form here."""
    if spec is None:
        return [_Spaced]
    parts = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    makers: list[Callable[[], Stage]] = []
    joined = False  # after ByteLevel or Fuse the "tokens" are one text, of which we see pieces
    for part in parts:
        kind = part["type"]
        if joined and not (kind == "Fuse" or (kind == "Strip" and part["stop"] == 0)):
            return None
        maker = _maker(kind, part, joined)
        if maker is None:
            return None
        makers.append(maker)
        joined = joined or kind in ("ByteLevel", "Fuse")
    return makers


def _maker(kind: str, part: dict[str, Any], joined: bool) -> Callable[[], Stage] | None:
    if kind == "ByteLevel":
        table: dict[str, bytes] = {}
        return lambda: _ByteLevel(table)
    if kind == "ByteFallback":
        return _ByteFallback
    if kind == "Fuse":
        return _Fuse
    if kind == "Metaspace":
        return lambda: _Metaspace(part["replacement"], part["prepend_scheme"] != "never")
    if kind == "Replace" and "String" in part["pattern"]:
        return lambda: _Replace(part["pattern"]["String"], part["content"])
    if kind == "Strip" and joined:
        return lambda: _StripText(part["content"], part["start"])
    if kind == "WordPiece":
        return lambda: _WordPiece(part["prefix"], part["cleanup"])
    if kind == "BPEDecoder":
        return lambda: _WordEnd(part["suffix"])
    return None


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF = _byte_alphabet()


def plain_bytes(token: str) -> bytes:
    """The bytes of one token of a vocabulary that is not byte-level."""
    found = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token.replace("\u2581", " ").encode(errors="replace")


def token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token outside that alphabet (an added one) stands for itself."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


class _ByteLevel:
    def __init__(self, table: dict[str, bytes]) -> None:
        self._table = table  # shared by all streams of the model
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: list[str]) -> list[str]:
        table = self._table
        parts = []
        for token in tokens:
            part = table.get(token)
            if part is None:
                part = table[token] = token_bytes(token)
            parts.append(part)
        return [self._utf8.decode(b"".join(parts))]

    def flush(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, tokens: list[str]) -> list[str]:
        out: list[str] = []
        for token in tokens:
            if match := _BYTE_TOKEN.fullmatch(token):
                self._run.append(int(match[1], 16))
            else:
                out += self.flush()
                out.append(token)
        return out

    def flush(self) -> list[str]:
        run, self._run = self._run, bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)  # the library gives up the whole run, so do we


class _Stateless:
    """Stages that treat each token alone."""

    def flush(self) -> list[str]:
        return []


class _Fuse(_Stateless):
    def push(self, tokens: list[str]) -> list[str]:
        return ["".join(tokens)] if tokens else []


class _Replace(_Stateless):
    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content

    def push(self, tokens: list[str]) -> list[str]:
        return [token.replace(self._pattern, self._content) for token in tokens]


class _Metaspace(_Stateless):
    """The replacement character is a space; in the first token it is the one that encoding put there."""

    def __init__(self, replacement: str, prepended: bool) -> None:
        self._replacement = replacement
        self._drop = prepended

    def push(self, tokens: list[str]) -> list[str]:
        if not tokens:
            return tokens
        out = [token.replace(self._replacement, " ") for token in tokens]
        if self._drop:
            out[0] = tokens[0].replace(self._replacement, "")
            self._drop = False
        return out


class _StripText(_Stateless):
    """Removes up to `count` leading characters of the whole text."""

    def __init__(self, char: str, count: int) -> None:
        self._char, self._left = char, count

    def push(self, tokens: list[str]) -> list[str]:
        if not self._left:
            return tokens
        text = "".join(tokens)
        while self._left and text:
            if text[0] != self._char:
                self._left = 0
                break
            text = text[1:]
            self._left -= 1
        return [text]


class _Spaced(_Stateless):
    """No decoder: tokens with spaces between."""

    def __init__(self) -> None:
        self._lead = ""

    def push(self, tokens: list[str]) -> list[str]:
        if not tokens:
            return tokens
        text, self._lead = self._lead + " ".join(tokens), " "
        return [text]


class _WordPiece(_Stateless):
    def __init__(self, prefix: str, cleanup: bool) -> None:
        self._prefix, self._cleanup = prefix, cleanup
        self._first = True

    def push(self, tokens: list[str]) -> list[str]:
        return [self._one(token) for token in tokens]

    def _one(self, token: str) -> str:
        if not self._first:
            token = token.removeprefix(self._prefix) if token.startswith(self._prefix) else f" {token}"
        self._first = False
        for found, instead in _WORDPIECE_CLEANUP if self._cleanup else ():
            token = token.replace(found, instead)
        return token


class _WordEnd:
    """BPEDecoder: the suffix marks the end of a word, except at the end of the text."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._last: list[str] = []

    def push(self, tokens: list[str]) -> list[str]:
        tokens = self._last + tokens
        self._last = tokens[-1:]
        return [token.replace(self._suffix, " ") for token in tokens[:-1]]

    def flush(self) -> list[str]:
        return [token.replace(self._suffix, "") for token in self._last]


class _Whole:
    """A decoder without a streaming form: its text comes at the end."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tokens: list[str] = []

    def push(self, tokens: list[str]) -> list[str]:
        self._tokens += tokens
        return []

    def flush(self) -> list[str]:
        return [str(self._decoder.decode(self._tokens))]
