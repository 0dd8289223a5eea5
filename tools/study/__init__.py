"""The parts of ``tools/study/restoration.py``."""
