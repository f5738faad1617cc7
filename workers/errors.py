"""The error that means: the input is wrong, and the person who gave it can mend it."""


class BadInputError(ValueError):
    """What was given (a file, a key of a config, a checkpoint) cannot be used.

    The message names the file, key or tensor, what is wrong with it, and what to do. The command
    line prints the message alone, without a traceback, and exits with 2.
    """
