"""A small language for kernels: LLVM IR through llvmlite, with loops that carry values and 8-wide vectors.

A kernel is `void kernel(i64* args, i64 rows, i64 thread, i64 threads)`; `args` holds pointers, and sizes (`machine.py`).
Every thread of a step calls it with its own number. Nothing here checks bounds: shapes are checked by whoever builds the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
LANES = 8
VF, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
POINTER = ir.PointerType(I8)
SIGNATURE = ir.FunctionType(ir.VoidType(), [ir.PointerType(I64), I64, I64, I64])

Value = Any  # llvmlite's values have no useful types
Body = Callable[[Value, list[Value]], Sequence[Value]]


class Kernel:
    """The body of one kernel, written from top to bottom; `close` ends it."""

    def __init__(self, module: ir.Module, name: str) -> None:
        self.module = module
        self.function = ir.Function(module, SIGNATURE, name)
        self._args, self.rows, self.thread, self.threads = self.function.args
        self.build = ir.IRBuilder(self.function.append_basic_block())

    def close(self) -> None:
        self.build.ret_void()

    # ------------------------------------------------------------ arguments and numbers

    def arg(self, index: int) -> Value:
        """Argument `index` as an integer."""
        return self.build.load(self.build.gep(self._args, [self.whole(index)]))

    def whole(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def number(self, value: float) -> Value:
        return ir.Constant(F32, value)

    def add(self, *terms: Value | int) -> Value:
        return self._chain(self.build.add, terms)

    def mul(self, *factors: Value | int) -> Value:
        return self._chain(self.build.mul, factors)

    def minimum(self, a: Value, b: Value) -> Value:
        return self.build.select(self.build.icmp_signed("<", a, b), a, b)

    def _chain(self, operation: Callable[..., Value], values: Sequence[Value | int]) -> Value:
        found = [self.whole(value) if isinstance(value, int) else value for value in values]
        result = found[0]
        for value in found[1:]:
            result = operation(result, value)
        return result

    # ------------------------------------------------------------ control

    def fold(self, begin: Value, end: Value, step: int | Value, start: Sequence[Value], body: Body) -> list[Value]:
        """for i in range(begin, end, step): values = body(i, values); the last values."""
        build = self.build
        before = build.block
        head, inside, after = (self.function.append_basic_block() for _ in range(3))
        build.branch(head)
        build.position_at_end(head)
        index = build.phi(I64)
        values = [build.phi(value.type) for value in start]
        index.add_incoming(begin, before)
        for phi, value in zip(values, start):
            phi.add_incoming(value, before)
        build.cbranch(build.icmp_signed("<", index, end), inside, after)
        build.position_at_end(inside)
        for phi, value in zip(values, body(index, list(values))):
            phi.add_incoming(value, build.block)
        index.add_incoming(self.add(index, step), build.block)
        build.branch(head)
        build.position_at_end(after)
        return values

    def loop(self, begin: Value, end: Value, step: int | Value, body: Callable[[Value], None]) -> None:
        def step_body(index: Value, _: list[Value]) -> list[Value]:
            body(index)
            return []

        self.fold(begin, end, step, [], step_body)

    def when(self, condition: Value, body: Callable[[], None]) -> None:
        with self.build.if_then(condition):
            body()

    def deal(self, total: Value, body: Callable[[Value], None]) -> None:
        """body(i) for every `threads`-th i of range(total): for work that grows with i."""
        self.loop(self.thread, total, self.threads, body)

    def share(self, total: Value, body: Callable[[Value], None]) -> None:
        """body(i) for this thread's part of range(total): a contiguous one."""
        begin = self.build.udiv(self.mul(total, self.thread), self.threads)
        end = self.build.udiv(self.mul(total, self.add(self.thread, 1)), self.threads)
        self.loop(begin, end, 1, body)

    # ------------------------------------------------------------ memory

    def load(self, address: Value, kind: ir.Type, align: int = 1) -> Value:
        """`address`: an integer."""
        return self.build.load(self.build.inttoptr(address, ir.PointerType(kind)), align=align)

    def store(self, value: Value, address: Value, align: int = 1) -> None:
        self.build.store(value, self.build.inttoptr(address, ir.PointerType(value.type)), align=align)

    def load_float(self, address: Value, index: Value | int = 0) -> Value:
        return self.load(self.add(address, self.mul(index, 4)), F32, 4)

    def load_vector(self, address: Value) -> Value:
        return self.load(address, VF, 4)

    # ------------------------------------------------------------ vectors

    def splat(self, value: Value, kind: ir.VectorType = VF) -> Value:
        single = self.build.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.build.shuffle_vector(
            single, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
        )

    def same(self, value: float) -> Value:
        """A float in all lanes."""
        return ir.Constant(VF, [value] * LANES)

    def same_int(self, value: int) -> Value:
        return ir.Constant(VI, [value] * LANES)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self._call("llvm.fma", a.type, [a, b, c])

    def call1(self, name: str, value: Value) -> Value:
        return self._call(f"llvm.{name}", value.type, [value])

    def call2(self, name: str, a: Value, b: Value) -> Value:
        return self._call(f"llvm.{name}", a.type, [a, b])

    def _call(self, name: str, kind: ir.Type, arguments: list[Value]) -> Value:
        full = f"{name}.v{kind.count}f32" if isinstance(kind, ir.VectorType) else f"{name}.f32"
        function = self.module.globals.get(full)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [kind] * len(arguments)), full)
        return self.build.call(function, arguments)

    def total(self, vector: Value) -> Value:
        """The sum of the lanes, as a tree: always in the same order."""
        build = self.build
        width = vector.type.count
        while width > 1:
            width //= 2
            mask = [min(lane, vector.type.count - 1) for lane in range(width, 2 * width)]
            low = self._lanes(vector, list(range(width)))
            vector = build.fadd(low, self._lanes(vector, mask))
        return build.extract_element(vector, ir.Constant(I32, 0))

    def _lanes(self, vector: Value, lanes: list[int]) -> Value:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
        return self.build.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

    def exp(self, x: Value) -> Value:
        """e^x of a vector to about 1e-7 relative; below -87 it is 0.

        x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7, 2^n through the exponent's bits.
        """
        build = self.build
        inside = self.call2("maxnum", self.call2("minnum", x, self.same(88.0)), self.same(-87.0))
        n = self.call1("nearbyint", build.fmul(inside, self.same(1.4426950408889634)))
        rest = self.fma(n, self.same(-0.693359375), inside)  # ln 2 in two parts: the first is exact in float32
        rest = self.fma(n, self.same(2.12194440e-4), rest)
        power = self.same(1 / 5040)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            power = self.fma(power, rest, self.same(coefficient))
        exponent = build.shl(build.add(build.fptosi(n, VI), self.same_int(127)), self.same_int(23))
        found = build.fmul(power, build.bitcast(exponent, VF))
        found = build.select(build.fcmp_ordered("<", x, self.same(-87.0)), self.same(0.0), found)
        return build.select(build.fcmp_unordered("uno", x, x), x, found)  # the limits above lose a NaN
