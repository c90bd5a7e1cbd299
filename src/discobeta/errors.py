"""The one exception that is a message to the user and not a bug."""


class UserError(Exception):
    """Bad input: one or two lines that say what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """
