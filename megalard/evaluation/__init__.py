"""Measure models on text and on retrieval tasks, and report them side by side."""
