import signal
import subprocess
import sys

# The C code of a digest does not look at signals for minutes, as Ray's where nothing answers.
STUCK = """
import hashlib
from trainer.runtime import console, signals

signals._ENDING_SECONDS = 0.2
with console.exit_codes(), signals.defer_signals_of_ray():
    print("started", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_signal_ends_what_hangs_in_ray_s_own_code():
    job = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "started\n"
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=30)
    assert (job.returncode, said) == (130, "stopped by SIGINT while Ray did not answer; the same command continues\n")


# As Ray's start and end do on a busy machine: they take long, and go on.
BUSY = """
import time
from trainer.runtime import console, signals

signals._ENDING_SECONDS = 2.0

def work():
    print("started", flush=True)
    for _ in range(30):
        time.sleep(0.1)

with console.exit_codes(), signals.defer_signals_of_ray():
    work()
"""


def test_ray_is_not_ended_while_it_is_at_work():
    job = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "started\n"
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert (job.returncode, said) == (130, "stopped by SIGINT; the same command continues\n")
