import pytest

from trainer.runtime.events import (
    AttemptStarted,
    EpochFinished,
    GlyphsMissing,
    RunStarted,
    SourceListed,
    WorkerHeardAgain,
    WorkerSilent,
    WorkersLost,
)

STARTED = {
    "global_batch_size": 20,
    "num_replicas": 2,
    "per_replica_batch_size": 10,
    "steps_per_epoch": 3,
    "rows": 66,
    "epochs": 2,
    "finished_epochs": 0,
}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {},
            "global batch 20 = 2 replicas x 10; 66 images: 3 steps per epoch, 6 dropped (different images each epoch); "
            "2 epochs = 6 steps",
        ),
        (
            {"num_replicas": 1, "per_replica_batch_size": 1, "global_batch_size": 1, "rows": 1, "steps_per_epoch": 1}
            | {"epochs": 1},
            "global batch 1 = 1 replica x 1; 1 image: 1 step per epoch; 1 epoch = 1 step",
        ),
        ({"rows": 60}, "global batch 20 = 2 replicas x 10; 60 images: 3 steps per epoch; 2 epochs = 6 steps"),
        (
            {"rows": 60, "finished_epochs": 1},
            "global batch 20 = 2 replicas x 10; 60 images: 3 steps per epoch; 2 epochs = 6 steps; "
            "continuing after epoch 1",
        ),
        (
            {"rows": 60, "normalizes_alone": True},
            "global batch 20 = 2 replicas x 10; 60 images: 3 steps per epoch; 2 epochs = 6 steps; "
            "BatchNorm, if there is any, over the 10 images of a replica",
        ),
    ],
)
def test_the_start_says_the_arithmetic(values, text):
    assert str(RunStarted(**{**STARTED, **values})) == text


def test_an_epoch_is_one_line_in_the_words_of_the_notes():
    row = {
        "epoch": 3,
        "loss": 0.93154,
        "accuracy": 0.77273,
        "val_loss": 1.5,
        "val_accuracy": 0.5,
        "learning_rate": 0.00125,
        "images_per_second": 1234.6,
        "epoch_seconds": 12.34,
        "stage": "trial",
        "augmentation": "rotation+zoom",
    }
    assert str(EpochFinished(row, epochs=10)) == (
        "epoch 3/10 - loss: 0.9315 - accuracy: 0.7727 - val_loss: 1.5000 - val_accuracy: 0.5000 - "
        "learning_rate: 1.25e-03 - 1235 images/s - 12.3 s - trial, augmentation: rotation+zoom"
    )


def test_a_few_of_many_missing_characters_are_named():
    assert "has 猫: pictures show boxes instead; install a font" in str(GlyphsMissing("猫"))
    line = str(GlyphsMissing("".join(map(chr, range(0x4E00, 0x4F00)))))
    assert "has 一 丁 丂 七 丄 丅 丆 万 ...: pictures" in line


def test_what_was_left_out_of_a_source_is_one_line():
    assert not SourceListed(5, 2).is_notable
    listed = SourceListed(5, 2, "3 .txt", "1 Thumbs.db", "labels.csv", "owl")
    assert listed.is_notable
    assert str(listed) == (
        "5 files to read, 2 classes; not images by name: 3 .txt; ignored: 1 Thumbs.db; "
        "classes left out because they have no image: owl; classes come from the folders, not from labels.csv"
    )


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (WorkerSilent("worker 1", 12.3), "worker 1 has not answered for 12 s; training waits for it"),
        (WorkerHeardAgain("worker 1", 21.0), "worker 1 answers again after 21 s"),
        (
            WorkersLost("worker 1 was killed by SIGKILL", "a:/x/1.err", b"", 2, 3),
            "worker 1 was killed by SIGKILL; its log: a:/x/1.err\nthe workers restart from the last checkpoint: "
            "failure 2 of 3 allowed by --max-failures",
        ),
        (
            WorkersLost("worker 1 was lost with its node", "", b"", 1, 1),
            "worker 1 was lost with its node\nthe workers restart from the last checkpoint: failure 1 of 1 "
            "allowed by --max-failures",
        ),
        (AttemptStarted(2, 30, 3, 2, 2), "attempt 2 continues after step 30, in epoch 3, with 2 workers"),
        (AttemptStarted(2, 30, 3, 1, 3), "attempt 2 continues after step 30, in epoch 3, with 1 worker instead of 3"),
    ],
)
def test_what_is_reported_lost_workers(event, text):
    assert str(event) == text
