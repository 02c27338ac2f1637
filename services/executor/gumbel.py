"""`noise.py` for whole tensors, and the choice of one token per row by Gumbel-max.

argmax over tokens of (logit / temperature + Gumbel noise) is a sample of the softmax (Gumbel 1954). The winner is decided in float64 on
the few candidates that a float32 estimate leaves over: same winner as float64 everywhere, at a fraction of the time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmos.services.executor import noise
from llmos.services.executor.rows import Ints

# The float32 estimate of the noise is off by less than 0.7 (at its ends, where the hash is cut to 31 bits and 1 - 2^-24).
_MARGIN = 2.0


def stream_keys(seeds: Ints, positions: Ints) -> npt.NDArray[np.uint64]:
    """`noise.stream_key` of each row."""
    inner = _mix64(positions.astype(np.uint64) ^ np.uint64(noise.SAMPLING_DOMAIN))
    return _mix64(seeds.astype(np.uint64) ^ inner)


def token_hashes(keys: npt.NDArray[np.uint64], token_ids: Tensor) -> Tensor:
    """`noise.token_hash`: keys [rows], token_ids int64[tokens] or [rows, tokens] -> the 32 bits as int32[rows, tokens]."""
    low = torch.from_numpy(keys.astype(np.uint32).view(np.int32))[:, None]
    high = torch.from_numpy((keys >> np.uint64(32)).astype(np.uint32).view(np.int32))[:, None]
    hashes = token_ids.to(torch.int32) * _signed(noise.TOKEN_STRIDE) + low
    return _mix32(_mix32(hashes).bitwise_xor_(high))


def choose(scores: Tensor, token_ids: Tensor, keys: npt.NDArray[np.uint64]) -> Tensor:
    """Sample one column per row: int64[rows].

    scores: float32[rows, n], logits over temperature, -inf where a token is out. token_ids: the columns' ids, [n] or [rows, n].
    Of equal scores the smallest token id wins.
    """
    hashes = token_hashes(keys, token_ids)
    estimate = scores + _estimate(hashes)
    near = (estimate >= estimate.amax(1, keepdim=True) - _MARGIN).nonzero()
    row, column = near.unbind(1)
    uniform = ((hashes[row, column].long() & 0xFFFF_FFFF).double() + 0.5) / 2**32
    exact = scores[row, column].double() - uniform.log().neg_().log_()
    ids = token_ids.expand(scores.shape)[row, column]
    order = np.lexsort((ids.numpy(), -exact.numpy(), row.numpy()))
    first = np.unique(row.numpy()[order], return_index=True)[1]
    return column[torch.from_numpy(order[first])]


def _estimate(hashes: Tensor) -> Tensor:
    """Gumbel noise in float32 from the upper 31 bits; exact enough where it is large, which is where winners are."""
    complement = hashes.bitwise_not().bitwise_right_shift_(1).bitwise_and_(0x7FFF_FFFF).float()
    below_one = complement.add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return below_one.neg_().log1p_().neg_().log_().neg_()


def _mix32(value: Tensor) -> Tensor:
    value ^= (value >> 16) & 0xFFFF
    value *= _signed(noise.MIX32_A)
    value ^= (value >> 13) & 0x7FFFF
    value *= _signed(noise.MIX32_B)
    value ^= (value >> 16) & 0xFFFF
    return value


def _mix64(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = value + np.uint64(0x9E37_79B9_7F4A_7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return value ^ (value >> np.uint64(31))


def _signed(value: int) -> int:
    """An unsigned 32-bit constant as int32 arithmetic spells it."""
    return value - 2**32 if value >= 2**31 else value
