"""Errors that a job turns into an exit code."""


class InputError(Exception):
    """Wrong arguments or data: exit code 2, before anything is started.

    The message is one line that says what was given, what is allowed and what to do next.
    """


class RecordError(InputError):
    """A record in storage cannot be read: damaged, or from another program or a newer version of this one."""


class NewerFormatError(RecordError):
    """A record was written by a newer version of this program: it is intact and must not be changed."""


class DamagedError(InputError):
    """A file differs from what this program wrote."""


class BatchError(InputError):
    """No batch fits into the memory of a worker, or the given one does not."""


class UnreachableError(InputError):
    """The storage has not answered: what it holds and permits is unknown."""


class JobError(Exception):
    """The job started and failed: exit code 1."""


class LeaseLostError(JobError):
    """Another job, or a later start of the workers, has taken over; this one must not write anymore."""


class WorkerDiedError(Exception):
    """The process of a worker ended without a result; the message says which worker and how."""

    def __init__(self, message: str, log: str = "", tail: bytes = b"") -> None:
        super().__init__(message)
        self.log = log
        """Host and path of the log of the worker; empty if it is lost too."""
        self.tail = tail
        """The end of that log."""


class WorkersFailedError(Exception):
    """The workers failed more often than allowed."""

    def __init__(self, causes: list[Exception]) -> None:
        self.causes = causes
        """Errors of the last failure, one per worker that failed."""
        super().__init__("; ".join(sorted({str(one).strip().splitlines()[-1] for one in causes if str(one).strip()})))
