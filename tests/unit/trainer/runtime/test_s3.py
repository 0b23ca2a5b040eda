"""The client of the object store; what a job sees of it through the storage is in test_storage.py, too."""

import contextlib
import socket
import threading

import pytest
from botocore.exceptions import ClientError

from trainer.runtime import s3, storage
from trainer.runtime.errors import InputError, JobError, UnreachableError


def test_an_answer_without_a_message_is_described_by_its_code():
    # As s3fs makes them of Ceph's.
    error = OSError(22, "None")
    error.__cause__ = ClientError({"Error": {"Code": "SignatureDoesNotMatch"}}, "PutObject")
    assert s3._first_line(error) == "SignatureDoesNotMatch"
    assert s3._first_line(OSError(5, "Input/output error")) == "[Errno 5] Input/output error"


@pytest.fixture
def profile(monkeypatch, tmp_path):
    """Return a function that makes the AWS files say what is given, and no variable anything."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_PROFILE", "corp")

    def write(text: str) -> None:
        (tmp_path / "config").write_text(f"[profile corp]\nregion = us-east-1\n{text}")
        storage._s3.cache_clear()

    yield write
    storage._s3.cache_clear()


_KEY = "aws_access_key_id = key\naws_secret_access_key = not-for-any-log\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{_KEY}endpoint_url = http://127.0.0.1:9",
        f"{_KEY}services = own\n[services own]\ns3 =\n  endpoint_url = http://127.0.0.1:9",
    ],
)
def test_a_store_that_cannot_be_reached_is_named_as_the_aws_files_name_it(profile, text, capfd, monkeypatch):
    profile(text)
    monkeypatch.setattr(s3, "_TRIES_BEFORE_FIRST_ANSWER", 1)
    with pytest.raises(InputError) as raised:
        storage.read_bytes("s3://photos/cats", 0, 1)
    message = str(raised.value)
    assert message.startswith("s3://photos/cats: no answer from http://127.0.0.1:9: Cannot connect to host 127.0.0.1:9")
    assert "check AWS_ENDPOINT_URL_S3 and AWS_PROFILE on every node" in message
    assert "answered" not in message
    assert "not-for-any-log" not in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Unable to locate credentials"),
        ("aws_access_key_id = key", "Partial credentials found"),
        (
            "sso_session = one\nsso_account_id = 1\nsso_role_name = a\n[sso-session one]\nsso_region = us-east-1\n"
            "sso_start_url = https://127.0.0.1",
            "Error loading SSO Token: Token for one does not exist",
        ),
        ("credential_process = /missing/program", "No such file or directory: '/missing/program'"),
        ("role_arn = arn:aws:iam::1:role/a\nweb_identity_token_file = /missing/token", "directory: '/missing/token'"),
        (f"{_KEY}endpoint_url = localhost:9000", "Invalid endpoint: localhost:9000"),
    ],
)
def test_a_request_that_was_not_made_is_no_answer(profile, text, reason, capfd):
    profile(text)
    for call in (storage.read_bytes, storage.exists, storage.find_files, storage.check_access):
        with pytest.raises(InputError, match=f"^s3://photos/cats: no request was made: .*{reason}") as raised:
            call("s3://photos/cats")
        assert "; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE, and the files in ~/.aws" in str(
            raised.value
        )
        assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_worker_waits_for_a_store_from_its_first_request(profile, monkeypatch):
    profile(f"{_KEY}endpoint_url = http://127.0.0.1:9")
    monkeypatch.setattr(storage, "is_worker", lambda: True)
    monkeypatch.setattr(s3, "_TRIES", 2)
    monkeypatch.setattr(s3, "_TRIES_BEFORE_FIRST_ANSWER", 1)
    with pytest.raises(JobError, match=r"no answer from .* when it is back, the same command continues"):
        storage.read_bytes("s3://photos/cats")
    storage.forget_answers()
    with pytest.raises(UnreachableError):
        storage.read_bytes("s3://photos/cats")


def test_a_read_is_tried_as_often_as_is_said(monkeypatch):
    server, connections = socket.create_server(("127.0.0.1", 0)), []

    def reset_all() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(server.accept()[0])
                connections[-1].close()

    thread = threading.Thread(target=reset_all)
    thread.start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    store = s3.S3(endpoint_url=endpoint, config_kwargs={"retries": {"max_attempts": 0}})
    counts = []
    for store.retries in (1, 3):
        connections.clear()
        with pytest.raises(UnreachableError), store.clear_errors("s3://photos/cat"):
            store.cat_file("photos/cat", start=1, end=2)
        counts.append(len(connections))
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    assert counts[1] == 3 * counts[0] > 0


def test_nobody_is_asked_for_the_code_of_an_mfa_device(profile, capfd):
    role = "arn:aws:iam::123456789012:role/a\nsource_profile = base\nmfa_serial = arn:aws:iam::123456789012:mfa/me"
    profile(f"role_arn = {role}\n[profile base]\n{_KEY}")
    with pytest.raises(InputError, match=r"no request was made: the profile has an mfa_serial, .*'aws sts get-session"):
        storage.check_access("s3://photos/cats")
    assert capfd.readouterr() == ("", "")
