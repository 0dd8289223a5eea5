"""The relation KL in Triton. ``backend`` is the module that ``backends`` lists."""
