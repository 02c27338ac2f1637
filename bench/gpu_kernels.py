"""Every kernel against its float64 reference on random inputs, and its share of its floor. Parts "copy", "matmul", "kernels", "attention".

A check compares on the device's own numbers with tolerances of their type; `checks` lists each with its largest error. A share is the
bytes that must move over the measured time, over the measured copy bandwidth (or FLOP over the matrix rate, for prompts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_world import LLAMA_1B, LLAMA_8B, QWEN, TINY, ModelShape, World, say, seconds

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def copy(world: World) -> dict[str, Any]:
    """Bytes read and written a second by one large copy of random numbers."""
    import torch

    size = (1 << 20) if world.dry else (1 << 32)
    source = torch.empty(size // 4, dtype=torch.float32, device=world.device).normal_()
    target = torch.empty_like(source)
    took = seconds(world, lambda: target.copy_(source))
    say(f"  copy: {2 * size / took / 1e12:.3f} TB/s")
    return {"bytes": size, "bytes_per_s": 2 * size / took}


def matmul(world: World) -> dict[str, Any]:
    """FLOP a second of a large product, and how fast the models' matrices are read by few rows."""
    import torch

    size = 128 if world.dry else 8192
    dtype = torch.bfloat16 if world.is_cuda else torch.float32

    def product(rows: int, columns: int, inner: int) -> float:
        # As many matrices as make 256 MiB, so that none is found in a cache.
        count = 1 if world.dry else max(1, (1 << 28) // (columns * inner * 2))
        x = torch.randn(rows, inner, device=world.device, dtype=dtype)
        weights = [torch.randn(columns, inner, device=world.device, dtype=dtype) for _ in range(count)]
        out = torch.empty(rows, columns, device=world.device, dtype=dtype)

        def work() -> None:
            for weight in weights:
                torch.mm(x, weight.t(), out=out)

        return seconds(world, work) / count

    took = product(size, size, size)
    say(f"  matmul {size}: {2 * size**3 / took / 1e12:.1f} TFLOP/s")
    thin = []
    for shape in (TINY,) if world.dry else (QWEN, LLAMA_8B):
        for rows in (1, 4) if world.dry else (1, 16, 64, 256):
            for columns, inner in ((2 * shape.ffn, shape.hidden), (shape.hidden, shape.ffn)):
                if world.late():
                    break
                each = product(rows, columns, inner)
                share = columns * inner * 2 / each / world.bandwidth
                thin.append({"rows": rows, "columns": columns, "inner": inner, "us": each * 1e6, "share": share})
    return {"size": size, "flop_per_s": 2 * size**3 / took, "thin": thin}


# ---------------------------------------------------------------- checks


class Checks:
    """Collects comparisons; the worst of each name stays."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.found: dict[str, dict[str, Any]] = {}

    def close(self, name: str, actual: Any, expected: Any, dtype: Any) -> None:
        """Elements of `actual` against float64, relative to the largest where they are small."""
        error = (actual.double() - expected.double()).abs().max() / max(1.0, float(expected.abs().max()))
        self._note(name, float(error), TOLERANCE[str(dtype).removeprefix("torch.")])

    def same(self, name: str, actual: Any, expected: Any) -> None:
        import torch

        self._note(name, 0.0 if torch.equal(actual.cpu().long(), expected.cpu().long()) else 1.0, 0.0)

    def _note(self, name: str, error: float, tolerance: float) -> None:
        before = self.found.get(name, {"error": 0.0})
        worst = max(error, before["error"]) if error == error else error
        self.found[name] = {"error": worst, "tolerance": tolerance, "ok": worst <= tolerance}
        if not worst <= tolerance:
            say(f"  WRONG: {name}: error {error}, tolerance {tolerance}")


def kernels(world: World) -> dict[str, Any]:
    """Part "kernels": checks of all of them, then the small ones' shares."""
    import torch

    checks = Checks(world)
    for dtype in (torch.float32,) if world.dry else (torch.bfloat16, torch.float16, torch.float32):
        _check_rows(checks, dtype)
        _check_attention(checks, dtype)
    _check_table(checks)
    _check_sampling(checks)
    wrong = [name for name, entry in checks.found.items() if not entry["ok"]]
    say(f"  {len(checks.found)} checks, {len(wrong)} wrong")
    return {"checks": checks.found, "wrong": wrong, "small": [] if world.dry else _small(world)}


def _check_rows(checks: Checks, dtype: Any) -> None:
    """Norms, activation, rotation with the write into pages, and the fixed product."""
    import torch

    from llmos.kernels.activation import silu_mul, silu_mul_reference
    from llmos.kernels.fixed_matmul import fixed_matmul, fixed_matmul_reference
    from llmos.kernels.kv_write import rope_and_write, rope_and_write_reference, rope_table
    from llmos.kernels.norms import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

    device, dry = checks.world.device, checks.world.dry
    tokens, hidden, heads, kv_heads, head_dim, size = (3, 40, 4, 2, 16, 16) if dry else (67, 1024, 16, 8, 128, 64)
    name = str(dtype).removeprefix("torch.")

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

    x, weight = normal(tokens, hidden), normal(hidden)
    checks.close(
        f"rms_norm {name}",
        rms_norm(x, weight, 1e-6, out=torch.empty_like(x)),
        rms_norm_reference(x, weight, 1e-6),
        dtype,
    )
    residual, added = normal(tokens, hidden), normal(tokens, hidden)
    total, normed = add_rms_norm_reference(added, residual, weight, 1e-6)
    out = add_rms_norm(added, residual, weight, 1e-6, out=torch.empty_like(x))
    checks.close(f"add_rms_norm {name}", out, normed, dtype)
    checks.close(f"add_rms_norm residual {name}", residual, total, dtype)
    gate_up = normal(tokens, 2 * hidden)
    checks.close(f"silu_mul {name}", silu_mul(gate_up, out=torch.empty_like(x)), silu_mul_reference(gate_up), dtype)
    columns = normal(33, hidden)
    product = fixed_matmul(x, columns, out=torch.empty(tokens, 33, device=device, dtype=dtype))
    checks.close(f"fixed_matmul {name}", product, fixed_matmul_reference(x, columns), dtype)
    alone = fixed_matmul(x[1:2], columns, out=torch.empty(1, 33, device=device, dtype=dtype))
    checks.close(f"fixed_matmul alone {name}", alone, product[1:2], torch.float32)
    qkv = normal(tokens, (heads + 2 * kv_heads) * head_dim)
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    table = rope_table(frequencies, 1.0, 512)
    positions = torch.arange(tokens, device=device, dtype=torch.int32) * 7
    slots = torch.randperm(4 * size, device=device)[:tokens].long()
    norms = {"q_norm": normal(head_dim), "k_norm": normal(head_dim)}
    ours, theirs = (torch.zeros(2, 4, kv_heads, size, head_dim, device=device, dtype=dtype) for _ in range(2))
    q = torch.empty(tokens, heads, head_dim, device=device, dtype=dtype)
    rope_and_write(qkv, positions, slots, table, ours[0], ours[1], **norms, q_out=q)
    expected = rope_and_write_reference(qkv, positions, slots, table, theirs[0], theirs[1], num_heads=heads, **norms)
    checks.close(f"rope_and_write q {name}", q, expected, dtype)
    checks.close(f"rope_and_write pages {name}", ours, theirs, dtype)


def _check_attention(checks: Checks, dtype: Any) -> None:
    """Both attention kernels over head sizes, groups and lengths around page ends; what is behind them is NaN."""
    import torch

    from llmos.kernels.paged_decode import paged_decode
    from llmos.kernels.paged_prefill import paged_prefill
    from llmos.kernels.reference import paged_decode_reference, paged_prefill_reference

    world, name = checks.world, str(dtype).removeprefix("torch.")
    cases = (
        [(4, 2, 64, 16)]
        if world.dry
        else [(16, 8, 128, 64), (32, 8, 64, 64), (32, 8, 128, 64), (8, 1, 96, 16), (4, 4, 80, 32), (8, 2, 256, 128)]
    )
    for heads, kv_heads, head_dim, size in cases:
        lengths = [1, size, size + 1, 0] if world.dry else [1, size - 1, size, size + 1, 5 * size, 0, 777, 3000]
        pages = _Pages(world, dtype, lengths, kv_heads, head_dim, size)
        q = torch.randn(len(lengths), heads, head_dim, device=world.device).to(dtype)
        for window in (0, 40):
            for deterministic in (False,) if world.dry else (False, True):
                plan = decode_plan(world, len(lengths), heads, kv_heads, head_dim, size, dtype, window, deterministic)
                plan.prepare(pages.rows, pages.context)
                out = torch.empty_like(q)
                paged_decode(
                    q, *pages.kv, pages.table, pages.rows, pages.context, scale=0.1, window=window, plan=plan, out=out
                )
                expected = paged_decode_reference(
                    q, *pages.kv, pages.table, pages.rows, pages.context, scale=0.1, window=window
                )
                checks.close(f"paged_decode d={head_dim} {name}", out, expected, dtype)
            counts = [min(length, 37) for length in lengths]
            total = sum(counts)
            starts = [sum(counts[:i]) for i in range(len(counts))]
            firsts = [length - count for length, count in zip(lengths, counts)]
            chunk = [
                torch.tensor(values, dtype=torch.int32, device=world.device) for values in (starts, counts, firsts)
            ]
            q2 = torch.randn(total, heads, head_dim, device=world.device).to(dtype)
            out = torch.zeros_like(q2)
            paged_prefill(q2, *pages.kv, pages.table, pages.rows, *chunk, scale=0.1, window=window, out=out)
            expected = paged_prefill_reference(q2, *pages.kv, pages.table, pages.rows, *chunk, scale=0.1, window=window)
            checks.close(f"paged_prefill d={head_dim} {name}", out, expected, dtype)


class _Pages:
    """Random K and V of sequences of these lengths on shuffled pages, NaN behind their ends."""

    def __init__(self, world: World, dtype: Any, lengths: list[int], kv_heads: int, head_dim: int, size: int) -> None:
        import torch

        each = max(1, -(-max(lengths) // size))
        shape = (len(lengths) * each + 3, kv_heads, size, head_dim)
        self.kv = tuple(torch.randn(shape, device=world.device).to(dtype) for _ in range(2))
        order = torch.randperm(shape[0], device=world.device)[: len(lengths) * each]
        self.table = order.view(len(lengths), each).int()
        self.rows = torch.arange(len(lengths), device=world.device, dtype=torch.int32)
        self.context = torch.tensor(lengths, device=world.device, dtype=torch.int32)
        for row, length in enumerate(lengths):
            for tensor in self.kv:
                if length % size:
                    tensor[self.table[row, length // size].long(), :, length % size :] = float("nan")


def decode_plan(
    world: World,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    size: int,
    dtype: Any,
    window: int = 0,
    deterministic: bool = False,
) -> Any:
    import torch

    from llmos.kernels.configs import decode_programs
    from llmos.kernels.decode_plan import DecodePlan

    return DecodePlan(
        world.device, batch, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, page_size=size, window=window,
        num_programs=decode_programs(torch.device(world.device), head_dim, dtype), deterministic=deterministic,
    )  # fmt: skip


def _check_table(checks: Checks) -> None:
    """The row table's kernels and page copies against the same on the CPU, exactly."""
    import torch

    from llmos.kernels import row_update
    from llmos.kernels.page_copy import copy_pages
    from llmos.kernels.row_table import MAX_LENGTH, PROMPT_LENGTH, DeviceRows, DiffWriter

    device = checks.world.device
    ours, theirs = (DeviceRows(place, 4, 64, 16, max_stops=8, max_biases=8) for place in (device, "cpu"))
    writer = DiffWriter(ours)
    for row, stops in ((2, (9, 8)), (0, ())):
        columns = {PROMPT_LENGTH: 3, MAX_LENGTH: 40 if row else 21}
        writer.add(row, columns, pages=[row + 5, 1], tokens=list(range(20)), stops=stops, biases=[(1, 2.0)])
    diff = writer.finish()
    row_update.apply_diff(diff.to(device), ours)
    row_update.apply_diff_reference(diff, theirs)
    checks.same("apply_diff", ours.arena, theirs.arena)
    rows = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    names = ("active", "token_ids", "positions", "context")
    found = {name: torch.empty(4, dtype=torch.int32, device=device) for name in names}
    found["slots"] = torch.empty(4, dtype=torch.int64, device=device)
    row_update.prepare_decode(ours, rows.to(device), **found)
    expected = dict(
        zip(("active", "token_ids", "positions", "slots", "context"), row_update.prepare_decode_reference(theirs, rows))
    )
    for name, value in expected.items():
        checks.same(f"prepare_decode {name}", found[name], value)
    tokens = torch.tensor([9, 0, 5, 0], dtype=torch.int32)
    results = torch.empty(4, 4, dtype=torch.int32, device=device)
    row_update.advance(ours, found["active"], tokens.to(device), results=results)
    checks.same("advance", results, row_update.advance_reference(theirs, expected["active"], tokens))
    checks.same("advance table", ours.arena, theirs.arena)
    storage = torch.randn(6, 2, 2, 2, 16, 16, device=device)
    before = storage.clone()
    copy_pages(storage, storage, torch.tensor([[1, 4], [-1, 2], [0, 5]], dtype=torch.int32, device=device))
    before[4], before[5] = before[1].clone(), before[0].clone()
    checks.same("copy_pages", storage.view(torch.int32), before.view(torch.int32))


def _check_sampling(checks: Checks) -> None:
    """Tokens of greedy, filtered, penalised and plain rows, and log-probabilities, on flat and on peaked logits."""
    import torch

    from llmos.kernels import row_table
    from llmos.kernels.row_table import DeviceRows, DiffWriter
    from llmos.kernels.sampling import Sampler
    from llmos.kernels.sampling_reference import sample_reference

    world = checks.world
    vocab = 200 if world.dry else 151_936
    kinds: list[dict[int, int | float]] = [
        {row_table.TEMPERATURE: 0.0, row_table.LOGPROBS: 3}, {row_table.TOP_P: 0.8}, {row_table.TOP_K: 5, row_table.TEMPERATURE: 0.7},
        {row_table.ADJUSTED: 1, row_table.REPETITION: 1.3, row_table.FREQUENCY: 0.5}, {row_table.LOG_MIN_P: -3.0}, {},
    ]  # fmt: skip
    ours, theirs = (DeviceRows(place, len(kinds), 64, 16, max_stops=4, max_biases=4) for place in (world.device, "cpu"))
    writer = DiffWriter(ours)
    for row, columns in enumerate(kinds):
        writer.add(
            row,
            {row_table.SEED_LOW: row, row_table.PROMPT_LENGTH: 4, **columns},
            pages=[row],
            tokens=[3, 5, 7, 9, 5, 5],
        )
    from llmos.kernels.row_update import apply_diff_reference

    apply_diff_reference(writer.finish(), theirs)
    ours.arena.copy_(theirs.arena)
    sampler = Sampler(world.device, len(kinds), vocab)
    rows = torch.arange(len(kinds), dtype=torch.int32)
    for scale in (1.0,) if world.dry else (1.0, 6.0):
        logits = torch.randn(len(kinds), vocab, device=world.device) * scale
        logits[5, 3] = float("nan")
        found = sampler.sample(logits, rows.to(world.device), ours).clone()
        tokens, logprobs, best = sample_reference(logits.cpu(), rows, theirs)
        checks.same(f"sample x{scale:g}", found, tokens)
        checks.close(f"sample logprob x{scale:g}", sampler.logprobs[:1].cpu(), logprobs[:1], torch.float32)
        checks.same(f"sample best x{scale:g}", sampler.top_ids[0, :3], torch.tensor([token for token, _ in best[0]]))


# ---------------------------------------------------------------- shares of floors


def _small(world: World) -> list[dict[str, Any]]:
    """The kernels beside attention, at a decode batch and at a prompt's."""
    import torch

    from llmos.kernels.activation import silu_mul
    from llmos.kernels.norms import add_rms_norm

    found = []

    def note(name: str, tokens: int, num_bytes: int, work: Callable[[], Any]) -> None:
        took = seconds(world, work, inner=20)
        share = num_bytes / took / world.bandwidth
        found.append({"kernel": name, "tokens": tokens, "us": took * 1e6, "share": share})

    for shape in (QWEN, LLAMA_8B):
        for tokens in (1, 64, 256, 8192):
            if world.late():
                return found

            def normal(width: int, rows: int = tokens) -> Any:
                return torch.randn(rows, width, device=world.device, dtype=torch.bfloat16)

            x, residual, out, weight = (
                normal(shape.hidden),
                normal(shape.hidden),
                normal(shape.hidden),
                normal(shape.hidden, 1)[0],
            )
            gate_up, activated = normal(2 * shape.ffn), normal(shape.ffn)
            norm = lambda x=x, r=residual, w=weight, o=out: add_rms_norm(x, r, w, 1e-6, out=o)  # noqa: E731
            note(f"add_rms_norm {shape.hidden}", tokens, 8 * tokens * shape.hidden, norm)
            note(
                f"silu_mul {shape.ffn}",
                tokens,
                6 * tokens * shape.ffn,
                lambda g=gate_up, a=activated: silu_mul(g, out=a),
            )
            if tokens <= 256:
                _note_sampling(world, shape, tokens, note)
    return found


def _note_sampling(world: World, shape: ModelShape, batch: int, note: Callable[..., None]) -> None:
    """Flat logits, which are the worst for top-p, and peaked ones."""
    import torch

    from llmos.kernels import row_table
    from llmos.kernels.row_table import DeviceRows
    from llmos.kernels.sampling import Sampler

    table = DeviceRows(world.device, batch, 64, 16, max_stops=4, max_biases=4)
    floats = table.records.view(torch.float32)
    sampler = Sampler(world.device, batch, shape.vocab, adjusts=False)
    rows = torch.arange(batch, device=world.device, dtype=torch.int32)
    for name, top_p in (("plain", 1.0), ("top-p", 0.9)):
        for kind, scale in (("flat", 0.05), ("peaked", 4.0)):
            floats[:, row_table.TEMPERATURE], floats[:, row_table.TOP_P] = 1.0, top_p
            table.records[:, row_table.TOP_K], floats[:, row_table.LOG_MIN_P] = row_table.NO_TOP_K, float("-inf")
            logits = (torch.randn(batch, shape.vocab, device=world.device) * scale).bfloat16()
            work = lambda x=logits: sampler.sample(x, rows, table, adjust=False, report=False)  # noqa: E731
            note(f"sample {name} {kind} {shape.vocab}", batch, 2 * batch * shape.vocab, work)


def attention(world: World) -> dict[str, Any]:
    """Part "attention": decode over batch and context, prompts over length, for the heads of three models."""
    import torch

    shapes = (TINY,) if world.dry else (QWEN, LLAMA_1B, LLAMA_8B)
    found: dict[str, Any] = {"decode": [], "prefill": []}
    for shape in shapes:
        head_dim = 64 if world.dry else shape.head_dim
        for batch in (2,) if world.dry else (64, 1, 256, 8):
            for context in (20,) if world.dry else (4096, 512, 32_768):
                if not world.late(2.0):
                    entry = decode_point(world, shape, head_dim, batch, context)
                    if entry is not None:
                        found["decode"].append({"model": shape.name, **entry})
        for length in (20,) if world.dry else (2048, 8192):
            if not world.late(2.0):
                found["prefill"].append({"model": shape.name, **_prefill_point(world, shape, head_dim, length)})
        if world.is_cuda:
            torch.cuda.empty_cache()
    return found


def decode_case(world: World, shape: ModelShape, head_dim: int, batch: int, context: int) -> Any:
    """Inputs of one decode launch; None if they do not fit."""
    import torch

    size = 16 if world.dry else 64
    each = -(-context // size)
    pages = batch * each
    if pages * shape.kv_heads * size * head_dim * 4 > 40e9:
        return None
    dtype = torch.float32 if world.dry else torch.bfloat16
    kv = [
        torch.empty(pages, shape.kv_heads, size, head_dim, device=world.device, dtype=dtype).normal_() for _ in range(2)
    ]
    table = torch.randperm(pages, device=world.device).view(batch, each).int()
    rows = torch.arange(batch, device=world.device, dtype=torch.int32)
    lengths = torch.full((batch,), context, device=world.device, dtype=torch.int32)
    q = torch.randn(batch, shape.heads, head_dim, device=world.device).to(dtype)
    return q, kv, table, rows, lengths, size


def decode_point(world: World, shape: ModelShape, head_dim: int, batch: int, context: int) -> dict[str, Any] | None:
    import torch

    from llmos.kernels.paged_decode import paged_decode

    case = decode_case(world, shape, head_dim, batch, context)
    if case is None:
        return None
    q, kv, table, rows, lengths, size = case
    plan = decode_plan(world, batch, shape.heads, shape.kv_heads, head_dim, size, q.dtype)
    plan.prepare(rows, lengths)
    out = torch.empty_like(q)
    work = lambda: paged_decode(q, *kv, table, rows, lengths, scale=head_dim**-0.5, plan=plan, out=out)  # noqa: E731
    took = seconds(world, work, inner=4)
    num_bytes = batch * context * 2 * shape.kv_heads * head_dim * q.element_size()
    share = num_bytes / took / world.bandwidth
    say(f"  decode {shape.name} batch {batch:3} context {context:5}: {took * 1e6:9.1f} us, {share:.2f} of copy")
    return {"batch": batch, "context": context, "us": took * 1e6, "bytes_per_s": num_bytes / took, "share": share}


def _prefill_point(world: World, shape: ModelShape, head_dim: int, length: int) -> dict[str, Any]:
    import torch

    from llmos.kernels.paged_prefill import paged_prefill

    case = decode_case(world, shape, head_dim, 1, length)
    assert case is not None
    _, kv, table, rows, _, _ = case
    q = torch.randn(length, shape.heads, head_dim, device=world.device).to(kv[0].dtype)
    out = torch.empty_like(q)
    start, count = (torch.tensor([value], device=world.device, dtype=torch.int32) for value in (0, length))
    work = lambda: paged_prefill(q, *kv, table, rows, start, count, start, scale=head_dim**-0.5, out=out)  # noqa: E731
    took = seconds(world, work)
    flop = 2 * length * length * shape.heads * head_dim  # half of the square, twice two products
    say(f"  prefill {shape.name} {length}: {flop / took / 1e12:.1f} TFLOP/s")
    return {"tokens": length, "ms": took * 1e3, "flop_per_s": flop / took, "share": flop / took / world.rate}
