"""From LLVM IR to addresses of functions, and running a list of kernels on all threads.

`compile_module` takes tenths of a second and writes no file. `Program` is a list of (kernel, arguments); `run` calls them one after the
other on every thread of torch's OpenMP pool, with a barrier after each, in one parallel region: one call from Python, and no second
pool of threads that would compete for the cores.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir

from llmos.services.executor.native.code import I32, I64, POINTER, SIGNATURE

_GOMP = "libgomp*.so*"
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)


@functools.cache
def _openmp() -> ctypes.CDLL:
    """The OpenMP library that torch itself uses, already in memory; `OSError` if it is another one."""
    root = Path(torch.__file__).parent
    for folder in (root / "lib", root.parent / "torch.libs"):
        for path in sorted(folder.glob(_GOMP)):
            return ctypes.CDLL(str(path))
    raise OSError(f"{root}: torch comes without libgomp")


class Compiled:
    """Compiled kernels by name: addresses for `Program`. Keeps the machine code alive."""

    def __init__(self, module: ir.Module) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        openmp = _openmp()
        for name in ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"):
            llvm.add_symbol(name, ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value)
        features = llvm.get_host_cpu_features().flatten()
        target = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
        )
        module.triple = llvm.get_default_triple()
        parsed = llvm.parse_assembly(str(module))
        parsed.verify()
        options = llvm.PipelineTuningOptions(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
        builder = llvm.create_pass_builder(target, options)
        builder.getModulePassManager().run(parsed, builder)
        self._engine = llvm.create_mcjit_compiler(parsed, target)
        self._engine.finalize_object()
        self.assembly = functools.partial(target.emit_assembly, parsed)
        self.run = _RUN(self.address("run"))

    def address(self, name: str) -> int:
        return int(self._engine.get_function_address(name))


def add_runner(module: ir.Module) -> None:
    """`run(ops, count, rows, threads)`: ops is i64[count][2], address of a kernel and of its arguments."""
    table = ir.PointerType(I64)
    context = ir.LiteralStructType([table, I64, I64])
    body = _region(module, context)
    run = ir.Function(module, ir.FunctionType(ir.VoidType(), [table, I64, I64, I32]), "run")
    ops, count, rows, threads = run.args
    build = ir.IRBuilder(run.append_basic_block())
    shared = build.alloca(context)
    for index, value in enumerate((ops, count, rows)):
        build.store(value, build.gep(shared, [ir.Constant(I32, 0), ir.Constant(I32, index)]))
    parallel = ir.Function(
        module,
        ir.FunctionType(ir.VoidType(), [ir.PointerType(body.function_type), POINTER, I32, I32]),
        "GOMP_parallel",
    )
    build.call(parallel, [body, build.bitcast(shared, POINTER), threads, ir.Constant(I32, 0)])
    build.ret_void()


def _region(module: ir.Module, context: ir.Type) -> ir.Function:
    """What each thread does: every kernel, a barrier after each."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), "region")
    function.linkage = "internal"
    count_type = ir.FunctionType(I32, [])
    number = ir.Function(module, count_type, "omp_get_thread_num")
    total = ir.Function(module, count_type, "omp_get_num_threads")
    barrier = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "GOMP_barrier")
    entry, head, inside, after = (function.append_basic_block() for _ in range(4))
    build = ir.IRBuilder(entry)
    shared = build.bitcast(function.args[0], ir.PointerType(context))
    ops, count, rows = (
        build.load(build.gep(shared, [ir.Constant(I32, 0), ir.Constant(I32, index)])) for index in range(3)
    )
    thread, threads = (build.sext(build.call(function_, []), I64) for function_ in (number, total))
    build.branch(head)
    build.position_at_end(head)
    index = build.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), entry)
    build.cbranch(build.icmp_signed("<", index, count), inside, after)
    build.position_at_end(inside)
    at = build.mul(index, ir.Constant(I64, 2))
    kernel = build.inttoptr(build.load(build.gep(ops, [at])), ir.PointerType(SIGNATURE))
    arguments = build.load(build.gep(ops, [build.add(at, ir.Constant(I64, 1))]))
    build.call(kernel, [build.inttoptr(arguments, ir.PointerType(I64)), rows, thread, threads])
    build.call(barrier, [])
    index.add_incoming(build.add(index, ir.Constant(I64, 1)), inside)
    build.branch(head)
    build.position_at_end(after)
    build.ret_void()
    return function


class Program:
    """Kernels with their arguments, in order, for a number of threads. `run(rows)` runs all, `run(rows, first, count)` some."""

    def __init__(self, library: Compiled, kernels: list[tuple[int, list[int]]], threads: int) -> None:
        self._threads = threads
        self._library = library  # keeps the code alive
        self._arguments = [np.array(arguments, dtype=np.int64) for _, arguments in kernels]
        addresses = [address for address, _ in kernels]
        self._table = np.array(
            [(address, found.ctypes.data) for address, found in zip(addresses, self._arguments)], dtype=np.int64
        )
        self._base = self._table.ctypes.data
        self._run = library.run

    def __len__(self) -> int:
        return len(self._arguments)

    def run(self, rows: int, first: int = 0, count: int | None = None) -> None:
        number = len(self) - first if count is None else count
        self._run(self._base + 16 * first, number, rows, self._threads)
