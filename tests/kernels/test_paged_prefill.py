"""Paged prefill attention in the interpreter, against plain torch in float64, and against itself cut in other ways."""

from __future__ import annotations

import pytest
import torch
from paged_cases import assert_close, make_pages, randn, sparse_pool

from llmos.kernels.checks import KernelShapeError, KernelTypeError
from llmos.kernels.paged_prefill import paged_prefill
from llmos.kernels.reference import paged_prefill_reference

torch.set_num_threads(1)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def prefill(q, pages, chunks, rows=None, starts=None, **options):
    """chunks: (position, length) each."""
    lengths = [length for _, length in chunks]
    starts = starts or [sum(lengths[:index]) for index in range(len(lengths))]
    integers = [torch.tensor(column, dtype=torch.int32) for column in (starts, lengths, [at for at, _ in chunks])]
    inputs = (q, pages.k, pages.v, pages.table, pages.rows if rows is None else rows, *integers)
    options = {"scale": q.shape[-1] ** -0.5} | options
    out = torch.full_like(q, 7.0)
    assert paged_prefill(*inputs, out=out, **options) is out
    options.pop("descriptors", None)
    return out, paged_prefill_reference(*inputs, **options)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "groups", "page_size", "options"),
    [
        (F32, 64, 1, 16, {}),
        (F32, 128, 2, 16, {}),
        (F16, 80, 3, 16, {}),
        (F16, 96, 8, 32, {"softcap": 2.0}),
        (BF16, 128, 4, 64, {}),
        (F16, 256, 16, 128, {}),
        (F32, 64, 5, 16, {"softcap": 5.0, "window": 20}),
        (BF16, 64, 7, 32, {"window": 1}),
        (F32, 256, 2, 64, {"window": 40}),
        (F32, 64, 2, 16, {"scale": 30.0}),
    ],
)
def test_against_the_reference(dtype, head_dim, groups, page_size, options):
    """From the start and in the middle, around page boundaries, one token, none; NaN in everything that is not the sequence's own."""
    some = min(page_size, 20)
    chunks = [(0, 1), (0, some + 1), (page_size - 1, 2), (page_size, 0), (2 * page_size, 1), (page_size + 3, some)]
    kv_heads = 2 if groups == 2 and head_dim == 128 else 1
    window = options.get("window", 0)
    first = [max(0, position - window + 1) if window else 0 for position, _ in chunks]
    pages = make_pages(
        [position + length for position, length in chunks],
        first=first,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
    )
    tokens = sum(length for _, length in chunks)
    q = randn(tokens, groups * kv_heads + 2, head_dim, dtype=dtype)[:, 1:-1]
    assert_close(*prefill(q, pages, chunks, **options))


@pytest.mark.parametrize(("groups", "options"), [(2, {}), (16, {"window": 13, "softcap": 3.0}), (3, {"window": 30})])
def test_results_do_not_depend_on_chunks(groups, options):
    """Bit by bit: a prompt at once, in chunks beside another sequence, and token by token as a decoder would.

    The product that stands in for a GPU's here rounds a row as its place in the tile demands, so the numbers are such that no product is
    rounded: few bits each, and scores so close together that weights (in float16) have the same exponent or nearly.
    """
    length, small = 45, {"scale": 0.02}
    pages = make_pages([length, 20], kv_heads=1, head_dim=64, page_size=16, dtype=F16)
    for tensor in (pages.k, pages.v):
        tensor.copy_(tensor.clamp(-2, 2).mul(2).round().div(2))
    q, others = (randn(count, groups, 64, dtype=F16, seed=count).clamp(-2, 2).round() for count in (length, 9))
    row = pages.rows[:1]
    whole, expected = prefill(q, pages, [(0, length)], rows=row, **options | small)
    assert_close(whole, expected)
    position = 0
    for size in (7, 1, 21, 16):
        both = torch.cat([others, q[position : position + size]])
        out, _ = prefill(both, pages, [(11, 9), (position, size)], rows=pages.rows.flip(0), **options | small)
        assert torch.equal(out[9:], whole[position : position + size])
        position += size
    assert position == length
    some = list(range(0, length, 4))
    single, _ = prefill(q[some], pages, [(at, 1) for at in some], rows=row.repeat(len(some)), **options | small)
    assert torch.equal(single, whole[some])


