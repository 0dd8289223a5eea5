"""Benchmarks. Each prints its measurement and the measurement of its reference in the same run."""
