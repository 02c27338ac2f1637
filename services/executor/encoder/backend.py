"""The backend for encoders: a step's texts, of whatever lengths, in one forward pass; one vector for each.

Its pages hold nothing: they are how the microkernel shares the machine out, so a text takes as many as its tokens would fill. A plan's
chunks are whole texts and sample nothing. Device-agnostic: on the processor weights are packed once, elsewhere torch multiplies.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from llmos.config import ModelConfig
from llmos.protocol.messages import RowResult, StepPlan
from llmos.services.executor.backend import Capabilities, Immediate, Limits, StepOutput, Tick
from llmos.services.executor.checkpoint import Checkpoint
from llmos.services.executor.encoder.model import Encoder
from llmos.services.executor.encoder.output import TextOutput
from llmos.services.executor.encoder.pipeline import read_pipeline
from llmos.services.executor.encoder.rows import Text, TextRows, failures, text_capabilities
from llmos.services.executor.encoder.spec import EncoderSpec, read_encoder_spec
from llmos.services.executor.linear import make_linear
from llmos.services.executor.models.decoder import Linear, LinearFactory

log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EncoderBackend(Immediate):
    """Executes plans by encoding."""

    def __init__(self, encoder: Encoder, output: TextOutput, capabilities: Capabilities) -> None:
        spec = encoder.spec
        self.encoder = encoder
        self.output = output
        self.capabilities = capabilities
        self.rows = TextRows(capabilities)
        self.description = (
            f"{spec.family} encoder, {spec.num_layers} layers, "
            f"{f'{spec.num_labels} classes' if spec.num_labels else f'vectors of {output.size}'}, "
            f"{capabilities.dtype} on {capabilities.device}, texts of at most {capabilities.max_context} tokens"
        )

    @classmethod
    def open(
        cls, model: ModelConfig, directory: Path, limits: Limits, tick: Tick, device: str = "cpu"
    ) -> EncoderBackend:
        """Load a model directory; raises `ModelError`."""
        started = time.monotonic()
        on = torch.device(device)
        if on.type == "cpu":
            torch.set_num_threads(model.threads or psutil.cpu_count(logical=False) or 1)
        spec = read_encoder_spec(directory)
        pipeline = read_pipeline(directory, spec.hidden_size)
        checkpoint = Checkpoint(directory)
        dtype = _choose_dtype(model.dtype, spec)
        linear = _linear_for(on)
        with torch.inference_mode():
            encoder = Encoder(spec, checkpoint, dtype, linear, on, tick)
            output = TextOutput(encoder, pipeline, dtype, linear, directory)
        capabilities = text_capabilities(
            model, limits, max_text=spec.max_text, vocab_size=spec.vocab_size, device=on.type, output_size=output.size,
            dtype=str(dtype).removeprefix("torch."),
        )  # fmt: skip
        log.info("%s: %s loaded in %.1f s", directory.name, spec.family, time.monotonic() - started)
        return cls(encoder, output, capabilities)

    def reset(self) -> None:
        self.forget_submitted()
        self.rows.clear()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        texts, skipped = self.rows.apply(plan)
        if not texts:
            return StepOutput(b"", (), failures(skipped))
        vectors = self._encode(texts).float().cpu().numpy()
        finite = np.isfinite(vectors).all(axis=1).tolist()
        bad = [text.row for text, is_good in zip(texts, finite) if not is_good]
        self.rows.fail(bad)
        results = tuple(
            RowResult(text.row, 0, vector.astype("<f4").tobytes())
            for text, vector, is_good in zip(texts, vectors, finite)
            if is_good
        )
        return StepOutput(b"", (), failures([*skipped, *bad]), results)

    def _encode(self, texts: list[Text]) -> Tensor:
        lengths = [len(text.ids) for text in texts]
        ids, types, positions = (
            torch.from_numpy(np.concatenate(parts)).to(self.encoder.device)
            for parts in (
                [text.ids for text in texts],
                [text.types for text in texts],
                [np.arange(length) for length in lengths],
            )
        )
        if self.encoder.spec.num_types < 2:
            types.zero_()
        return self.output(self.encoder.forward(ids, positions, types, lengths), lengths)


def _choose_dtype(chosen: str, spec: EncoderSpec) -> torch.dtype:
    """As configured, or as config.json says; float32 where nobody does."""
    return _DTYPES[spec.dtype or "float32" if chosen == "auto" else chosen]


def _linear_for(device: torch.device) -> LinearFactory:
    return make_linear if device.type == "cpu" else _plain_linear


def _plain_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """In the weights' own format, whatever comes in; out comes float32."""
    return lambda x: F.linear(x.to(weight.dtype), weight, bias).float()
