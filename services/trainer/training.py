"""The training loop: packed rows, Muon for the matrices, AdamW for the embedding and the norms.

The learning rate rests once, early, so that a usable model exists long before the last step (`on_rest` exports it).
Invariants: data order is a function of the seed. With a step limit alone, so are the weights, up to the order in which
threads add; with a time limit the number of steps, and with it the schedule, depends on the machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from llmos.services.trainer.muon import Muon
from llmos.services.trainer.packing import Batch, Packer
from llmos.services.trainer.schedule import FIRST_REST, FRESH, Plan

logger = logging.getLogger(__name__)

ROW_LENGTHS = (512, 512, 512, 1024)  # by turns
MATRIX_RATE, OTHER_RATE = 4e-3, 4e-3
LOG_EVERY = 20


@dataclass(frozen=True, slots=True)
class Summary:
    steps: int
    tokens: int
    seconds: float
    loss: float


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.inputs, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    return (losses * weights).sum() / weights.sum()


class Optimizer:
    """Both optimizers behind one step."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name
            (matrices if is_matrix else others).append(parameter)
        self._model = model
        self._muon = Muon(matrices)
        self._adamw = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, share: float) -> None:
        self._adamw.param_groups[0]["lr"] = OTHER_RATE * share
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._muon.step(MATRIX_RATE * share)
        self._adamw.step()
        self._model.zero_grad(set_to_none=True)


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, plan: Plan, on_rest: Callable[[Summary], None]) -> Summary:
    packer, optimizer = Packer(tokenizer, plan.seed, plan.focus), Optimizer(model)
    started, step, tokens, average = time.monotonic(), 0, 0, 0.0
    rested = plan.schedule is not FRESH  # a continued run starts from a usable model
    model.train()
    while (progress := plan.limits.progress(step, started)) < 1.0:
        if progress >= FIRST_REST and not rested:
            rested = True
            on_rest(Summary(step, tokens, time.monotonic() - started, average))
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        rows = plan.batch_tokens // length
        loss = loss_of(model, packer.batch(rows, length))
        loss.backward()
        optimizer.step(plan.learning_rate_share(progress))
        step, tokens = step + 1, tokens + rows * length
        average = loss.item() if step == 1 else 0.95 * average + 0.05 * loss.item()
        if step % LOG_EVERY == 0:
            seconds = time.monotonic() - started
            logger.info("step %d, %.0f s, %.0f tokens/s, loss %.4f", step, seconds, tokens / seconds, average)
    model.eval()
    return Summary(step, tokens, time.monotonic() - started, average)
