import pytest

from data_prep.listing import FoundImage, FoundImages, Listing


def test_an_ignored_file_has_its_reason_and_is_counted_for_its_class():
    listing = Listing()
    listing.ignore("cat/notes.txt", "not_an_image_name", "cat")
    listing.ignore("LICENSE", "not_in_a_class_folder")
    assert listing.ignored == {"cat/notes.txt": "not_an_image_name", "LICENSE": "not_in_a_class_folder"}
    assert listing.ignored_of_class == {"cat": ["cat/notes.txt"]}
    assert not len(listing.found.to_table())


def test_listings_share_nothing():
    Listing().ignore("LICENSE", "not_in_a_class_folder", "cat")
    assert not Listing().ignored
    assert not Listing().ignored_of_class


# Of a batch of columns: less than one, exactly one, and more.
@pytest.mark.parametrize("count", [0, 3, 2**14, 2**14 + 1])
def test_images_are_the_rows_of_a_table_in_their_order(count):
    images = FoundImages()
    for row in range(count):
        images.append(FoundImage(f"{row}.jpg", "ba"[row % 2], "val" if row % 3 else None, "one.tar", row, 7))
    table = images.to_table()
    assert len(table) == count
    assert table["path"].to_pylist() == [f"{row}.jpg" for row in range(count)]
    assert table.drop_columns("path").to_pylist()[-2:] == [
        {"class": row % 2, "split": "val" if row % 3 else None, "container": "one.tar", "offset": row, "bytes": 7}
        for row in range(count)[-2:]
    ]
    assert images.class_names == ["b", "a"][:count]


def test_an_image_without_a_class_has_none():
    images = FoundImages()
    images.append(FoundImage("1.jpg", None))
    assert images.to_table()["class"].to_pylist() == [None]
    assert images.class_names == []


def test_an_image_whose_path_no_table_can_store_is_ignored():
    listing = Listing()
    listing.add(FoundImage("cat/caf\udce9.jpg", "cat"))
    assert not len(listing.found.to_table())
    assert listing.ignored == {"cat/caf\\udce9.jpg": "name_is_not_utf8"}
    assert list(listing.ignored_of_class) == ["cat"]
