"""The one exception that users meet: a sentence that says what is wrong and what to do."""


class NumbaInferError(Exception):
    """A failure with a message fit for a user: one line, naming the file, tensor or option at fault.

    The command line prints it as `error: ...` and exits with 1; library users catch it.
    """
