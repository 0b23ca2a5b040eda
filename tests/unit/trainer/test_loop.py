from trainer.loop import _check_finite


def test_an_epoch_of_which_less_than_a_batch_is_left_has_no_steps_to_check():
    # Continued by fewer workers, whose batch is larger than the rows that are left.
    _check_finite([], first_step=4, precision="float32")
