"""From a Hugging Face model directory to a `Decoder` in memory. Every way a directory can be wrong is a `ModelError`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llmos.services.executor.checkpoint import Checkpoint
from llmos.services.executor.models.decoder import Decoder, LinearFactory
from llmos.services.executor.spec import ModelSpec

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOG_INTERVAL_S = 5.0


def load_decoder(
    directory: Path, spec: ModelSpec, dtype: str, linear: LinearFactory, tick: Callable[[], None], device: str = "cpu"
) -> tuple[Decoder, torch.dtype]:
    """Load the weights to `device`. `dtype` as configured ("auto" = as config.json says, else as the weights are stored)."""
    started = time.monotonic()
    checkpoint = Checkpoint(directory, device)
    torch_dtype = _choose_dtype(dtype, spec, checkpoint)
    progress = _Progress(directory.name, checkpoint, tick)
    with torch.inference_mode():
        decoder = Decoder(spec, checkpoint, torch_dtype, linear, progress)
    checkpoint.finish(ignore=("lm_head.weight",) if spec.tie_embeddings else ())
    decoder.tick = tick
    log.info("%s: %s loaded in %.1f s", directory.name, spec.architecture, time.monotonic() - started)
    return decoder, torch_dtype


def _choose_dtype(dtype: str, spec: ModelSpec, checkpoint: Checkpoint) -> torch.dtype:
    name = spec.dtype if dtype == "auto" else dtype
    if name:
        return _DTYPES[name]
    stored = checkpoint.dtype("model.embed_tokens.weight")
    return stored if stored in _DTYPES.values() else torch.float32


class _Progress:
    """Passes ticks on, and logs a line now and then."""

    def __init__(self, name: str, checkpoint: Checkpoint, tick: Callable[[], None]) -> None:
        self._name = name
        self._checkpoint = checkpoint
        self._tick = tick
        self._next_log = 0.0

    def __call__(self) -> None:
        self._tick()
        if time.monotonic() >= self._next_log:
            self._next_log = time.monotonic() + _LOG_INTERVAL_S
            log.info("loading %s: %d of %d tensors", self._name, self._checkpoint.num_taken, len(self._checkpoint))
