"""The tokenizer of a model directory, as tokenizer services and executors load it. Nothing in the directory is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llmos.errors import ModelError
from llmos.services.text.directory import ModelDirectory

_OTHER_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_tokenizer(directory: ModelDirectory) -> Tokenizer | None:
    """The directory's tokenizer; None if it has none at all.

    Which special tokens go around a text is tokenizer.json's to say: as in transformers, `add_bos_token` and
    `add_eos_token` of tokenizer_config.json do not count beside it.
    """
    file = directory.path / "tokenizer.json"
    if not file.exists():
        others = [name for name in _OTHER_TOKENIZER_FILES if (directory.path / name).exists()]
        return _convert(directory.path, others[0]) if others else None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  (the Rust library raises bare Exception for every problem of a file)
        raise ModelError(f"{file}: {error}", field="tokenizer.json") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _add_tokens(tokenizer, directory)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, directory: ModelDirectory) -> None:
    """Tokens that only tokenizer_config.json knows; named special tokens are special whatever tokenizer.json says."""
    listed = directory.tokenizer.get("added_tokens_decoder")
    entries = listed.items() if isinstance(listed, dict) else ()
    by_id = sorted(entries, key=lambda item: (len(item[0]), item[0]))  # numbers as text
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    wanted = [_added_token(directory, entry) for _, entry in by_id]
    tokenizer.add_tokens([token for token in wanted if repr(token) not in known])
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    named = [text for text in dict.fromkeys(directory.special_tokens.values()) if text not in present]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in named])


def _added_token(directory: ModelDirectory, entry: Any) -> AddedToken:
    try:
        flags = {key: bool(entry[key]) for key in _TOKEN_FLAGS if key in entry}
        return AddedToken(entry["content"], **flags)
    except (TypeError, KeyError):
        file = directory.path / "tokenizer_config.json"
        raise ModelError(f"{file}: bad entry in added_tokens_decoder", field="added_tokens_decoder") from None


def _convert(path: Path, found: str) -> Tokenizer:
    """A tokenizer in an older format, converted by transformers where it can."""
    from transformers import AutoTokenizer  # seconds to import: only for these directories

    try:
        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # noqa: BLE001  (converters raise whatever their format's library raises)
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelError(
            f"{path}: tokenizer.json is missing and {found} can not be converted here: {reason}", field="tokenizer.json"
        ) from None
