"""Benchmarks: each prints its own measurement and the measurement of its reference."""
