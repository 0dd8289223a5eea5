"""Measure models on text and on retrieval tasks: the command ``megalard evaluate``."""

import sys

from megalard.cli import command

main = command("evaluate")

if __name__ == "__main__":
    sys.exit(main())
