"""Benchmarks: each is a module with a `main(arguments)`, the command line behind `flash-mla bench NAME`."""

__all__ = ["BENCHMARKS"]

BENCHMARKS = ("dense_decode", "sparse_decode", "sparse_prefill", "mha", "host_time", "triton_decode", "cpu_decode")
