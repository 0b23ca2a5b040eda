"""Everything between a prepared dataset and a finished run; `trainer.interface` describes what it offers to Python."""

from typing import TYPE_CHECKING, Any

from trainer.runtime.folders import keep_caches_together

if TYPE_CHECKING:
    from trainer.interface import Run, fine_tune, load_run, load_runs, prepare, train
    from trainer.runtime.errors import InputError, JobError

__all__ = ["InputError", "JobError", "Run", "fine_tune", "load_run", "load_runs", "prepare", "train"]

# Here, since matplotlib and Keras look at the variables when they are imported.
keep_caches_together()


def __getattr__(name: str) -> Any:
    """Import the interface when it is first used: every module of this package comes by here."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer import interface

    return getattr(interface, name)
