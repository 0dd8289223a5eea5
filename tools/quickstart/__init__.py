"""The text and the teacher of the quickstart."""
