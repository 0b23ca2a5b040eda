import pytest

from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.pages import check_place


@pytest.fixture
def check(tmp_path):
    """Return a function that puts files into a folder and checks it for a page and its data."""

    def check(**files: str) -> None:
        for name, content in files.items():
            storage.write_bytes(str(tmp_path / name.replace("_", ".")), content.encode())
        check_place(str(tmp_path), "page.html", ["data.csv"], ["<old mark>", "<mark>"], "--output")

    return check


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"other_txt": "mine"},
        {"page_html": "<h1><mark></h1>"},
        {"page_html": "<old mark>", "data_csv": "1,2"},
    ],
)
def test_a_place_is_free_or_has_what_the_job_wrote(check, files):
    check(**files)


@pytest.mark.parametrize(
    ("files", "taken"),
    [({"page_html": "mine"}, "page.html"), ({"data_csv": "1,2"}, "data.csv"), ({"page_html": ""}, "page.html")],
)
def test_a_file_of_another_program_is_named_with_what_to_do(check, tmp_path, files, taken):
    with pytest.raises(InputError) as error:
        check(**files)
    assert str(error.value) == (
        f"{tmp_path}/{taken} was not written by this job and would be replaced; move it away, or choose another folder "
        "with --output"
    )
