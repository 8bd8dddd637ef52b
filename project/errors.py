"""UserError: a mistake of the user's, told in one sentence."""


class UserError(Exception):
    """What is wrong, the value, and the next step, in one sentence.

    The command line prints it without a traceback and exits with 2. Anything else that escapes is a bug of ours.
    """
