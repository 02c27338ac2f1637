"""The executor for NVIDIA GPUs. The same code runs on a CPU, with plain calls for graphs and streams, so that tests need no GPU."""
