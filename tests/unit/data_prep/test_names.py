import pytest

from data_prep.formats import FORMATS
from data_prep.names import (
    count_suffixes,
    image_suffixes,
    is_plainly_other,
    left_behind_as,
    name_some,
    sort_class_names,
    split_alluded_to,
    to_class_name,
    to_class_names,
)


def test_suffixes_are_counted_without_regard_to_case():
    assert count_suffixes(["a.HEIC", "x/b.heic", "c", "d.tar.gz"]) == "2 .heic, 1 without suffix, 1 .gz"


@pytest.mark.parametrize(("count", "text"), [(0, ""), (5, "0, 1, 2, 3, 4"), (6, "0, 1, 2, 3, 4 and 1 more")])
def test_of_many_names_the_first_are_named(count, text):
    assert name_some([str(number) for number in range(count)]) == text


def test_no_format_that_is_read_is_plainly_something_else():
    assert {".jpg", ".jfif", ".pgm", ".jp2", ".avif", ".tga"} <= image_suffixes()
    assert not [suffix for suffix in image_suffixes() if is_plainly_other(f"a{suffix}")]
    assert ".psd" not in image_suffixes() or "PSD" in FORMATS


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "LICENSE", "x/Readme", "a.tar", "a.zip", "a.mp4", "labels.csv"])
def test_texts_archives_and_films_are_plainly_something_else(name):
    assert is_plainly_other(name)


@pytest.mark.parametrize("name", ["a", "a.heic", "a.dcm", "a.npy", "license.png", "x.zip/a", "a.1"])
def test_anything_else_may_be_an_image(name):
    assert not is_plainly_other(name)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/Thumbs.db", "Thumbs.db"),
        ("a/thumbs.db", "thumbs.db"),
        ("@eaDir/a/b.jpg", "@eaDir"),
        ("a/.DS_Store", ".DS_Store"),
        ("a/._b.jpg", "hidden"),
        ("a/b.jpg", ""),
        ("thumbs/a.jpg", ""),
    ],
)
def test_what_systems_leave_behind_is_reported_by_its_name(path, kind):
    assert left_behind_as(path) == kind


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("seg_train", "train"),
        ("test-set", "test"),
        ("Val2017", "val"),
        ("my TRAINING", "train"),
        ("TrainImages", "train"),
        ("trainers", None),
        ("contest", None),
        ("the train station", None),
        ("", None),
    ],
)
def test_a_split_is_alluded_to_by_the_first_or_last_word(name, split):
    assert split_alluded_to(name) == split


@pytest.mark.parametrize(
    ("names", "in_order"),
    [
        (["10", "9", "0"], ["0", "9", "10"]),
        (["10", "-9", "0", "0"], ["-9", "0", "10"]),
        (["10", "9", "a"], ["10", "9", "a"]),
        (["10", "9", "1.5"], ["1.5", "10", "9"]),
        (["10", "9", "²"], ["10", "9", "²"]),
        (["9" * 5000, "10"], ["10", "9" * 5000]),
        ([], []),
    ],
)
def test_names_that_are_all_whole_numbers_are_in_their_order(names, in_order):
    assert sort_class_names(names) == in_order


@pytest.mark.parametrize(
    ("label", "name"), [(None, None), ("", None), (float("nan"), None), (0, "0"), ("e\u0301", "\u00e9"), (" a", " a")]
)
def test_a_label_is_a_name_in_composed_form(label, name):
    assert to_class_name(label) == name


def test_a_missing_label_beside_whole_numbers_changes_none():
    assert to_class_names([3.0, None, "4.00", float("nan"), -1]) == ["3", None, "4", None, "-1"]
