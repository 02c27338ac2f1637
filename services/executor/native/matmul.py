"""Matrix products of float32 rows with packed weights of any format: one micro-kernel, unrolled for row counts and formats.

Layout. Output columns are cut into panels of 16; a panel holds, for k = 0, 1, ..., the 16 weights that multiply x[k] (`packing.py`).
A tile of R rows times a panel keeps its R x 16 sums in registers while k runs. Weights become float32 in registers.

Invariant: every sum runs over k in the same order, whatever R, the number of panels at once and the number of threads are, so a row's
result has the same bits whatever other rows there are.

The sums, plus a bias of zeros where there is none, are written, or added to what is there where `add` is 1 (the residual).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from llvmlite import ir

from llmos.services.executor.native.code import I8, LANES, VF, VI, Kernel, Value

PANEL = 2 * LANES
MAX_ROWS = 6  # 6 x 2 sums, 2 weights and a number of x fill 16 vector registers
ROW_BLOCK = 96  # rows whose x stays in a core's cache while all panels pass
ARGUMENTS = (
    "x",
    "x_stride",
    "weights",
    "panel_bytes",
    "inputs",
    "out",
    "out_stride",
    "panels",
    "bias",
    "scales",
    "add",
)


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are kept: bytes of one k of a panel, and how many k share a scale (0 = no scales)."""

    name: str
    step_bytes: int
    group: int = 0


FORMATS = {
    found.name: found
    for found in (
        Format("float32", 64),
        Format("bfloat16", 32),
        Format("float16", 32),
        Format("int8", 16, 128),
        Format("int4", 8, 32),
    )
}


def add_matmul(module: ir.Module, weights: Format) -> None:
    """The kernel `matmul_FORMAT`."""
    _Matmul(Kernel(module, f"matmul_{weights.name}"), weights).write()


