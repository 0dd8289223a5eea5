"""The restoration study: every method restores the same small model, with several seeds."""
