"""The relation KL for Hopper GPUs, in Gluon. ``backend`` is the module that ``backends`` lists."""
