"""Greedy answers of an exported model to the held-out items, judged item by item.

Invariants: the model is loaded from its directory as any user would load it (transformers, offline), in float32; the
prompt goes through the shipped chat template; an answer that does not end by itself is wrong.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmos.services.trainer import chat
from llmos.services.trainer.corpus import held_out
from llmos.services.trainer.families import is_right
from llmos.services.trainer.items import Item

logger = logging.getLogger(__name__)

EVALUATION_ROWS = 20
MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Score:
    task: str
    right: int
    items: int
    misses: tuple[tuple[str, str], ...]  # (prompt, output) of wrong answers

    @property
    def accuracy(self) -> float:
        return self.right / self.items


class Answerer:
    """The exported model behind `answer`."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        ).eval()

    def answer(self, prompts: list[str]) -> list[str]:
        return self.answer_chats([[{"role": "user", "content": prompt}] for prompt in prompts])

    @torch.inference_mode()
    def answer_chats(self, chats: list[list[dict[str, str]]]) -> list[str]:
        texts = [self._tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        batch = self._tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        )
        output = self._model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return [self._text(row) for row in output[:, batch["input_ids"].shape[1] :].tolist()]

    def complete(self, prompt: str) -> str:
        """Plain text, no chat; with the begin token that the tokenizer adds by itself."""
        batch = self._tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = self._model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return self._text(output[0, batch["input_ids"].shape[1] :].tolist())

    def _text(self, ids: list[int]) -> str:
        """Empty when generation ran into the length limit: no end token, no answer."""
        if chat.END_ID not in ids:
            return ""
        text: str = self._tokenizer.decode(ids[: ids.index(chat.END_ID)], clean_up_tokenization_spaces=False)
        return text


def evaluate(answerer: Answerer, seed: int, per_task: int) -> list[Score]:
    scores = []
    for task, items in held_out(seed, per_task).items():
        started = time.monotonic()
        outputs = _answers(answerer, items)
        misses = tuple((i.prompt, out) for i, out in zip(items, outputs, strict=True) if not is_right(i, out))
        scores.append(Score(task, len(items) - len(misses), len(items), misses))
        logger.info("%s: %d of %d, %.0f s", task, scores[-1].right, len(items), time.monotonic() - started)
        for prompt, output in misses[:3]:
            logger.info("  missed %r: %r", prompt, output)
    return scores


def _answers(answerer: Answerer, items: list[Item]) -> list[str]:
    """Items of like length share a batch, so that little is padded; answers come back in the order of the items."""
    order = sorted(range(len(items)), key=lambda index: len(items[index].prompt))
    outputs: dict[int, str] = {}
    for start in range(0, len(order), EVALUATION_ROWS):
        rows = order[start : start + EVALUATION_ROWS]
        outputs |= zip(rows, answerer.answer([items[index].prompt for index in rows]), strict=True)
    return [outputs[index] for index in range(len(items))]
