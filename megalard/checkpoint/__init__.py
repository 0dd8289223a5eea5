"""Models on disk: opened, compared, converted and written, however they are stored."""
