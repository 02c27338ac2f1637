"""Triton kernels, one file each, with a plain-torch reference beside them. Imports nothing, so that naming it costs nothing."""
