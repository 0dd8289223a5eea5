"""The restoration study: a small model, every method, several seeds."""
