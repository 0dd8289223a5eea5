"""Files on disk: read with limits, written completely or not at all, and locked while written."""
