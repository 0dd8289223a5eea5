"""Compare two models bit for bit, and their logits: the command ``megalard verify``."""

import sys

from megalard.cli import command

main = command("verify")

if __name__ == "__main__":
    sys.exit(main())
