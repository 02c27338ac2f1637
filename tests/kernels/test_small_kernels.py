"""Norms, activation, RoPE with KV write and page copies against their float64 references, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from llmos.kernels import activation, int8_linear, kv_write, norms, page_copy
from llmos.kernels.checks import KernelShapeError, KernelTypeError
from llmos.services.executor.models.rope import Rope
from llmos.services.executor.spec import RopeSpec

torch.set_num_threads(1)

TYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative: about the type's rounding


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found, expected, dtype):
    scale = max(float(expected.abs().amax()), 1e-3) if expected.numel() else 1.0
    assert found.dtype == dtype
    assert (found.double() - expected).abs().amax() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 100), (2, 1024), (1, 2880)])
def test_norms(dtype, tokens, hidden):
    x, residual = randn(tokens, hidden, dtype=dtype), randn(tokens, hidden, dtype=dtype, seed=1)
    weight = randn(hidden, dtype=dtype, seed=2)
    out = norms.rms_norm(x, weight, 1e-5, out=torch.empty_like(x))
    assert_close(out, norms.rms_norm_reference(x, weight, 1e-5), dtype)
    total, normed = norms.add_rms_norm_reference(x, residual, weight, 1e-5)
    norms.add_rms_norm(x, residual, weight, 1e-5, out=x)  # in place
    assert_close(residual, total.double(), dtype)
    assert_close(x, normed, dtype)


def test_norms_between_gaps_and_without_tokens():
    padded = randn(4, 80)
    x, untouched = padded[:, :70], padded[:, 70:].clone()
    expected = norms.rms_norm_reference(x, torch.ones(70), 1e-6)
    norms.rms_norm(x, torch.ones(70), 1e-6, out=x)
    assert_close(x, expected, torch.float32)
    assert torch.equal(padded[:, 70:], untouched)
    norms.rms_norm(x[:0], torch.ones(70), 1e-6, out=x[:0])


def test_the_norm_is_torchs():
    x, weight = randn(3, 96), randn(96, seed=1)
    expected = torch.nn.functional.rms_norm(x, (96,), weight, 1e-5)
    assert torch.allclose(norms.rms_norm(x, weight, 1e-5, out=torch.empty_like(x)), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (2, 1500), (3, 64)])
def test_silu_mul(dtype, tokens, width):
    gate_up = randn(tokens, 2 * width + 5, dtype=dtype)[:, : 2 * width] * 4
    out = activation.silu_mul(gate_up, out=torch.empty(tokens, width, dtype=dtype))
    assert_close(out, activation.silu_mul_reference(gate_up), dtype)


def test_silu_mul_at_the_ends():
    """Large negative gates give 0, large positive ones themselves; no infinity over infinity."""
    gate_up = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1.0, 1.0, 1.0, 1.0]])
    assert activation.silu_mul(gate_up, out=torch.empty(1, 4)).tolist() == [
        [0.0, pytest.approx(0.0, abs=1e-30), 0.0, 100.0]
    ]


def pages_of(num_pages, kv_heads, page_size, head_dim, dtype):
    """A pool of two layers, all layers of a page together, and the second layer's K and V."""
    pool = torch.full((num_pages, 2, 2, kv_heads, page_size, head_dim), 7.0, dtype=dtype)
    return pool, pool[:, 1, 0], pool[:, 1, 1]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "dtype", "kv_dtype"),
    [
        (1, 1, 64, 16, torch.float32, torch.float32),
        (9, 3, 80, 16, torch.float32, torch.float32),
        (10, 9, 96, 16, torch.float16, torch.float16),
        (16, 8, 128, 64, torch.bfloat16, torch.bfloat16),
        (2, 1, 256, 16, torch.float32, torch.bfloat16),
    ],
)
def test_rope_and_write(heads, kv_heads, head_dim, page_size, dtype, kv_dtype, norm):
    slots = torch.tensor([page_size - 1, -1, 2 * page_size, 0])  # the end of a page, nothing, the start of one
    positions = torch.tensor([4095, 9, 0, 1], dtype=torch.int32)
    qkv = randn(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    weights = [randn(head_dim, dtype=dtype, seed=seed) if norm else None for seed in (1, 2)]
    rope = Rope(RopeSpec("default", 10000.0), head_dim)
    cos_sin = kv_write.rope_table(rope.frequencies, rope.scale, 4096)
    found, k, v = pages_of(3, kv_heads, page_size, head_dim, kv_dtype)
    expected, k_expected, v_expected = pages_of(3, kv_heads, page_size, head_dim, kv_dtype)
    q_expected = kv_write.rope_and_write_reference(
        qkv, positions, slots, cos_sin, k_expected, v_expected,
        num_heads=heads, q_norm=weights[0], k_norm=weights[1], eps=1e-5,
    )  # fmt: skip
    q = torch.full((4, heads, head_dim), 7.0, dtype=dtype)
    kv_write.rope_and_write(
        qkv, positions, slots, cos_sin, k, v, q_norm=weights[0], k_norm=weights[1], eps=1e-5, q_out=q
    )
    assert_close(q[slots >= 0], q_expected[slots >= 0], dtype)
    assert (q[1] == 7.0).all()
    assert_close(found, expected.double(), kv_dtype)
    assert torch.equal(found == 7.0, expected == 7.0)  # nothing else is written


def test_rope_is_the_executors():
    """Against `models/rope.py`, with q in place."""
    rope = Rope(RopeSpec("default", 10000.0), 64)
    positions = torch.tensor([0, 5, 1000], dtype=torch.int32)
    cos, sin = rope.at(positions.long())
    qkv = randn(3, 4 * 64)
    q, k, v = qkv.view(3, 4, 64).clone().split((2, 1, 1), 1)
    expected = [x * cos + torch.roll(x, 32, -1) * sin for x in (q, k)]
    _, k_pages, v_pages = pages_of(1, 1, 16, 64, torch.float32)
    cos_sin = kv_write.rope_table(rope.frequencies, rope.scale, 1001)
    queries = qkv[:, :128].view(3, 2, 64)
    kv_write.rope_and_write(qkv, positions, torch.tensor([1, 2, 3]), cos_sin, k_pages, v_pages, q_out=queries)
    assert torch.allclose(queries, expected[0], atol=1e-5)
    assert torch.allclose(k_pages[0, 0, 1:4], expected[1][:, 0], atol=1e-5)
    assert torch.equal(v_pages[0, 0, 1:4], v[:, 0])


def test_slots_beyond_32_bits():
    """100,000 pages of 16 KiB a head: the last one starts past 2^31 elements. Only what is touched takes memory."""
    num_pages, page_stride = 100_001, 2 * 128 * 128
    pool = torch.empty(num_pages * page_stride, dtype=torch.float16)
    pages = pool.view(num_pages, 2, 1, 128, 128)
    assert pages[-1].storage_offset() > 2**31
    k_pages, v_pages = pages[:, 0], pages[:, 1]
    v_pages[num_pages - 1].zero_()
    slot = num_pages * 128 - 1
    qkv = randn(1, 3 * 128, dtype=torch.float16)
    cos_sin = torch.cat((torch.ones(1, 64), torch.zeros(1, 64)), 1)
    position = torch.zeros(1, dtype=torch.int32)
    q = torch.empty(1, 1, 128, dtype=torch.float16)
    kv_write.rope_and_write(qkv, position, torch.tensor([slot]), cos_sin, k_pages, v_pages, q_out=q)
    assert torch.equal(k_pages[num_pages - 1, 0, 127], qkv[0, 128:256])
    assert torch.equal(v_pages[num_pages - 1, 0, 127], qkv[0, 256:])
    page_copy.copy_pages(pages, pages, torch.tensor([[num_pages - 1, 3]], dtype=torch.int32))
    assert torch.equal(pages[3, 1, 0, 127], qkv[0, 256:])
    page_copy.zero_slots(pages.view(num_pages, 1, 2, 1, 128, 128), torch.tensor([slot]))
    assert not pages[num_pages - 1, :, 0, 127].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_copies_and_zeros(dtype):
    pool = randn(6, 2, 2, 3, 16, 20, dtype=dtype)
    staging = randn(4, 2, 2, 3, 16, 20, dtype=dtype, seed=1)
    moves = [
        (pool, pool, [[0, 5], [-1, 1], [2, -1], [0, 4]]),
        (pool, staging, [[5, 0], [3, 3]]),
        (staging, pool, [[1, 2]]),
    ]
    for source, target, pairs in moves:
        expected = (source if source is not target else target).clone()
        expected_target = expected if source is target else target.clone()
        page_copy.copy_pages_reference(expected, expected_target, torch.tensor(pairs))
        page_copy.copy_pages(source, target, torch.tensor(pairs, dtype=torch.int32))
        assert torch.equal(target, expected_target)
    expected = pool.clone()
    pages, slots = torch.tensor([1, -1, 3], dtype=torch.int32), torch.tensor([0, -1, 47, 80])
    page_copy.zero_pages_reference(expected, pages)
    page_copy.zero_slots_reference(expected, slots)
    page_copy.zero_pages(pool, pages)
    page_copy.zero_slots(pool, slots)
    assert torch.equal(pool, expected)
    page_copy.copy_pages(pool, pool, torch.empty(0, 2, dtype=torch.int32))


def test_wrong_arguments_are_named():
    x = torch.zeros(2, 8)
    with pytest.raises(KernelShapeError, match=r"weight must have shape \[hidden=8\], has \[7\]"):
        norms.rms_norm(x, torch.zeros(7), 1e-6, out=x)
    with pytest.raises(KernelTypeError, match="out must be float32, is float16"):
        norms.rms_norm(x, torch.zeros(8), 1e-6, out=x.half())
    with pytest.raises(KernelShapeError, match="residual must have no gaps"):
        norms.add_rms_norm(x, torch.zeros(8, 2).T, torch.zeros(8), 1e-6, out=x)
    with pytest.raises(KernelTypeError, match="weight must be on cpu as the other tensors, is on meta"):
        norms.rms_norm(x, torch.zeros(8, device="meta"), 1e-6, out=x)
    with pytest.raises(KernelShapeError, match="width of gate_up must be one of 8, is 10"):
        activation.silu_mul(torch.zeros(2, 10), out=torch.zeros(2, 4))
    with pytest.raises(KernelShapeError, match=r"target must have shape \[target_pages, 3, 4\], has \[1, 3, 5\]"):
        page_copy.copy_pages(torch.zeros(1, 3, 4), torch.zeros(1, 3, 5), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(KernelShapeError, match="bytes of a page % 8 must be one of 0, is 4"):
        page_copy.zero_pages(torch.zeros(4, 3), torch.zeros(1, dtype=torch.int32))


def test_wrong_projections_are_named():
    _, k, v = pages_of(1, 1, 16, 64, torch.float32)
    given = {
        "positions": torch.zeros(2, dtype=torch.int32),
        "slots": torch.zeros(2, dtype=torch.int64),
        "cos_sin": torch.zeros(9, 64),
        "k_pages": k,
        "v_pages": v,
        "q_out": torch.zeros(2, 2, 64),
    }
    with pytest.raises(KernelShapeError, match="width of qkv must be one of 256, is 200"):
        kv_write.rope_and_write(torch.zeros(2, 200), **given)
    with pytest.raises(KernelTypeError, match="slots must be int64, is int32"):
        kv_write.rope_and_write(torch.zeros(2, 256), **{**given, "slots": given["positions"]})
    with pytest.raises(KernelShapeError, match="q_norm and k_norm must be given both"):
        kv_write.rope_and_write(torch.zeros(2, 256), **given, q_norm=torch.ones(64))


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "dtype", "bias"),
    [
        (1, 100, 33, torch.float32, False),
        (3, 256, 40, torch.float16, True),
        (70, 130, 7, torch.float32, True),
        (2, 64, 64, torch.bfloat16, False),
    ],
)
def test_int8_linear(tokens, inputs, outputs, dtype, bias):
    x, original = randn(tokens, inputs + 3, dtype=dtype)[:, :inputs], randn(outputs, inputs, seed=1)
    original[0] = 0.0
    weight, scales = int8_linear.quantize_int8(original)
    assert weight.abs().amax() == 127
    assert ((weight * scales[:, None] - original).abs() <= scales[:, None] * 0.5001).all()
    shift = randn(outputs, dtype=dtype, seed=2) if bias else None
    out = int8_linear.int8_linear(x, weight, scales, bias=shift, out=torch.empty(tokens, outputs, dtype=dtype))
    assert_close(out, int8_linear.int8_linear_reference(x, weight, scales, shift), dtype)
