"""A run in time: planned, built, stepped, reported, saved, resumed, stopped and exported."""
