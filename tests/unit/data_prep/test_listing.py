from data_prep.listing import Listing


def test_an_ignored_file_has_its_reason_and_is_counted_for_its_class():
    listing = Listing()
    listing.ignore("cat/notes.txt", "not_an_image_name", "cat")
    listing.ignore("LICENSE", "not_in_a_class_folder")
    assert listing.ignored == {"cat/notes.txt": "not_an_image_name", "LICENSE": "not_in_a_class_folder"}
    assert listing.ignored_of_class == {"cat": ["cat/notes.txt"]}
    assert not listing.found


def test_listings_share_nothing():
    Listing().ignore("LICENSE", "not_in_a_class_folder", "cat")
    assert not Listing().ignored
    assert not Listing().ignored_of_class
