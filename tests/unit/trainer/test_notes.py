import sys

import pytest

from trainer import storage
from trainer.notes import format_note, write_note
from trainer.run_folder import RunFolder, describe_run


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path / "runs" / "first"))


@pytest.fixture
def config(make_config):
    return make_config(arch="alexnet", epochs=50, base_learning_rate=0.4, num_workers=2, seed=3)


def test_the_note_has_the_form_of_the_users_own(run, config, make_result, write_dataset, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "--arch", "alexnet"])
    record = describe_run(config, "1 node")
    run.write_record(record)
    note = format_note(run, config, write_dataset(rows=(7, 4, 3)).manifest, make_result())
    assert (
        note
        == f"""\
### {record.started:%Y-%m-%d}
#### alexnet: first
Krizhevsky et al. 2012, as in the training notes (BatchNorm for LRN); 27,734,190 parameters

7 training, 4 validation and 3 test images, 5x5x1, 3 classes, from /photos

recipe modern: sgd, learning rate 0.1 (cosine), batch 64 over 2 workers, float32, epochs=50, seed 3

```sh
python jobs/train.py --arch alexnet
```
loss: 0.9315 - accuracy: 0.7727 (51 of 66, 95% interval 0.658-0.857)

best epoch 7 of 10, 61 s, attempts: 1

| class | right | of |
|---|---|---|
| cat | 22 | 22 |
| dog | 20 | 22 |
| eel | 9 | 22 |
"""
    )


def test_the_test_split_has_a_line_where_it_was_read(run, config, make_result, write_dataset, evaluation):
    manifest = write_dataset().manifest
    line = f"test: {evaluation}"
    assert line not in format_note(run, config, manifest, make_result()).splitlines()
    assert line in format_note(run, config, manifest, make_result(test=evaluation)).splitlines()


def test_a_run_that_diverged_says_why(run, config, make_result, write_dataset):
    result = make_result(status="diverged", reason="the loss became nan within steps [1, 50]")
    note = format_note(run, config, write_dataset().manifest, result)
    assert "diverged: the loss became nan within steps [1, 50]" in note.splitlines()


def test_the_note_is_written_into_the_run_folder(run, config, make_result, write_dataset):
    manifest, result = write_dataset().manifest, make_result()
    write_note(run, config, manifest, result)
    assert storage.read_bytes(run.path("note.md")).decode() == format_note(run, config, manifest, result)
