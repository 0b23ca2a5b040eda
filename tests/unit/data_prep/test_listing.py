import pyarrow as pa
import pytest

from data_prep.listing import FOUND_SCHEMA, Listing, fill_columns


def list_one(path: str, **columns: pa.Array) -> Listing:
    listing = Listing()
    images = fill_columns(path=pa.chunked_array([[path]]), class_name="cat")
    for name, column in columns.items():
        images = images.append_column(name, [column])
    listing.add(images)
    return listing


def test_an_ignored_file_has_its_reason_and_its_class():
    listing = Listing()
    listing.ignore(pa.chunked_array([["cat/notes.txt"]]), "not_an_image_name", pa.chunked_array([["cat"]]))
    listing.ignore_one("LICENSE", "not_in_a_class_folder")
    assert listing.ignored.to_pylist() == [
        {"path": "cat/notes.txt", "reason": "not_an_image_name", "class_name": "cat"},
        {"path": "LICENSE", "reason": "not_in_a_class_folder", "class_name": None},
    ]
    assert not len(listing.found)


def test_listings_share_nothing():
    first = list_one("cat/1.jpg")
    first.ignore_one("LICENSE", "not_in_a_class_folder")
    first.declare(["cat"])
    assert not len(Listing().found)
    assert not len(Listing().ignored)
    assert Listing().declared_classes == []


def test_a_class_that_is_declared_twice_is_one_class():
    listing = Listing()
    listing.declare(["b", "a"])
    listing.declare(["a", "c"])
    assert listing.declared_classes == ["b", "a", "c"]


def test_what_is_not_said_of_images_is_empty():
    images = fill_columns(path=pa.chunked_array([["1.jpg"], ["2.jpg"]]), container="x.tar", bytes=pa.array([7, 8]))
    assert images.schema == FOUND_SCHEMA
    assert images.to_pylist() == [
        {"path": "1.jpg", "class_name": None, "split": None, "container": "x.tar", "offset": 0, "bytes": 7},
        {"path": "2.jpg", "class_name": None, "split": None, "container": "x.tar", "offset": 0, "bytes": 8},
    ]


@pytest.mark.parametrize("is_text", [True, False])
def test_an_image_whose_path_no_table_can_store_is_ignored(is_text):
    listing = list_one("cat/caf\\udce9.jpg", is_text=pa.array([is_text]))
    assert listing.found["path"].to_pylist() == ["cat/caf\\udce9.jpg"] * is_text
    reason = {"reason": "name_is_not_utf8", "class_name": "cat"}
    assert listing.ignored.to_pylist() == [{"path": "cat/caf\\udce9.jpg", **reason}] * (not is_text)
