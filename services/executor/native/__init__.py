"""Kernels of the CPU executor, compiled at start by LLVM (llvmlite), with no compiler and no files."""
