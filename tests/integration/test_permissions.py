"""A real object store that holds each request to a policy: the documented one is enough, others are errors."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from tests.conftest import REPOSITORY, free_port, wait_for_port

POLICY = (
    (REPOSITORY / "docs" / "bucket-policy.json").read_text().replace("BUCKET", "training").replace("PREFIX", "team")
)
# Bucket, user, policy, key: what is done before policies hold.
ACTIONS_OF_THE_OWNER = 4


@pytest.fixture
def start_store(monkeypatch) -> Iterator[Callable[[str], None]]:
    """Return a function that starts a store with a bucket and a user of one policy, and makes its key the standard."""
    servers = []

    def start(policy: str) -> None:
        port = free_port()
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
        environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": str(ACTIONS_OF_THE_OWNER)}
        servers.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_for_port(port)
        endpoint = f"http://127.0.0.1:{port}"
        owner = boto3.Session("owner", "owner", region_name="us-east-1")
        owner.client("s3", endpoint_url=endpoint).create_bucket(Bucket="training")
        iam = owner.client("iam", endpoint_url=endpoint)
        iam.create_user(UserName="job")
        iam.put_user_policy(UserName="job", PolicyName="job", PolicyDocument=policy)
        key = iam.create_access_key(UserName="job")["AccessKey"]
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    yield start
    for server in servers:
        server.terminate()
        server.wait()


def check_access(uri: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the key of a process is read once."""
    script = f"from trainer.runtime import storage\nstorage.check_access({uri!r})\nprint('ok')"
    return subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_the_documented_policy_is_enough_and_for_its_prefix_only(start_store):
    start_store(POLICY)
    assert check_access("s3://training/team/runs").stdout == "ok\n"
    assert "(s3:PutObject)" in check_access("s3://training/others").stderr


@pytest.mark.parametrize(
    ("permission", "what"),
    [
        ("s3:PutObject", "write a file"),
        ("s3:GetObject", "read a file"),
        ("s3:ListBucket", "list files"),
        ("s3:DeleteObject", "delete a file"),
    ],
)
def test_a_missing_permission_is_named(start_store, permission, what):
    policy = json.loads(POLICY)
    policy["Statement"].append({"Effect": "Deny", "Action": permission, "Resource": "*"})
    start_store(json.dumps(policy))
    checked = check_access("s3://training/team/runs")
    assert f"a job must be able to {what} there ({permission})" in checked.stderr, checked.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in checked.stderr
