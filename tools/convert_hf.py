"""Convert between Hugging Face, sharded checkpoints and adapters: ``megalard convert``."""

import sys

from megalard.cli import command

main = command("convert")

if __name__ == "__main__":
    sys.exit(main())
