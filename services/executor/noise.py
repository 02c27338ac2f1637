"""Sampling noise: a counter-based hash of (seed, position, vocabulary id). Imports no torch, so every backend and test can use it.

The stream of one token choice is a pure function of its address, never of the batch, the step or the row. Definition, in unsigned
arithmetic: `key = mix64(seed XOR mix64(position XOR DOMAIN))`, then for a token id t
`h = mix32(mix32(t * 0x9E3779B1 + low32(key)) XOR high32(key))` and the uniform number is (h + 0.5) / 2^32: never 0, never 1.
`mix64` is the finaliser of SplitMix64 (Steele et al. 2014), `mix32` that of MurmurHash3 (Appleby 2011). DOMAIN keeps this stream
apart from other uses of the same seed.
"""

from __future__ import annotations

import math

SAMPLING_DOMAIN = 0x6C6C_6D6F_7300_0001  # "llmos", stream 1
FAKE_DOMAIN = 0x6C6C_6D6F_7300_0002  # "llmos", stream 2
TOKEN_STRIDE = 0x9E37_79B1
MIX32_A, MIX32_B = 0x85EB_CA6B, 0xC2B2_AE35
_MASK32, _MASK64 = 2**32 - 1, 2**64 - 1


def mix64(value: int) -> int:
    value = (value + 0x9E37_79B9_7F4A_7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK64
    return value ^ (value >> 31)


def mix32(value: int) -> int:
    value = ((value ^ (value >> 16)) * MIX32_A) & _MASK32
    value = ((value ^ (value >> 13)) * MIX32_B) & _MASK32
    return value ^ (value >> 16)


def stream_key(seed: int, position: int, domain: int = SAMPLING_DOMAIN) -> int:
    """64 bits that every token id of one choice shares."""
    return mix64(seed ^ mix64(position ^ domain))


def token_hash(key: int, token: int) -> int:
    """32 bits for one token id."""
    return mix32(mix32((token * TOKEN_STRIDE + key) & _MASK32) ^ (key >> 32))


def gumbel(seed: int, position: int, token: int) -> float:
    """Gumbel noise of one token id, between -3.14 and 22.9: the reference for the vectorised form in `gumbel.py`."""
    return -math.log(-math.log((token_hash(stream_key(seed, position), token) + 0.5) / 2**32))
