"""Paged decode attention in the interpreter, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from paged_cases import assert_close, make_pages, randn, sparse_pool

from llmos.kernels.checks import KernelShapeError, KernelTypeError
from llmos.kernels.decode_plan import DecodePlan
from llmos.kernels.paged_decode import paged_decode
from llmos.kernels.reference import paged_decode_reference

torch.set_num_threads(1)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def make_plan(batch, groups, kv_heads, head_dim, page_size, programs=5, **options):
    shape = {"num_heads": groups * kv_heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    return DecodePlan("cpu", batch, num_programs=programs, **{"min_pages": 1} | shape | options)


def decode(q, pages, context, plan, rows=None, **options):
    rows = pages.rows if rows is None else rows
    context = torch.tensor(context, dtype=torch.int32)
    plan.prepare(rows, context)
    call = {"scale": q.shape[-1] ** -0.5, "window": plan.window} | options
    out = torch.full_like(q, float("nan"))
    assert paged_decode(q, pages.k, pages.v, pages.table, rows, context, plan=plan, out=out, **call) is out
    assert not plan.counters.any()
    call.pop("descriptors", None)
    expected = paged_decode_reference(q, pages.k, pages.v, pages.table, rows, context, **call)
    return out, expected


def first_visible(lengths, window):
    return [max(0, length - window) if window else 0 for length in lengths]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "groups", "page_size", "options", "plan_options"),
    [
        (F32, 64, 1, 16, {}, {"programs": 1}),
        (F32, 128, 2, 16, {}, {"programs": 30}),
        (F16, 80, 3, 16, {}, {}),
        (F16, 96, 8, 32, {"softcap": 2.0}, {}),
        (BF16, 128, 4, 64, {}, {"programs": 7}),
        (F32, 256, 16, 128, {}, {"programs": 4}),
        (F32, 64, 5, 16, {"softcap": 5.0}, {"window": 20}),
        (BF16, 64, 7, 32, {}, {"window": 1}),
        (F32, 256, 2, 64, {}, {"window": 40, "programs": 9}),
        (F32, 64, 4, 16, {}, {"deterministic": True, "split_pages": 1, "max_splits": 3}),
        (F16, 80, 2, 16, {}, {"deterministic": True, "split_pages": 2, "window": 50, "programs": 20}),
        (F32, 64, 2, 16, {"scale": 30.0}, {}),
    ],
)
def test_against_the_reference(dtype, head_dim, groups, page_size, options, plan_options):
    """Lengths around page boundaries, an inactive entry among them, and NaN in everything that no entry may look at."""
    lengths = [1, page_size - 1, page_size, 0, page_size + 1, 3 * page_size + 2]
    kv_heads = 2 if page_size == 16 else 1
    window = plan_options.get("window", 0)
    shape = {"kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size, "dtype": dtype}
    pages = make_pages(lengths, first=first_visible(lengths, window), **shape)
    plan = make_plan(len(lengths), groups, kv_heads, head_dim, page_size, **plan_options)
    # As a slice of a fused projection: gaps between tokens.
    q = randn(len(lengths), groups * kv_heads + 2, head_dim, dtype=dtype)[:, 1:-1]
    out, expected = decode(q, pages, lengths, plan, **options)
    assert_close(out, expected)
    assert not out[3].any()


def test_many_programs_on_one_long_sequence():
    pages = make_pages([150], kv_heads=1, head_dim=64, page_size=16, dtype=F32)
    q = randn(1, 1, 64, dtype=F32)
    for programs in (9, 100):  # every page a part of its own; more programs than pages
        assert_close(*decode(q, pages, [150], make_plan(1, 1, 1, 64, 16, programs)))


@pytest.mark.parametrize(("head_dim", "page_size"), [(80, 16), (256, 64)])
def test_tensor_descriptors_load_the_same(head_dim, page_size):
    lengths = [page_size + 1, 3 * page_size - 1]
    pages = make_pages(lengths, kv_heads=2, head_dim=head_dim, page_size=page_size, dtype=F16)
    q, plan = randn(2, 4, head_dim, dtype=F16), make_plan(2, 2, 2, head_dim, page_size)
    pointers, _ = decode(q, pages, lengths, plan)
    descriptors, _ = decode(q, pages, lengths, plan, descriptors=True)
    assert torch.equal(pointers, descriptors)


def test_only_inactive_entries():
    pages = make_pages([5, 5], kv_heads=1, head_dim=64, page_size=16, dtype=F32)
    rows = torch.full((2,), 2**31 - 1, dtype=torch.int32)  # no such row: it must not be looked at
    out, _ = decode(randn(2, 1, 64, dtype=F32), pages, [0, 0], make_plan(2, 1, 1, 64, 16), rows=rows)
    assert not out.any()


def test_one_plan_serves_step_after_step():
    """As a graph does it: the same plan, other lengths and fewer entries; nothing of an earlier step is left."""
    lengths = [40, 17, 60]
    pages = make_pages(lengths, kv_heads=1, head_dim=64, page_size=16, dtype=F32)
    plan = make_plan(8, 2, 1, 64, 16, programs=6)
    owned = [plan.entries.data_ptr(), plan.programs.data_ptr(), plan.partials.data_ptr()]
    q = randn(3, 2, 64, dtype=F32)
    first, expected = decode(q, pages, lengths, plan)
    assert_close(first, expected)
    assert_close(*decode(q[:2], pages, [33, 0], plan, rows=pages.rows[:2]))
    again, _ = decode(q, pages, lengths, plan)
    assert torch.equal(first, again)
    assert [plan.entries.data_ptr(), plan.programs.data_ptr(), plan.partials.data_ptr()] == owned


@pytest.mark.parametrize("window", [0, 45])
def test_deterministic_entries_do_not_depend_on_their_batch(window):
    lengths = [70, 1, 33, 100]
    pages = make_pages(lengths, kv_heads=1, head_dim=64, page_size=16, dtype=F32, first=first_visible(lengths, window))
    q = randn(4, 2, 64, dtype=F32)
    options = {"deterministic": True, "split_pages": 2, "max_splits": 3, "window": window}
    together, expected = decode(q, pages, lengths, make_plan(4, 2, 1, 64, 16, 5, **options))
    assert_close(together, expected)
    for entry, programs in ((0, 1), (3, 13)):
        alone, _ = decode(
            q[entry : entry + 1],
            pages,
            lengths[entry : entry + 1],
            make_plan(1, 2, 1, 64, 16, programs, **options),
            rows=pages.rows[entry : entry + 1],
        )
        assert torch.equal(alone[0], together[entry])
    order = torch.tensor([2, 0, 3, 1])
    shuffled, _ = decode(
        q[order], pages, [33, 70, 100, 1], make_plan(4, 2, 1, 64, 16, 3, **options), rows=pages.rows[order]
    )
    assert torch.equal(shuffled, together[order])


def test_forks_share_pages():
    pages = make_pages([32, 37, 40], kv_heads=1, head_dim=64, page_size=16, dtype=F32)
    a, b, c = pages.rows.tolist()
    pages.table[b, :2] = pages.table[a, :2]
    pages.table[c, :2] = pages.table[a, :2]
    assert_close(*decode(randn(3, 2, 64, dtype=F32), pages, [32, 37, 40], make_plan(3, 2, 1, 64, 16)))


def test_pages_beyond_31_bits(monkeypatch):
    """Page numbers near 100,000 whose distance from the first is past 2^31 elements."""
    pool = sparse_pool(100_000, 4, 16, 64, F16, monkeypatch)
    ids = [99_999, 3, 99_000, 65_536]
    pages = make_pages([20, 30], kv_heads=4, head_dim=64, page_size=16, dtype=F16, pool=pool, page_ids=ids)
    assert ids[0] * pages.k.stride(0) > 2**31
    assert_close(*decode(randn(2, 4, 64, dtype=F16), pages, [20, 30], make_plan(2, 1, 4, 64, 16)))


@pytest.mark.parametrize(
    ("lengths", "programs", "kv_heads", "window", "min_pages"),
    [
        ([1, 16, 17, 0, 100], 7, 2, 0, 1),
        ([1], 9, 4, 0, 1),
        ([40] * 33, 150, 1, 0, 1),
        ([1000, 3, 0, 0, 500], 12, 3, 64, 1),
        ([300, 200], 50, 2, 0, 4),
    ],
)
def test_the_work_list(lengths, programs, kv_heads, window, min_pages):
    plan = make_plan(64, 1, kv_heads, 64, 16, programs, window=window, min_pages=min_pages)
    rows = torch.arange(len(lengths), dtype=torch.int32) + 7
    plan.prepare(rows, torch.tensor(lengths, dtype=torch.int32))
    units = [
        max(1, -(-length // 16) - (max(0, length - window) // 16 if window else 0)) * kv_heads for length in lengths
    ]
    starts = [sum(units[:entry]) for entry in range(len(units))]
    total = sum(units)
    active = min(max(total // min_pages, 1), programs)
    line = 0
    for program, (entry, first_unit, context, row, begin, end, all_units, working) in enumerate(plan.programs.tolist()):
        assert (all_units, working) == (total, active)
        if program >= active:
            assert begin == end
            continue
        assert begin == line
        assert end - begin in (total // active, total // active + 1)
        assert starts[entry] <= begin < starts[entry] + units[entry]
        assert (first_unit, context) == (starts[entry], lengths[entry])
        assert row == (7 + entry if lengths[entry] else 0)
        line = end
    assert line == total


def call(**changed):
    """A call of zeros that nothing is wrong with, except for what is changed."""
    plan = make_plan(2, 2, 1, 64, 16)
    plan.prepare(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    arguments = {
        "q": torch.zeros(2, 2, 64),
        "k_pages": torch.zeros(3, 1, 16, 64),
        "v_pages": torch.zeros(3, 1, 16, 64),
        "page_table": torch.zeros(2, 4, dtype=torch.int32),
        "rows": torch.zeros(2, dtype=torch.int32),
        "context": torch.zeros(2, dtype=torch.int32),
        "scale": 0.1,
        "plan": plan,
        "out": torch.zeros(2, 2, 64),
    }
    return paged_decode(**arguments | changed)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("q", torch.zeros(2, 3, 64), r"q must have shape \[batch=2, heads=2, head_dim=64\], has \[2, 3, 64\]"),
        ("q", torch.zeros(3, 2, 64), "q must have shape"),
        ("k_pages", torch.zeros(3, 1, 32, 64), "k_pages must have shape .*page_size=16"),
        ("v_pages", torch.zeros(4, 1, 16, 64), "v_pages must have shape .num_pages=3"),
        ("k_pages", torch.zeros(3, 1, 32, 64)[:, :, ::2], "k_pages must have no gaps in its last 3 dimensions"),
        ("q", torch.zeros(2, 64, 2).transpose(1, 2), "q must have no gaps in its last 1"),
        ("scale", -1.0, "scale must be from"),
        ("window", 16, "window must be one of 0, is 16"),
        ("softcap", -1.0, "softcap must be from 0.0"),
    ],
)
def test_wrong_shapes(field, value, message):
    with pytest.raises(KernelShapeError, match=message) as caught:
        call(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("q", torch.zeros(2, 2, 64, dtype=torch.float64), "q must be float32 or float16 or bfloat16, is float64"),
        ("k_pages", torch.zeros(3, 1, 16, 64, dtype=F16), "k_pages must be float32, is float16"),
        ("rows", torch.zeros(2, dtype=torch.int64), "rows must be int32, is int64"),
        ("context", [1, 2], "context must be a tensor, is list"),
        ("out", torch.zeros(2, 2, 64, device="meta"), "out must be on cpu as the other tensors, is on meta"),
    ],
)
def test_wrong_types(field, value, message):
    with pytest.raises(KernelTypeError, match=message) as caught:
        call(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("page_size", {"page_size": 48}),
        ("head_dim", {"head_dim": 72}),
        ("max_batch", {"batch": 0}),
        ("num_heads / num_kv_heads", {"groups": 17}),
    ],
)
def test_plans_that_are_not_supported(field, changed):
    with pytest.raises(KernelShapeError, match=f"^{field} must be") as caught:
        make_plan(**{"batch": 1, "groups": 1, "kv_heads": 1, "head_dim": 64, "page_size": 16} | changed)
    assert caught.value.field == field


def test_more_entries_than_planned():
    with pytest.raises(KernelShapeError, match="batch must be from 1 to 2, is 3"):
        make_plan(2, 1, 1, 64, 16).prepare(torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
