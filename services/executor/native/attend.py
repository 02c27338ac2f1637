"""Attention of single queries over paged keys and values: each token of a step sees its sequence up to itself.

One item of work is (token, KV head): the scores of its query heads over all visible tokens, their softmax, the weighted sum of values. No
page is copied. Decode and prefill are the same: all keys of a step are written before it, and a query stops at its own position.
Invariant: a query's result depends on its sequence's tokens up to its position only, never on how prompts were cut into chunks.
"""

from __future__ import annotations

from llvmlite import ir

from llmos.services.executor.native.code import F32, I32, I64, LANES, Kernel, Value
from llmos.services.executor.native.numbers import SIZES, load8
from llmos.services.executor.spec import ModelSpec

ARGUMENTS = (
    "step",
    "q",
    "q_stride",
    "out",
    "out_stride",
    "cache",
    "value_offset",
    "window",
    "scratch",
    "scratch_stride",
)
_SUMS = 8  # sums that are kept in registers while values are added up


def add_attend(module: ir.Module, spec: ModelSpec, page_size: int, cache: str) -> None:
    """`attend`. `step`: i64[7], of which 3: page tables i32, 4: their stride in bytes, 5: row of each token i64, 6: its position i64."""
    _Attend(Kernel(module, "attend"), spec, page_size, cache).write()


