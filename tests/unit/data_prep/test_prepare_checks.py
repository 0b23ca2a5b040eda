import pytest

from data_prep.prepare import PrepareConfig, parse_config, prepare
from trainer.errors import InputError


def test_defaults_are_those_of_the_notes():
    config = parse_config()
    assert (config.image_size, config.channels, config.val_fraction, config.test_fraction) == (250, 1, 0.15, 0.15)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "--image-size 0: "),
        ({"channels": 2}, "--channels 2: "),
        ({"val_fraction": 0}, "--val-fraction 0: "),
        ({"test_fraction": 1}, "--test-fraction 1: "),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction 1.5: "),
        ({"resize": "stretch"}, "--resize stretch: "),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_its_option(values, message):
    with pytest.raises(InputError, match=message):
        parse_config(**values)


def test_fractions_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(InputError, match=r"--val-fraction 0.5 and --test-fraction 0.5 leave no image to train on"):
        parse_config(val_fraction=0.5, test_fraction=0.5)


@pytest.mark.parametrize("dataset", ["", "prepared", "a/b"])
def test_a_dataset_inside_its_source_is_refused(tmp_path, dataset):
    with pytest.raises(InputError, match="lies in SOURCE"):
        prepare(str(tmp_path), str(tmp_path / dataset), PrepareConfig(), overwrite=True)


def test_a_dataset_prepared_otherwise_is_kept(write_dataset):
    written = write_dataset()
    with pytest.raises(InputError, match=r"image_size 5 there, 7 asked; channels 1 there, 3 asked.*--overwrite"):
        prepare("/photos", written.uri, PrepareConfig(image_size=7, channels=3))


def test_the_same_preparation_is_not_done_again(write_dataset):
    written = write_dataset()
    config = PrepareConfig(image_size=5, max_bad_fraction=0.5)
    assert prepare("/photos", written.uri, config) == written.manifest
