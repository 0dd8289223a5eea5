"""The parts of ``tools/study_restoration.py``."""
