import pytest

from data_prep.sources import IMAGES_SCHEMA, find_images
from tests.sources import ignored_in, rows_of
from trainer.runtime.errors import InputError


def test_a_folder_is_a_class_and_its_number_follows_the_sorted_names(write_files):
    source = write_files("b/1.png", "a-b/2.png", "a/3.png", "a/0.png")
    found = find_images(source)
    assert found.class_names == ["a", "a-b", "b"]
    assert found.images.schema == IMAGES_SCHEMA
    assert rows_of(source, "path", "label") == [("a-b/2.png", 1), ("a/0.png", 0), ("a/3.png", 0), ("b/1.png", 2)]


def test_files_have_no_split_unless_their_folders_say_so(write_files):
    source = write_files("a/1.png", "b/2.png")
    assert rows_of(source, "split", "container") == [(None, None), (None, None)]


def test_each_file_has_its_size(write_files):
    assert rows_of(write_files("a/1.png", "b/22.png"), "bytes") == [(7,), (8,)]


def test_images_are_found_at_any_depth_below_their_class(write_files):
    source = write_files("a/2023/april/1.png", "a/2.png", "b/x/3.png")
    assert rows_of(source, "path", "label") == [("a/2.png", 0), ("a/2023/april/1.png", 0), ("b/x/3.png", 1)]


@pytest.mark.parametrize(
    ("folder", "split"),
    [("val", "val"), ("valid", "val"), ("validation", "val"), ("dev", "val"), ("test", "test"), ("testing", "test")],
)
@pytest.mark.parametrize("train", ["train", "training"])
def test_split_folders_are_honoured(write_files, train, folder, split):
    source = write_files(f"{train}/a/1.png", f"{train}/b/2.png", f"{folder}/a/3.png")
    split_of = dict(rows_of(source, "path", "split"))
    assert split_of == {f"{train}/a/1.png": "train", f"{train}/b/2.png": "train", f"{folder}/a/3.png": split}
    assert find_images(source).class_names == ["a", "b"]


def test_a_class_may_be_called_test(write_files):
    source = write_files("test/1.png", "train/2.png", "question/3.png")
    assert find_images(source).class_names == ["question", "test", "train"]
    assert rows_of(source, "split") == [(None,), (None,), (None,)]


def test_without_a_train_folder_split_names_are_classes(write_files):
    assert find_images(write_files("test/1.png", "val/2.png")).class_names == ["test", "val"]


def test_folders_without_images_do_not_decide_whether_there_are_splits(write_files):
    source = write_files("train/a/1.png", "train/b/2.png", "docs/readme.txt", "notes.md")
    assert rows_of(source, "split") == [("train",), ("train",)]


def test_an_image_directly_in_a_split_folder_has_no_class(write_files):
    source = write_files("train/a/1.png", "train/b/2.png", "train/3.png")
    assert ignored_in(source) == {"train/3.png": "not_in_a_class_folder"}


def test_split_folders_may_be_in_any_case(write_files):
    source = write_files("Train/a/1.png", "Train/b/2.png", "TESTING/a/3.png")
    assert find_images(source).class_names == ["a", "b"]
    assert rows_of(source, "split") == [("test",), ("train",), ("train",)]


def test_a_folder_beside_split_folders_is_refused_and_named(write_files):
    source = write_files("train/a/1.png", "train/b/2.png", "val/a/3.png", "extra/a/4.png")
    with pytest.raises(InputError, match=r"folders train, val look like splits, and next to them is extra; move or"):
        find_images(source)


def test_a_class_may_be_called_like_a_split(write_files):
    assert find_images(write_files("train/red/1.png", "car/red/2.png")).class_names == ["car", "train"]


def test_the_same_name_in_composed_and_decomposed_form_is_one_class(write_files):
    # As macOS and everybody else write it; the path stays as it is on disk.
    source = write_files("train/caf\u00e9/1.png", "train/cafe\u0301/2.png", "train/tea/3.png", "val/cafe\u0301/4.png")
    assert find_images(source).class_names == ["caf\u00e9", "tea"]
    assert rows_of(source, "path", "label") == [
        ("train/cafe\u0301/2.png", 0),
        ("train/caf\u00e9/1.png", 0),
        ("train/tea/3.png", 1),
        ("val/cafe\u0301/4.png", 0),
    ]


def test_a_folder_without_an_image_is_no_silent_loss(write_files):
    source = write_files("a/1.png", "b/1.png", "c/1.txt", "c/2.txt", "c/3.csv", "d/1.zip")
    with pytest.raises(
        InputError, match=r"no image in 2 of 4 classes: c \(2 \.txt, 1 \.csv\), d \(1 \.zip\); add images"
    ):
        find_images(source)


def test_of_many_folders_without_an_image_the_first_are_named(write_files):
    source = write_files("a/1.png", "b/1.png", *(f"c{number}/1.txt" for number in range(7)))
    with pytest.raises(InputError, match=r"no image in 7 of 9 classes: c0 \(1 \.txt\), .*c4 \(1 \.txt\) and 2 more;"):
        find_images(source)


def test_a_folder_of_documents_beside_splits_is_no_class(write_files):
    assert find_images(write_files("train/a/1.png", "train/b/2.png", "docs/a/3.txt")).class_names == ["a", "b"]


@pytest.mark.parametrize("names", [("seg_train", "seg_test"), ("TrainSet", "TestSet"), ("train2017", "val2017")])
def test_folders_that_look_like_splits_are_refused_with_what_to_give(write_files, names):
    source = write_files(*(f"{name}/{label}/1.png" for name in names for label in "ab"))
    first, second = sorted(names)
    links = rf"mkdir NEW && ln -s {source}/{first} NEW/(test|train) && ln -s {source}/{second} NEW/(train|val|test)"
    with pytest.raises(InputError, match=rf"folders {first}, {second} look like splits; give a folder .*: {links}$"):
        find_images(source)


def test_what_was_unpacked_twice_is_linked_where_the_classes_are(write_files):
    source = write_files("seg_train/seg_train/a/1.png", "seg_test/seg_test/a/1.png", "seg_pred/seg_pred/1.png")
    with pytest.raises(InputError, match=rf"next to them is seg_pred; .*ln -s {source}/seg_train/seg_train NEW/train"):
        find_images(source)


def test_flat_folders_of_splits_are_no_classes(write_files):
    with pytest.raises(InputError, match="the folders test_images, train_images look like splits"):
        find_images(write_files("train_images/1.png", "test_images/2.png", "train.csv"))


@pytest.mark.parametrize(
    "names", [("steam_train", "car"), ("crash_test", "steam_train", "car"), ("dev", "testing_kit")]
)
def test_classes_may_have_the_words_of_splits_in_their_names(write_files, names):
    assert find_images(write_files(*(f"{name}/1.png" for name in names))).class_names == sorted(names)


def test_without_labels_no_layout_is_refused(write_files):
    source = write_files("seg_train/a/1.png", "seg_test/a/1.png", "c/1.txt")
    assert len(find_images(source, labelled=False).images) == 2
