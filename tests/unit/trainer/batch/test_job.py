import subprocess
import sys

from ray import cloudpickle

from tests.conftest import REPOSITORY
from trainer.batch.job import TrialJob, TrialResult
from trainer.batch.search import Known, Search
from trainer.runtime.events import SizeMeasured


def test_what_the_driver_and_its_workers_exchange_is_read_without_tensorflow():
    code = "import sys, trainer.batch.job; sys.exit('tensorflow' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=120).returncode == 0


def test_a_trial_arrives_at_its_worker_as_it_was_sent_and_what_it_found_at_the_driver(make_config, write_dataset):
    known = Known().limit(4.0).add(SizeMeasured("float32", 8, 1, 0.1, 0.0, 0.1, 1.0)).add_failure("float32", 32)
    search = Search("max", ("float32",), 8, 64, 100.0, 5000)
    job = TrialJob(make_config(), write_dataset().manifest, search, known, None)
    assert cloudpickle.loads(cloudpickle.dumps(job)) == job
    result = TrialResult(known, is_complete=False)
    assert cloudpickle.loads(cloudpickle.dumps(result)) == result
