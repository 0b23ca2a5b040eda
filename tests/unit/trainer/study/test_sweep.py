import pytest

from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import LeaseLostError
from trainer.runtime.events import ignore_event
from trainer.runtime.lease import hold_lease
from trainer.study.file import parse_study
from trainer.study.folder import StudyFolder, Trial
from trainer.study.sweep import _Sweep

STUDY = parse_study(
    """
goal = "Which optimizer?"
trials = 2
epochs = 10
[base]
arch = "cnn_softmax"
dataset = "/datasets/animals"
[scientific]
optimizer = ["sgd", "adamw"]
""",
    "study.toml",
)
ONE_MACHINE = Resources(num_nodes=1, num_cpus=4, num_gpus=0, free_gpus=0, devices="4 cores", node_memory_gib=16)


def test_a_study_that_was_taken_over_records_no_trial(tmp_path):
    folder = StudyFolder(str(tmp_path / "round"))
    with hold_lease(folder.path("lease.json"), "study") as lease:
        sweep = _Sweep(STUDY, folder, lease, ONE_MACHINE, retry_failed=False, max_failures=0, on_event=ignore_event)
        first, second = (Trial(run_name=f"trial-000{n}", kind="search", index=n, values={}) for n in (0, 1))
        sweep._keep(first)
        storage.delete_file(lease.uri)
        with pytest.raises(LeaseLostError):
            sweep._keep(second)
    assert folder.read_trials() == [first]
