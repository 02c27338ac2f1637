"""The right answers, known without llmosd: of the fake backend by its definition, of a real model by a recording made before.

An answer's address is plain data that travels through histories: `{"seed", "position", "count", "stop"}` for the fake backend
(`position`: tokens before the output; `stop`: how many tokens come before the one that completes the stop string, or null), and
`{"recorded", "turn"}` for a recording.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmos.services.executor.fake import fake_token

VOCAB = 1000
CONTEXT = 4096


@dataclass(frozen=True)
class Answer:
    """A whole output. `pieces`: the text of each token, where that is defined; they make `text`."""

    ids: tuple[int, ...]
    text: str
    reason: str
    pieces: tuple[str, ...] | None = None

    def text_after(self, start: int) -> str | None:
        """The text of a reader that has the first `start` tokens; None if it is not known."""
        if start == 0:
            return self.text
        return None if self.pieces is None else "".join(self.pieces[start:])


class AnswerBook(Protocol):
    def find(self, address: dict[str, Any]) -> Answer: ...


def word(token: int) -> str:
    """The text of one token of the fake model."""
    return f"t{token} "


class FakeAnswers:
    """By definition of the backend and of the vocabulary that `write_fake_model` writes."""

    def find(self, address: dict[str, Any]) -> Answer:
        seed, position, stop = address["seed"], address["position"], address["stop"]
        count = address["count"] if stop is None else stop + 1
        ids = tuple(fake_token(seed, position + i, VOCAB) for i in range(count))
        pieces = tuple(map(word, ids if stop is None else ids[:stop]))
        return Answer(ids, "".join(pieces), "length" if stop is None else "stop", pieces)


class RecordedAnswers:
    """`{name: [turn, ...]}`, a turn is `{"append", "max_tokens", "ids", "text", "length"}`; see recording.py."""

    def __init__(self, path: Path) -> None:
        self.talks: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())

    def find(self, address: dict[str, Any]) -> Answer:
        turn = self.talks[address["recorded"]][address["turn"]]
        return Answer(tuple(turn["ids"]), turn["text"], "length")


def write_fake_model(directory: Path) -> None:
    """A directory without weights: token n is the word "tn ", in prompts too, so each text has exactly one tokenization."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu", "torch_dtype": "float32",
    }  # fmt: skip
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    words = {"type": "WordLevel", "vocab": {word(token): token for token in range(VOCAB)}, "unk_token": word(0)}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": split, "post_processor": None, "decoder": {"type": "Fuse"}, "model": words,
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    for name, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (directory / f"{name}.json").write_text(json.dumps(content))
