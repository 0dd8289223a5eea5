"""What a user asks of a run: the settings, their ranges, and how they are read."""
