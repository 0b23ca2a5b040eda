"""The errors that a job turns into an exit code."""


class InputError(Exception):
    """The arguments or the data are wrong: exit 2, before anything is started.

    The message is one line that says what was given, what is allowed and what to do.
    """


class JobError(Exception):
    """The job started and failed: exit 1."""
