"""megalard: a tensor- and sequence-parallel trainer for LinearARD RoPE restoration."""

__version__ = "0.1.0"
