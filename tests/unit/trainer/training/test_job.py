import subprocess
import sys

import numpy as np
from ray import cloudpickle

from tests.conftest import REPOSITORY
from trainer.runtime.events import ignore_event
from trainer.training.job import WorkerJob, WorkerResult


def test_what_the_driver_and_its_workers_exchange_is_read_without_tensorflow():
    code = "import sys, trainer.training.job; sys.exit('tensorflow' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=120).returncode == 0


def test_a_job_arrives_at_its_worker_as_it_was_sent(make_config, write_dataset):
    config, manifest = make_config(epochs=7), write_dataset().manifest
    job = WorkerJob(config, manifest, "s3://bucket/run", None, ("mlflow",), 3, 64, ignore_event)
    assert cloudpickle.loads(cloudpickle.dumps(job)) == job


def test_the_pictures_of_a_result_arrive_at_the_driver():
    pictures = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    result = cloudpickle.loads(cloudpickle.dumps(WorkerResult("", 2, 10, "layers", (7, 7), pictures)))
    assert (result.attempts, result.weights_crc32) == (2, (7, 7))
    np.testing.assert_array_equal(result.mistakes, pictures)
