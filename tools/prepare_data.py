"""Tokenize text ahead of training: the command ``megalard prepare``."""

import sys

from megalard.cli import command

main = command("prepare")

if __name__ == "__main__":
    sys.exit(main())
