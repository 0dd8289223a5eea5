"""Describe and check a checkpoint, a run, a model or an adapter: ``megalard inspect``."""

import sys

from megalard.cli import command

main = command("inspect")

if __name__ == "__main__":
    sys.exit(main())
