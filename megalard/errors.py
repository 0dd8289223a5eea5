"""The exceptions a user is meant to read."""


class UserError(Exception):
    """Bad input, told in one sentence that names the value and the fix.

    Programs print it on one rank, without a traceback, and exit with status 1.
    """


class RankError(UserError):
    """Bad input that one rank alone may meet, such as a damaged part of a file only it reads.

    Whichever rank meets it prints it; the launcher then ends the others.
    """
