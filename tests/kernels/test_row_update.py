"""The device's row table: diffs, decode and prefill batches, and what a token does to its row; against loops in plain torch."""

from __future__ import annotations

import random

import pytest
import torch

from llmos.kernels import row_table, row_update
from llmos.kernels.checks import KernelShapeError, KernelTypeError
from llmos.kernels.row_table import DeviceRows, DiffWriter

torch.set_num_threads(1)


def make_rows(max_rows=6, max_context=70, page_size=16):
    return DeviceRows("cpu", max_rows, max_context, page_size, max_stops=40, max_biases=3)


def apply(writer, rows):
    """Both ways; the kernel's result stays."""
    diff = writer.finish()
    other = rows.arena.clone()
    row_update.apply_diff(diff, rows)
    found = rows.arena.clone()
    rows.arena.copy_(other)
    row_update.apply_diff_reference(diff, rows)
    assert torch.equal(rows.arena, found)


def batch(size):
    """active, token_ids, positions, slots, context, filled with what must not stay."""
    outputs = {name: torch.full((size,), 77, dtype=torch.int32) for name in ("active", "token_ids", "positions")}
    return {**outputs, "slots": torch.full((size,), 77), "context": torch.full((size,), 77, dtype=torch.int32)}


def test_a_row_enters_grows_and_leaves():
    rows = make_rows()
    writer = DiffWriter(rows)
    writer.add(
        2,
        {row_table.TEMPERATURE: 0.5, row_table.PROMPT_LENGTH: 3, row_table.SEED_LOW: -1},
        pages=[4, 9],
        tokens=[11, 12, 13],
        stops=[5],
        biases=[(1, 0.25), (8, -2.0)],
    )
    writer.append_page(2, 2, 7)  # in the diff that adds it
    apply(writer, rows)
    record = rows.records[2]
    assert record[row_table.STATE] == row_table.LIVE
    assert [int(record[c]) for c in (row_table.LENGTH, row_table.NUM_PAGES, row_table.NUM_STOPS)] == [3, 3, 1]
    assert record[row_table.TEMPERATURE :][:1].view(torch.float32) == 0.5
    assert record[row_table.TOP_P :][:1].view(torch.float32) == 1.0
    assert int(record[row_table.TOP_K]) == row_table.NO_TOP_K
    assert rows.pages[2, :3].tolist() == [4, 9, 7]
    assert rows.tokens[2, :4].tolist() == [11, 12, 13, 0]
    assert rows.bias_ids[2].tolist() == [1, 8, 0]
    assert rows.bias_values[2].tolist() == [0.25, -2.0, 0.0]
    writer.append_page(2, 3, 1)
    writer.free(2)
    writer.add(2, {}, pages=[3], tokens=torch.tensor([1, 2], dtype=torch.int32).numpy().tobytes())
    apply(writer, rows)
    assert int(rows.records[2, row_table.STATE]) == row_table.LIVE  # freed and added again in one diff
    assert int(rows.records[2, row_table.LENGTH]) == 2
    writer.free(2)
    apply(writer, rows)
    assert int(rows.records[2, row_table.STATE]) == row_table.FREE
    assert writer.finish().tolist() == [0, 0, 0, 0]


def test_long_prompts_are_copied_in_pieces():
    rows = make_rows(2, 3000)
    writer = DiffWriter(rows)
    tokens = list(range(5, 2605))
    writer.add(1, {}, pages=list(range(163)), tokens=tokens)
    apply(writer, rows)
    assert rows.tokens[1, :2600].tolist() == tokens
    assert not rows.tokens[0].any()