class _Attend:
    def __init__(self, kernel: Kernel, spec: ModelSpec, page_size: int, cache: str) -> None:
        self.k = k = kernel
        self.spec = spec
        self.page_size = page_size
        self.cache = cache
        self.vector_bytes = spec.head_dim * SIZES[cache]
        (
            step,
            self.q,
            self.q_stride,
            self.out,
            self.out_stride,
            self.base,
            self.value_offset,
            self.window,
            self.scratch,
            self.scratch_stride,
        ) = (k.arg(index) for index in range(len(ARGUMENTS)))
        self.tables, self.table_stride, self.token_rows, self.positions = (
            k.load(k.add(step, 8 * index), I64, 8) for index in range(3, 7)
        )

    def write(self) -> None:
        self.k.deal(self.k.mul(self.k.rows, self.spec.num_kv_heads), self._item)
        self.k.close()

    def _item(self, item: Value) -> None:
        k, build, spec = self.k, self.k.build, self.spec
        token, head = build.udiv(item, k.whole(spec.num_kv_heads)), build.urem(item, k.whole(spec.num_kv_heads))
        row = k.load(k.add(self.token_rows, k.mul(token, 8)), I64, 8)
        end = k.add(k.load(k.add(self.positions, k.mul(token, 8)), I64, 8), 1)
        behind = build.sub(end, self.window)
        limited = build.and_(
            build.icmp_signed(">", self.window, k.whole(0)), build.icmp_signed(">", behind, k.whole(0))
        )
        first = build.select(limited, behind, k.whole(0))
        table = k.add(self.tables, k.mul(row, self.table_stride))
        keys = k.add(self.base, k.mul(head, self.page_size * self.vector_bytes))
        groups = spec.num_groups
        query = k.add(self.q, k.mul(token, self.q_stride), k.mul(head, groups * spec.head_dim * 4))
        target = k.add(self.out, k.mul(token, self.out_stride), k.mul(head, groups * spec.head_dim * 4))
        scores = k.add(self.scratch, k.mul(k.mul(k.thread, groups), self.scratch_stride))
        lanes = [k.add(scores, k.mul(self.scratch_stride, g)) for g in range(groups)]
        count = build.sub(end, first)
        self._scores(table, keys, query, lanes, first, end)
        inverse = [self._softmax(lane, count) for lane in lanes]
        values = k.add(keys, self.value_offset)
        width = spec.head_dim // LANES
        block = max(1, min(width, _SUMS // groups))
        for at in range(0, width, block):
            self._values(table, values, lanes, inverse, target, first, end, list(range(at, min(at + block, width))))

    def _visible(self, table: Value, plane: Value, first: Value, end: Value, start: list[Value], body) -> list[Value]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Fold over the visible tokens: body(index in the scratch, address of the token's vector, values)."""
        k, build, size = self.k, self.k.build, self.page_size
        tile_bytes = self.spec.num_kv_heads * size * self.vector_bytes

        def page(number: Value, values: list[Value]) -> list[Value]:
            where = build.sext(k.load(k.add(table, k.mul(number, 4)), I32, 4), I64)
            tile = k.add(plane, k.mul(where, tile_bytes))
            beginning = k.mul(number, size)
            inside = build.sub(first, beginning)
            begin = build.select(build.icmp_signed(">", inside, k.whole(0)), inside, k.whole(0))
            stop = k.minimum(build.sub(end, beginning), k.whole(size))

            def token(offset: Value, values: list[Value]) -> list[Value]:
                index = build.sub(k.add(beginning, offset), first)
                return list(body(index, k.add(tile, k.mul(offset, self.vector_bytes)), values))

            return k.fold(begin, stop, 1, values, token)

        pages = build.udiv(k.add(end, size - 1), k.whole(size))
        return k.fold(build.udiv(first, k.whole(size)), pages, 1, start, page)

    def _scores(self, table: Value, keys: Value, query: Value, lanes: list[Value], first: Value, end: Value) -> None:
        k, size = self.k, self.spec.head_dim
        scale = k.number(size**-0.5)

        def one(index: Value, address: Value, _: list[Value]) -> list[Value]:
            sums = [k.same(0.0)] * len(lanes)
            for at in range(0, size, LANES):
                key = load8(k, k.add(address, at * SIZES[self.cache]), self.cache)
                for g in range(len(lanes)):
                    sums[g] = k.fma(k.load_vector(k.add(query, 4 * (g * size + at))), key, sums[g])
            for lane, total in zip(lanes, sums):
                k.store(k.build.fmul(k.total(total), scale), k.add(lane, k.mul(index, 4)), 4)
            return []

        self._visible(table, keys, first, end, [], one)

    def _softmax(self, lane: Value, count: Value) -> Value:
        """Scores become e^(score - largest); 1 / their sum. The scratch is padded with -inf to whole vectors."""
        k, build = self.k, self.k.build
        lowest = k.same(float("-inf"))
        k.store(lowest, k.add(lane, k.mul(count, 4)), 4)

        def larger(at: Value, values: list[Value]) -> list[Value]:
            found = k.load_vector(k.add(lane, k.mul(at, 4)))
            return [build.select(build.fcmp_ordered(">", found, values[0]), found, values[0])]

        largest = k.fold(k.whole(0), count, LANES, [lowest], larger)[0]
        top = k.splat(self._largest(largest))

        def exponential(at: Value, values: list[Value]) -> list[Value]:
            address = k.add(lane, k.mul(at, 4))
            power = k.exp(build.fsub(k.load_vector(address), top))
            k.store(power, address, 4)
            return [build.fadd(values[0], power)]

        total = k.total(k.fold(k.whole(0), count, LANES, [k.same(0.0)], exponential)[0])
        return k.splat(build.fdiv(k.number(1.0), total))

    def _largest(self, vector: Value) -> Value:
        build = self.k.build
        found = build.extract_element(vector, ir.Constant(I32, 0))
        for lane in range(1, LANES):
            other = build.extract_element(vector, ir.Constant(I32, lane))
            found = build.select(build.fcmp_ordered(">", other, found), other, found)
        return found

    def _values(
        self,
        table: Value,
        plane: Value,
        lanes: list[Value],
        inverse: list[Value],
        target: Value,
        first: Value,
        end: Value,
        vectors: list[int],
    ) -> None:
        """The weighted sum of some of the values' vectors, for all query heads of this KV head."""
        k = self.k

        def one(index: Value, address: Value, sums: list[Value]) -> list[Value]:
            found = [load8(k, k.add(address, v * LANES * SIZES[self.cache]), self.cache) for v in vectors]
            shares = [k.splat(k.load(k.add(lane, k.mul(index, 4)), F32, 4)) for lane in lanes]
            return [
                k.fma(share, value, sums[g * len(vectors) + v])
                for g, share in enumerate(shares)
                for v, value in enumerate(found)
            ]

        sums = self._visible(table, plane, first, end, [k.same(0.0)] * (len(lanes) * len(vectors)), one)
        for g in range(len(lanes)):
            for v, vector in enumerate(vectors):
                address = k.add(target, 4 * (g * self.spec.head_dim + vector * LANES))
                k.store(k.build.fmul(sums[g * len(vectors) + v], inverse[g]), address, 4)
