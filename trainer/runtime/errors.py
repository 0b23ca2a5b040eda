"""The errors that a job turns into an exit code."""


class InputError(Exception):
    """The arguments or the data are wrong: exit 2, before anything is started.

    The message is one line that says what was given, what is allowed and what to do.
    """


class RecordError(InputError):
    """A record of the storage cannot be read: it is damaged, of another program, or of a newer version of this one."""


class NewerFormatError(RecordError):
    """A record is of a newer version of this program: it is whole, and must be left as it is."""


class DamagedError(InputError):
    """A file is not as this program wrote it."""


class BatchError(InputError):
    """No batch, or not the one that was given, fits into a worker's memory."""


class UnreachableError(InputError):
    """No storage has answered: what it holds and allows is not known."""


class JobError(Exception):
    """The job started and failed: exit 1."""


class LeaseLostError(JobError):
    """Another job, or a later start of the workers, has taken over what this one worked on: it must write no more."""


class WorkerDiedError(Exception):
    """The process of a worker is gone without an answer; the message says which one and how."""

    def __init__(self, message: str, log: str = "", tail: bytes = b"") -> None:
        super().__init__(message)
        self.log = log
        """Host and path of what it printed; empty where that is lost, too."""
        self.tail = tail
        """The end of it."""


class WorkersFailedError(Exception):
    """The workers failed more often than allowed."""

    def __init__(self, causes: list[Exception]) -> None:
        self.causes = causes
        """Of the last failure, one a worker that failed."""
        super().__init__("; ".join(sorted({str(one).strip().splitlines()[-1] for one in causes if str(one).strip()})))
