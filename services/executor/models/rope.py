"""Rotary position embedding: frequencies for each supported kind of scaling, and cos/sin for given positions.

default: Su et al. 2021. linear: positions divided by a factor. llama3: long wavelengths divided, short ones kept, a blend between.
yarn: Peng et al. 2023, a ramp over dimensions, and logits scaled through cos/sin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmos.services.executor.spec import RopeSpec


class Rope:
    """cos and sin for one model. Rotation pairs element i with i + head_dim / 2."""

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        self.frequencies, self.scale = frequencies(spec, head_dim)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: int64[tokens] -> cos and signed sin, float32[tokens, 1, head_dim]: x cos + roll(x, head_dim / 2) sin rotates x."""
        angle = positions[:, None].float() * self.frequencies
        cos, sin = angle.cos() * self.scale, angle.sin() * self.scale
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def frequencies(spec: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """float32[head_dim / 2] radians per position, and the factor on cos and sin."""
    base = 1.0 / spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if spec.kind == "linear":
        return base / spec.factor, 1.0
    if spec.kind == "llama3":
        return _llama3(spec, base), 1.0
    if spec.kind == "yarn":
        return _yarn(spec, base, head_dim), _yarn_scale(spec)
    assert spec.kind == "default", spec.kind
    return base, 1.0


def _llama3(spec: RopeSpec, base: Tensor) -> Tensor:
    turns = spec.original_max_positions * base / (2 * math.pi)  # full turns within the original context
    blend = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0.0, 1.0)
    return (1.0 - blend) * base / spec.factor + blend * base


def _yarn(spec: RopeSpec, base: Tensor, head_dim: int) -> Tensor:
    def dimension(turns: float) -> float:
        """The pair of dimensions that makes this many turns within the original context."""
        return head_dim * math.log(spec.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return base / spec.factor * ramp + base * (1.0 - ramp)


def _yarn_scale(spec: RopeSpec) -> float:
    def scale(weight: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0

    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return scale(spec.mscale) / scale(spec.mscale_all_dim)
    return scale(1.0)