def test_tensor_descriptors_load_the_same():
    pages = make_pages([20, 33], kv_heads=1, head_dim=80, page_size=16, dtype=F16)
    q, chunks = randn(17, 2, 80, dtype=F16), [(18, 2), (18, 15)]
    pointers, _ = prefill(q, pages, chunks)
    descriptors, _ = prefill(q, pages, chunks, descriptors=True)
    assert torch.equal(pointers, descriptors)


def test_several_blocks_of_queries():
    """More query tokens than one program takes, in sequences whose first tokens fall anywhere in a block."""
    chunks = [(3, 11), (0, 9), (20, 4), (7, 17)]
    pages = make_pages([at + length for at, length in chunks], kv_heads=1, head_dim=256, page_size=16, dtype=F32)
    assert_close(*prefill(randn(41, 4, 256, dtype=F32), pages, chunks))


def test_tokens_of_nobody_are_left_alone():
    pages = make_pages([4, 6], kv_heads=1, head_dim=64, page_size=16, dtype=F32)
    out, expected = prefill(randn(16, 1, 64, dtype=F32), pages, [(1, 3), (0, 6)], starts=[2, 7])
    owned = [*range(2, 5), *range(7, 13)]
    assert_close(out[owned], expected[owned])
    others = [token for token in range(16) if token not in owned]
    assert (out[others] == 7.0).all()


def test_nothing_to_do():
    pages = make_pages([4], kv_heads=1, head_dim=64, page_size=16, dtype=F32)
    out, _ = prefill(randn(0, 1, 64, dtype=F32), pages, [(4, 0)])
    assert out.shape == (0, 1, 64)


def test_forks_share_pages():
    """A shared prefix of a page and a half that one copied before it wrote on: the usual prefix hit."""
    pages = make_pages([16, 30, 30], kv_heads=1, head_dim=64, page_size=16, dtype=F32)
    a, b, c = pages.rows.tolist()
    pages.table[b, 0] = pages.table[c, 0] = pages.table[a, 0]
    assert_close(*prefill(randn(12, 2, 64, dtype=F32), pages, [(16, 0), (24, 6), (24, 6)]))


def test_pages_beyond_31_bits(monkeypatch):
    """Page numbers near 100,000 whose distance from the first is past 2^31 elements."""
    pool = sparse_pool(100_000, 4, 16, 64, F16, monkeypatch)
    ids = [99_999, 3, 99_000, 65_536]
    pages = make_pages([20, 30], kv_heads=4, head_dim=64, page_size=16, dtype=F16, pool=pool, page_ids=ids)
    assert ids[0] * pages.k.stride(0) > 2**31
    assert_close(*prefill(randn(25, 4, 64, dtype=F16), pages, [(10, 10), (15, 15)]))


def call(**changed):
    integers = torch.zeros(2, dtype=torch.int32)
    arguments = {
        "q": torch.zeros(5, 2, 64),
        "k_pages": torch.zeros(3, 1, 16, 64),
        "v_pages": torch.zeros(3, 1, 16, 64),
        "page_table": torch.zeros(2, 4, dtype=torch.int32),
        "rows": integers,
        "q_start": integers,
        "q_len": integers,
        "q_pos": integers,
        "scale": 0.1,
        "out": torch.zeros(5, 2, 64),
    }
    return paged_prefill(**arguments | changed)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("out", torch.zeros(5, 3, 64), KernelShapeError),
        ("q_pos", torch.zeros(3, dtype=torch.int32), KernelShapeError),
        ("v_pages", torch.zeros(3, 1, 16, 64)[:, :, ::2], KernelShapeError),
        ("k_pages", torch.zeros(3, 1, 16, 64, dtype=BF16), KernelTypeError),
        ("q_len", torch.zeros(2, dtype=torch.int64), KernelTypeError),
        ("scale", 0.0, KernelShapeError),
        ("window", -1, KernelShapeError),
    ],
)
def test_wrong_arguments(field, value, error):
    with pytest.raises(error, match=f"^{field} must") as caught:
        call(**{field: value})
    assert caught.value.field == field
