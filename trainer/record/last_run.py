"""The run of a dataset and an architecture that was started last in a storage: the next one is compared with it.

Each run names it in its record. Without that, the end of every run would have to look at all runs of the storage.
"""

from trainer.config.config import TrainConfig
from trainer.runtime import storage
from trainer.runtime.errors import RecordError
from trainer.runtime.record_format import Record


class LastRun(Record):
    """The name of the run, and of the one before it, None if that is not known."""

    run: str
    previous: str | None


def replace_last_run(storage_uri: str, config: TrainConfig, run: str) -> str | None:
    """Make a run that starts now the last one, and return the name of the one before it, None if that is not known."""
    key = {"arch": config.arch, "dataset": config.dataset_fingerprint}
    uri = storage.keyed_uri(storage_uri, "last_runs", key)
    try:
        last = LastRun.parse(storage.read_bytes(uri), uri)
    except (FileNotFoundError, RecordError):
        last = LastRun(run=run, previous=None)
    # A run that was refused, or deleted, starts again under its name.
    previous = last.previous if last.run == run else last.run
    storage.write_bytes(uri, LastRun(run=run, previous=previous).to_json())
    return previous
