"""Tensor parallelism with sequence parallelism: parameters and tokens split over the tp axis."""