def test_rows_beyond_32_bits(monkeypatch):
    """An arena of more than 2^31 words. It is not filled with zeros here, so only what is touched takes memory."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", torch.empty)
        rows = DeviceRows("cpu", 2100, 2**20, 64, max_stops=1, max_biases=1)
    assert rows.offset("tokens", 2099, 0) > 2**31
    writer = DiffWriter(rows)
    writer.add(2099, {row_table.PROMPT_LENGTH: 1}, pages=[2**22 - 1], tokens=[42])
    row_update.apply_diff(writer.finish(), rows)
    assert rows.tokens[2099, 0] == 42
    outputs = batch(1)
    row_update.prepare_decode(rows, torch.tensor([2099], dtype=torch.int32), **outputs)
    assert {name: int(value) for name, value in outputs.items()} == {
        "active": 2099, "token_ids": 42, "positions": 0, "slots": (2**22 - 1) * 64, "context": 1,
    }  # fmt: skip


def test_what_does_not_fit_is_refused():
    writer = DiffWriter(make_rows())
    with pytest.raises(KernelShapeError, match=r"pages has shape \[6, 6\], nothing at row 0, column 7"):
        writer.add(0, {}, pages=[1] * 8, tokens=[1])
    with pytest.raises(KernelShapeError, match="nothing at row 6"):
        writer.append_page(6, 0, 0)
    with pytest.raises(KernelTypeError, match="slots must be int64, is int32"):
        row_update.prepare_decode(
            make_rows(), torch.zeros(1, dtype=torch.int32), **{**batch(1), "slots": torch.zeros(1, dtype=torch.int32)}
        )


def filled_rows():
    """Rows in every state and at every edge: no page for the newest token, the last position of a page, a full context."""
    rows = make_rows()
    writer = DiffWriter(rows)
    lengths = {0: (1, [3]), 1: (16, [5]), 2: (17, [6]), 3: (70, [1, 2, 4, 8, 9]), 4: (17, [7, 2])}
    for row, (length, pages) in lengths.items():
        writer.add(row, {row_table.MAX_LENGTH: length + 2}, pages=pages, tokens=list(range(100, 100 + length)))
    apply(writer, rows)
    rows.records[4, row_table.STATE] = row_table.STOPPED
    return rows


@pytest.mark.parametrize("size", [1, 5, 130])
def test_prepare_decode(size):
    rows = filled_rows()
    rng = random.Random(size)
    chosen = [3, 1, 2, 4, 5, 0, -1]
    order = chosen[:size] if size < 10 else [rng.choice(chosen) for _ in range(size)]
    entries = torch.tensor(order, dtype=torch.int32)
    outputs = batch(size)
    row_update.prepare_decode(rows, entries, **outputs)
    for found, expected in zip(outputs.values(), row_update.prepare_decode_reference(rows, entries)):
        assert torch.equal(found, expected)
    assert int(outputs["slots"][0]) == (9 * 16 + 5 if order[0] == 3 else outputs["slots"][0])


def test_prepare_prefill():
    rows = filled_rows()
    row, start = torch.tensor([3, 4, 0], dtype=torch.int32), torch.tensor([0, 41, 60], dtype=torch.int32)
    length, position = torch.tensor([40, 17, 0], dtype=torch.int32), torch.tensor([30, 0, 0], dtype=torch.int32)
    token_ids, positions = torch.full((60,), -7, dtype=torch.int32), torch.full((60,), -7, dtype=torch.int32)
    slots = torch.full((60,), -1)
    row_update.prepare_prefill(
        rows, row, start, length, position, token_ids=token_ids, positions=positions, slots=slots
    )
    expected = [*list(range(130, 170)), -7, *list(range(100, 117)), -7, -7]
    assert token_ids.tolist() == expected
    assert positions[:40].tolist() == list(range(30, 70))
    pages = [1, 2, 4, 8, 9]
    assert slots.tolist() == (
        [pages[p // 16] * 16 + p % 16 for p in range(30, 70)]
        + [-1]
        + [[7, 2][p // 16] * 16 + p % 16 for p in range(17)]
        + [-1, -1]
    )


@pytest.mark.parametrize("stop_on_device", [True, False])
def test_advance(stop_on_device):
    rows = make_rows(8)
    writer = DiffWriter(rows)
    stops = list(range(200, 239))  # more than one block of the kernel
    for row in range(8):
        writer.add(row, {row_table.MAX_LENGTH: 9}, pages=[row], tokens=list(range(5 + (row == 3) * 3)), stops=stops)
    writer.set(6, row_table.MAX_LENGTH, 10**6)
    apply(writer, rows)
    rows.records[6, row_table.LENGTH] = 69
    active = torch.tensor([0, -1, 1, 2, 3, 4, 6], dtype=torch.int32)
    tokens = torch.tensor([9, 9, 200, 238, 9, -1, 9], dtype=torch.int32)
    other = rows.arena.clone()
    results = torch.full((7, 4), 77, dtype=torch.int32)
    row_update.advance(rows, active, tokens, results=results, stop_on_device=stop_on_device)
    found = rows.arena.clone()
    rows.arena.copy_(other)
    expected = row_update.advance_reference(rows, active, tokens, stop_on_device=stop_on_device)
    assert torch.equal(results, expected)
    assert torch.equal(found, rows.arena)
    stopped = row_table.STOPPED if stop_on_device else row_table.LIVE
    states = [row_table.LIVE, -1, stopped, stopped, row_table.FULL, row_table.FAILED, row_table.FULL]
    assert results[:, 3].tolist() == states
    assert results[0].tolist() == [0, 5, 9, row_table.LIVE]
    assert rows.tokens[0, 5] == 9
    assert int(rows.records[4, row_table.LENGTH]) == 5  # a failed row gets no token


def test_decode_steps_chain_on_the_device():
    """The token that a step samples is the input of the next one, until a stop token comes."""
    rows = make_rows()
    writer = DiffWriter(rows)
    writer.add(1, {row_table.MAX_LENGTH: 40}, pages=[2, 3], tokens=[50], stops=[53])
    apply(writer, rows)
    seen = []
    for token in (51, 52, 53, 54):
        outputs, results = batch(2), torch.zeros(2, 4, dtype=torch.int32)
        row_update.prepare_decode(rows, torch.tensor([-1, 1], dtype=torch.int32), **outputs)
        seen.append((int(outputs["token_ids"][1]), int(outputs["slots"][1]), int(outputs["context"][1])))
        row_update.advance(rows, outputs["active"], torch.tensor([0, token], dtype=torch.int32), results=results)
    assert seen == [(50, 32, 1), (51, 33, 2), (52, 34, 3), (0, -1, 0)]
    assert rows.tokens[1, :5].tolist() == [50, 51, 52, 53, 0]