class _Matmul:
    def __init__(self, kernel: Kernel, weights: Format) -> None:
        self.k = kernel
        self.format = weights
        (
            self.x,
            self.x_stride,
            self.weights,
            self.panel_bytes,
            self.inputs,
            self.out,
            self.out_stride,
            self.panels,
            self.bias,
            self.scales,
            self.adds,
        ) = (kernel.arg(index) for index in range(len(ARGUMENTS)))

    def write(self) -> None:
        k, build = self.k, self.k.build
        begin = build.udiv(k.mul(self.panels, k.thread), k.threads)
        end = build.udiv(k.mul(self.panels, k.add(k.thread, 1)), k.threads)
        few = {1: 4, 2: 2, 3: 2}
        blocks = {count: k.function.append_basic_block() for count in few}
        many, after = (k.function.append_basic_block() for _ in range(2))
        switch = build.switch(k.rows, many)
        for count, panels in few.items():
            switch.add_case(k.whole(count), blocks[count])
            build.position_at_end(blocks[count])
            self._few_rows(count, panels, begin, end)
            build.branch(after)
        build.position_at_end(many)
        k.loop(k.whole(0), k.rows, ROW_BLOCK, lambda first: self._row_block(first, begin, end))
        build.branch(after)
        build.position_at_end(after)
        k.close()

    def _few_rows(self, rows: int, panels: int, begin: Value, end: Value) -> None:
        """Several panels at once: with few rows the sums of one would wait for each other."""
        k = self.k
        whole = k.add(begin, k.mul(k.build.udiv(k.build.sub(end, begin), k.whole(panels)), panels))
        k.loop(begin, whole, panels, lambda panel: self._tile(k.whole(0), rows, panel, panels))
        k.loop(whole, end, 1, lambda panel: self._tile(k.whole(0), rows, panel, 1))

    def _row_block(self, first: Value, begin: Value, end: Value) -> None:
        """Rows [first, first + ROW_BLOCK) in tiles as equal as possible: `tall` of `height` + 1 rows, then the rest of `height`."""
        k, build = self.k, self.k.build
        rows = k.minimum(k.build.sub(k.rows, first), k.whole(ROW_BLOCK))
        tiles = build.udiv(k.add(rows, MAX_ROWS - 1), k.whole(MAX_ROWS))
        height = build.udiv(rows, tiles)
        tall = build.urem(rows, tiles)
        last = k.add(first, rows)
        middle = k.add(first, k.mul(tall, k.add(height, 1)))

        def one_panel(panel: Value) -> None:
            self._tiles(first, middle, k.add(height, 1), panel)
            self._tiles(middle, last, height, panel)

        k.loop(begin, end, 1, one_panel)

    def _tiles(self, first: Value, last: Value, height: Value, panel: Value) -> None:
        """Rows [first, last) in tiles of `height`, which is 1 to MAX_ROWS (+ 1 where there is none)."""
        k, build = self.k, self.k.build
        after = k.function.append_basic_block()
        switch = build.switch(height, after)
        for rows in range(1, MAX_ROWS + 1):
            block = k.function.append_basic_block()
            switch.add_case(k.whole(rows), block)
            build.position_at_end(block)
            k.loop(first, last, rows, functools.partial(self._tile, rows=rows, panel=panel, panels=1))
            build.branch(after)
        build.position_at_end(after)

    def _tile(self, row: Value, rows: int, panel: Value, panels: int) -> None:
        """Rows [row, row + rows) x panels [panel, panel + panels)."""
        k = self.k
        sources = [k.add(self.x, k.mul(k.add(row, r), self.x_stride)) for r in range(rows)]
        packed = [k.add(self.weights, k.mul(k.add(panel, p), self.panel_bytes)) for p in range(panels)]
        zeros = [k.same(0.0)] * (2 * rows * panels)
        if self.format.group:
            sums = self._grouped(sources, packed, panel, zeros)
        else:
            sums = self._sums(sources, packed, k.whole(0), self.inputs, zeros)
        for p in range(panels):
            for r in range(rows):
                at = 2 * (p * rows + r)
                self._finish(k.add(row, r), k.add(panel, p), sums[at : at + 2])

    def _sums(
        self, sources: list[Value], packed: list[Value], begin: Value, end: Value, start: list[Value]
    ) -> list[Value]:
        k = self.k

        def step(index: Value, sums: list[Value]) -> list[Value]:
            numbers = [k.splat(k.load_float(source, index)) for source in sources]
            result = []
            for p, address in enumerate(packed):
                pair = self._unpack(k.add(address, k.mul(index, self.format.step_bytes)))
                for r, number in enumerate(numbers):
                    at = 2 * (p * len(sources) + r)
                    result += [k.fma(number, half, total) for half, total in zip(pair, sums[at : at + 2])]
            return result

        return k.fold(begin, end, 1, start, step)

    def _grouped(self, sources: list[Value], packed: list[Value], panel: Value, zeros: list[Value]) -> list[Value]:
        """Each group's sum times its scales. Scales: bfloat16 in pairs, as a step of a bfloat16 panel."""
        k = self.k
        group = self.format.group
        groups = k.build.udiv(k.add(self.inputs, group - 1), k.whole(group))

        def one_group(index: Value, totals: list[Value]) -> list[Value]:
            begin = k.mul(index, group)
            sums = self._sums(sources, packed, begin, k.minimum(k.add(begin, group), self.inputs), zeros)
            result = []
            for p in range(len(packed)):
                at = k.mul(k.add(k.mul(k.add(panel, p), groups), index), 32)
                scale = _bfloat16_pair(k, k.add(self.scales, at))
                for r in range(len(sources)):
                    i = 2 * (p * len(sources) + r)
                    result += [k.fma(*terms) for terms in zip(scale, sums[i : i + 2], totals[i : i + 2])]
            return result

        return k.fold(k.whole(0), groups, 1, zeros, one_group)

    def _unpack(self, address: Value) -> tuple[Value, Value]:
        """The 16 weights of one k as two vectors."""
        k, build, name = self.k, self.k.build, self.format.name
        if name == "bfloat16":
            return _bfloat16_pair(k, address)
        if name == "int4":
            both = build.sext(k.load(address, ir.VectorType(I8, LANES)), VI)
            shift = k.same_int(28)
            low = build.ashr(build.shl(both, shift), shift)
            return build.sitofp(low, VF), build.sitofp(build.ashr(both, k.same_int(4)), VF)
        half_step = self.format.step_bytes // 2
        pair = (address, k.add(address, half_step))
        if name == "float32":
            return k.load_vector(pair[0]), k.load_vector(pair[1])
        if name == "float16":
            first, second = (build.fpext(k.load(half, ir.VectorType(ir.HalfType(), LANES), 2), VF) for half in pair)
            return first, second
        first, second = (build.sitofp(build.sext(k.load(half, ir.VectorType(I8, LANES)), VI), VF) for half in pair)
        return first, second

    def _finish(self, row: Value, panel: Value, sums: list[Value]) -> None:
        k, build = self.k, self.k.build
        columns = k.mul(panel, PANEL)
        bias = [k.load_vector(k.add(self.bias, k.mul(k.add(columns, half * LANES), 4))) for half in range(2)]
        sums = [build.fadd(total, extra) for total, extra in zip(sums, bias)]
        target = k.add(self.out, k.mul(row, self.out_stride))
        addresses = [k.add(target, k.mul(k.add(columns, half * LANES), 4)) for half in range(2)]
        with build.if_else(build.icmp_signed("!=", self.adds, k.whole(0))) as (add, store):
            with add:
                for address, total in zip(addresses, sums):
                    k.store(build.fadd(k.load_vector(address), total), address, 4)
            with store:
                for address, total in zip(addresses, sums):
                    k.store(total, address, 4)


def _bfloat16_pair(k: Kernel, address: Value) -> tuple[Value, Value]:
    """Eight words: the low halves are the first 8 bfloat16, the high halves the others."""
    build = k.build
    words = k.load(address, VI)
    low = build.shl(words, k.same_int(16))
    high = build.and_(words, k.same_int(-65536))
    return build.bitcast(low, VF), build.bitcast(high, VF)
