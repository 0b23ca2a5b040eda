"""The errors that a job turns into an exit code."""


class InputError(ValueError):
    """The arguments or the data are wrong: exit 2, before anything is started.

    The message is one line that says what was given, what is allowed and what to do.
    """


class TrainingError(RuntimeError):
    """The run started and failed: exit 1."""
