import signal
import subprocess
import sys

# The C code of a digest does not look at signals for minutes, as Ray's where nothing answers.
STUCK = """
import hashlib
from trainer.runtime import console, signals

signals._ENDING_SECONDS = 0.2
with console.exit_codes(), signals.defer_signals_of_start():
    print("started", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_signal_ends_what_hangs_in_ray_s_own_code():
    job = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "started\n"
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=30)
    assert (job.returncode, said) == (130, "stopped by SIGINT while Ray did not answer; the same command continues\n")
