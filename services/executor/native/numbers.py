"""Number formats of the KV cache: eight of them from and to float32."""

from __future__ import annotations

from llvmlite import ir

from llmos.services.executor.native.code import I16, LANES, VF, VI, Kernel, Value

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def load8(k: Kernel, address: Value, name: str) -> Value:
    if name == "float32":
        return k.load_vector(address)
    if name == "float16":
        return k.build.fpext(k.load(address, ir.VectorType(ir.HalfType(), LANES), 2), VF)
    words = k.build.zext(k.load(address, ir.VectorType(I16, LANES), 2), VI)
    return k.build.bitcast(k.build.shl(words, k.same_int(16)), VF)


def store8(k: Kernel, value: Value, address: Value, name: str) -> None:
    """Rounded to nearest, ties to even, as torch does."""
    build = k.build
    if name == "float32":
        k.store(value, address, 4)
    elif name == "float16":
        k.store(build.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), address, 2)
    else:
        bits = build.bitcast(value, VI)
        odd = build.and_(build.lshr(bits, k.same_int(16)), k.same_int(1))
        rounded = build.lshr(build.add(bits, build.add(odd, k.same_int(0x7FFF))), k.same_int(16))
        rounded = build.select(build.fcmp_unordered("uno", value, value), k.same_int(0x7FC0), rounded)
        k.store(build.trunc(rounded, ir.VectorType(I16, LANES)), address, 2)
