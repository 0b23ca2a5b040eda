"""Keep a job from replacing, in a folder that the user chose, what it has not written itself."""

from collections.abc import Iterable

from trainer.runtime import storage
from trainer.runtime.errors import InputError


def check_place(folder: str, page: str, names: Iterable[str], marks: Iterable[str], option: str) -> None:
    """Check that a page and the files that go with it replace nothing that their job has not written.

    The page vouches for the others: where it carries a mark of its job, all of these names are the job's.

    Args:
        folder: URI of the folder that the user chose.
        page: name of the page.
        names: of the files that go with it.
        marks: texts of which the page carries one.
        option: names the folder, for the message.

    Raises:
        InputError: one of the names is taken; says which, and what to do.
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
