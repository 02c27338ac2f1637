"""Trains the byte-level BPE tokenizer and writes tokenizer.json and tokenizer_config.json.

Invariants: any text round-trips (bytes are the alphabet); digits are split one by one, so that columns and places line up;
the special tokens have ids 0 to 5.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmos.services.trainer import chat
from llmos.services.trainer.corpus import documents

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCAB_SIZE = 2048
TRAINING_DOCUMENTS = 12_000
MAX_POSITIONS = 2048


def train_tokenizer(seed: int, num_documents: int = TRAINING_DOCUMENTS, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(chat.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, num_documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{chat.BEGIN} $A", pair=f"{chat.BEGIN} $A $B", special_tokens=[(chat.BEGIN, chat.BEGIN_ID)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": chat.BEGIN,
        "chat_template": chat.CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": chat.END,
        "model_max_length": MAX_POSITIONS,
        "pad_token": chat.PAD,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _texts(seed: int, num_documents: int) -> Iterator[str]:
    """Documents with their special tokens taken out: those are added whole, not learnt from pieces."""
    for document in islice(documents(seed), num_documents):
        for token in chat.SPECIAL_TOKENS:
            document = document.replace(token, "\n")
        yield from document.split("\n")
