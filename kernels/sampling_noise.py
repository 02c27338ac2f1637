"""Sampling noise inside kernels: the counter-based hash of (seed, position, vocabulary id) that every backend shares.

In unsigned arithmetic: `key = mix64(seed XOR mix64(position XOR DOMAIN))`, then for a token id t
`h = mix32(mix32(t * STRIDE + low32(key)) XOR high32(key))`, and the uniform number is (h + 0.5) / 2^32: never 0, never 1.
`mix64` is the finaliser of SplitMix64 (Steele et al. 2014), `mix32` that of MurmurHash3 (Appleby 2011).
Gumbel noise is computed in float32 to about 1e-6; float64 everywhere would choose another token about once in a million.
"""

from __future__ import annotations

import triton
import triton.language as tl

DOMAIN = tl.constexpr(0x6C6C_6D6F_7300_0001)
STRIDE = tl.constexpr(0x9E37_79B1)
_MIX64_A, _MIX64_B, _MIX64_C = (
    tl.constexpr(n) for n in (0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB)
)
_MIX32_A, _MIX32_B = tl.constexpr(0x85EB_CA6B), tl.constexpr(0xC2B2_AE35)


@triton.jit
def mix64(value):  # type: ignore[no-untyped-def]
    value = value + _MIX64_A
    value = (value ^ (value >> 30)) * _MIX64_B
    value = (value ^ (value >> 27)) * _MIX64_C
    return value ^ (value >> 31)


@triton.jit
def mix32(value):  # type: ignore[no-untyped-def]
    value = (value ^ (value >> 16)) * _MIX32_A
    value = (value ^ (value >> 13)) * _MIX32_B
    return value ^ (value >> 16)


@triton.jit
def stream_key(seed_low, seed_high, position):  # type: ignore[no-untyped-def]
    """uint64 that all token ids of one choice share. The seed's halves and the position are int32."""
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    seed = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64) | high
    return mix64(seed ^ mix64(position.to(tl.uint64) ^ DOMAIN))


@triton.jit
def gumbel(key, token_ids):  # type: ignore[no-untyped-def]
    """float32 noise of int32 token ids."""
    hashes = mix32(mix32(token_ids.to(tl.uint32) * STRIDE + key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32))
    # -log(u) where u is near 1: from 1 - u, which the complement of the hash has in full precision, by the series of log(1 - x).
    rest = ((hashes ^ 0xFFFF_FFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = rest * (1.0 / 8.0) + 1.0 / 7.0
    series = series * rest + 1.0 / 6.0
    series = series * rest + 1.0 / 5.0
    series = series * rest + 1.0 / 4.0
    series = series * rest + 1.0 / 3.0
    series = series * rest + 1.0 / 2.0
    series = (series * rest + 1.0) * rest
    uniform = (hashes.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return -tl.log(tl.where(rest < 0.125, series, -tl.log(uniform)))
