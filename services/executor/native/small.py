"""The small kernels between the products: RMSNorm, q/k norm with rotary embedding and KV write, SiLU x up."""

from __future__ import annotations

from llvmlite import ir

from llmos.services.executor.native.code import LANES, Kernel, Value
from llmos.services.executor.native.numbers import SIZES, store8
from llmos.services.executor.spec import ModelSpec

NORM_ARGUMENTS = ("x", "out", "stride", "weight")
ROTATE_ARGUMENTS = ("step", "qkv", "stride", "q_norm", "k_norm", "cache")
SILU_ARGUMENTS = ("x", "x_stride", "out", "out_stride")


def add_norm(module: ir.Module, spec: ModelSpec) -> None:
    """`norm`: out[row] = x[row] / rms(x[row]) * weight. Rows are padded with zeros to whole vectors."""
    k = Kernel(module, "norm")
    x, out, stride, weight = (k.arg(index) for index in range(len(NORM_ARGUMENTS)))
    width = k.whole(-(-spec.hidden_size // LANES) * LANES)

    def row(index: Value) -> None:
        source, target = (k.add(base, k.mul(index, stride)) for base in (x, out))
        scale = _inverse_rms(k, source, width, spec.hidden_size, spec.norm_eps)

        def scale_one(at: Value) -> None:
            scaled = k.build.fmul(k.load_vector(k.add(source, k.mul(at, 4))), scale)
            k.store(k.build.fmul(scaled, k.load_vector(k.add(weight, k.mul(at, 4)))), k.add(target, k.mul(at, 4)), 4)

        k.loop(k.whole(0), width, LANES, scale_one)

    k.share(k.rows, row)
    k.close()


def add_rotate(module: ir.Module, spec: ModelSpec, cache: str) -> None:
    """`rotate`: q and k of each token in place (norm where the model has one, then rotary embedding), k and v into their slots.

    `step`: i64[4], addresses of cos and sin float32[tokens, head_dim], of the slots i64[tokens, 2, kv_heads].
    """
    k = Kernel(module, "rotate")
    step, qkv, stride, q_norm, k_norm, base = (k.arg(index) for index in range(len(ROTATE_ARGUMENTS)))
    cos, sin, slots = (k.load(k.add(step, 8 * index), k.rows.type, 8) for index in range(3))
    size, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
    total = heads + 2 * kv_heads

    def one_head(item: Value) -> None:
        build = k.build
        token, head = build.udiv(item, k.whole(total)), build.urem(item, k.whole(total))
        vector = k.add(qkv, k.mul(token, stride), k.mul(head, 4 * size))
        angles = [k.add(table, k.mul(token, 4 * size)) for table in (cos, sin)]

        def turn() -> None:
            if spec.qk_norm:
                weight = build.select(build.icmp_signed("<", head, k.whole(heads)), q_norm, k_norm)
                _norm_in_place(k, vector, weight, size, spec.norm_eps)
            _turn(k, vector, angles[0], angles[1], size)

        def write() -> None:
            slot_index = k.add(k.mul(token, 2 * kv_heads), build.sub(head, k.whole(heads)))
            slot = k.load(k.add(slots, k.mul(slot_index, 8)), k.rows.type, 8)
            target = k.add(base, k.mul(slot, size * SIZES[cache]))
            for at in range(0, size, LANES):
                store8(k, k.load_vector(k.add(vector, 4 * at)), k.add(target, at * SIZES[cache]), cache)

        k.when(build.icmp_signed("<", head, k.whole(heads + kv_heads)), turn)
        k.when(build.icmp_signed(">=", head, k.whole(heads)), write)

    k.share(k.mul(k.rows, total), one_head)
    k.close()


def add_silu(module: ir.Module, spec: ModelSpec) -> None:
    """`silu`: out = silu(gate) x up, where x is gate and then up, each `intermediate_size` wide."""
    k = Kernel(module, "silu")
    x, x_stride, out, out_stride = (k.arg(index) for index in range(len(SILU_ARGUMENTS)))
    width = spec.intermediate_size

    def row(index: Value) -> None:
        source, target = k.add(x, k.mul(index, x_stride)), k.add(out, k.mul(index, out_stride))

        def eight(at: Value) -> None:
            gate = k.load_vector(k.add(source, k.mul(at, 4)))
            up = k.load_vector(k.add(source, 4 * width, k.mul(at, 4)))
            bottom = k.build.fadd(k.same(1.0), k.exp(k.build.fneg(gate)))
            k.store(k.build.fmul(k.build.fdiv(gate, bottom), up), k.add(target, k.mul(at, 4)), 4)

        k.loop(k.whole(0), k.whole(width), LANES, eight)

    k.share(k.rows, row)
    k.close()


def _inverse_rms(k: Kernel, source: Value, width: Value, count: int, eps: float) -> Value:
    """1 / sqrt(mean of squares + eps), in all lanes."""

    def square(at: Value, sums: list[Value]) -> list[Value]:
        value = k.load_vector(k.add(source, k.mul(at, 4)))
        return [k.fma(value, value, sums[0])]

    squares = k.total(k.fold(k.whole(0), width, LANES, [k.same(0.0)], square)[0])
    mean = k.build.fadd(k.build.fmul(squares, k.number(1.0 / count)), k.number(eps))
    return k.splat(k.build.fdiv(k.number(1.0), k.call1("sqrt", mean)))


def _norm_in_place(k: Kernel, vector: Value, weight: Value, size: int, eps: float) -> None:
    scale = _inverse_rms(k, vector, k.whole(size), size, eps)
    for at in range(0, size, LANES):
        address = k.add(vector, 4 * at)
        scaled = k.build.fmul(k.load_vector(address), scale)
        k.store(k.build.fmul(scaled, k.load_vector(k.add(weight, 4 * at))), address, 4)


def _turn(k: Kernel, vector: Value, cos: Value, sin: Value, size: int) -> None:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the two halves; the second half of `sin` has the sign that is meant."""
    build = k.build
    for at in range(0, size // 2, LANES):
        low, high = k.add(vector, 4 * at), k.add(vector, 4 * (at + size // 2))
        first, second = k.load_vector(low), k.load_vector(high)
        c, s = k.load_vector(k.add(cos, 4 * at)), k.load_vector(k.add(sin, 4 * (at + size // 2)))
        k.store(k.fma(first, c, build.fneg(build.fmul(second, s))), low, 4)
        k.store(k.fma(second, c, build.fmul(first, s)), high, 4)
