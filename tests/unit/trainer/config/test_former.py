import json
from pathlib import Path

import pytest

from trainer.config.former import CONFIG_FORMAT, find_former_arguments, upgrade_config
from trainer.config.request import parse_request, read_options
from trainer.record.run_folder import RunRecord
from trainer.runtime.errors import InputError

PAST = Path(__file__).parents[2] / "past_records"
ADAM = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}
SGD = {"optimizer": "sgd", "base_learning_rate": 0.1, "global_batch_size": 64}


def test_a_config_of_format_1_has_the_arguments_that_its_optimizer_used():
    former = {**SGD, "optimizer": "adam", "nesterov": True, **ADAM, "beta_1": 0.5, "seed": 3, "tuned_batch_size": 64}
    assert find_former_arguments(former) == {**ADAM, "beta_1": 0.5}
    upgraded = upgrade_config(former, 1)
    assert upgraded["optimizer_arguments"] == {**ADAM, "beta_1": 0.5}
    assert upgraded["seed"] == 3
    assert not upgraded.keys() & {*ADAM, "nesterov", "tuned_batch_size"}
    assert upgrade_config(upgraded, CONFIG_FORMAT) == upgraded


def test_sgd_keeps_the_rate_that_was_scaled_linearly():
    rates = [upgrade_config(SGD, number)["base_learning_rate"] for number in (1, 2, 3)]
    assert rates == [0.05, 0.05, 0.1]
    assert upgrade_config({**SGD, "optimizer": "nadam"}, 2)["base_learning_rate"] == 0.1


@pytest.mark.parametrize("path", sorted(PAST.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_the_config_of_an_earlier_run_has_all_options_with_which_it_is_continued(path):
    record = RunRecord.parse(path.read_bytes(), path.name)
    request = parse_request(read_options(str(path)))
    assert request.settings.model_dump().items() <= record.config.model_dump().items()
    assert (request.arch, request.recipe, request.epochs) == (
        record.config.arch,
        record.config.recipe,
        record.config.epochs,
    )
    assert request.batch.given_size == record.config.global_batch_size


def test_the_config_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"format": CONFIG_FORMAT + 1, "config": {"arch": "alexnet"}}))
    with pytest.raises(InputError, match=rf"it is of format {CONFIG_FORMAT + 1}: update this program to read it"):
        read_options(str(path))
