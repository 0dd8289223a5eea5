"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input, told in one sentence that names the value and the fix.

    Programs print it on one rank, without a traceback, and exit with status 1.
    """
