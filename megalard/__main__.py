"""``python -m megalard COMMAND`` is the command ``megalard COMMAND``."""

import sys

from megalard.cli import main

sys.exit(main())
