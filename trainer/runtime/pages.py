"""A check that keeps a job from replacing files of others in a folder that the user chose."""

from collections.abc import Iterable

from trainer.runtime import storage
from trainer.runtime.errors import InputError


def check_place(folder: str, page: str, names: Iterable[str], marks: Iterable[str], option: str) -> None:
    """Check that a page and its files do not replace files that another program wrote.

    If the page contains a mark of its job, all of the files with these names are taken to be of the job, too.

    Args:
        folder: URI of the folder that the user chose.
        page: file name of the page.
        names: file names of what belongs to the page.
        marks: texts of which a page that the job wrote contains at least one.
        option: the option that sets the folder, for the message.

    Raises:
        InputError: a file with one of these names was not written by the job; the message says which, and what to do.
    """
    try:
        present = storage.read_bytes(storage.join(folder, page))
    except FileNotFoundError:
        present = b""
    if any(mark.encode() in present for mark in marks):
        return
    for name in (page, *names):
        if storage.exists(storage.join(folder, name)):
            raise InputError(
                f"{storage.join(folder, name)} was not written by this job and would be replaced; move it away, or "
                f"choose another folder with {option}"
            )
