"""A model's vocabulary as llguidance wants it: the bytes of each token, and which are special.

Invariant: a grammar speaks of text; no mask ever allows a special token but those that the grammar itself names.
"""

from __future__ import annotations

from pathlib import Path

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from llmos.errors import ModelError
from llmos.services.text.directory import ModelDirectory
from llmos.services.text.loading import load_tokenizer


def make_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """`vocab_size`: width of the model's logits. About a second for 150,000 tokens. Raises `ModelError`."""
    try:
        return LLTokenizer(tokenizer.to_str(), n_vocab=max(vocab_size, tokenizer.get_vocab_size()))
    except Exception as error:  # noqa: BLE001  (the Rust library raises what it likes for a tokenizer that it can not read)
        raise ModelError(f"no grammars with this tokenizer: {error}", field="tokenizer.json") from None


def load_vocabulary(path: Path, vocab_size: int) -> LLTokenizer:
    """Of a model directory. Raises `ModelError`."""
    tokenizer = load_tokenizer(ModelDirectory(path))
    if tokenizer is None:
        raise ModelError(f"{path}: no tokenizer", field="tokenizer.json")
    return make_vocabulary(tokenizer, vocab_size)
