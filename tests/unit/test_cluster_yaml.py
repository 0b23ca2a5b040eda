"""cluster.yaml: Ray and EC2 accept it, its parts fit each other and the lock, and it holds no secret."""

import copy
import re
from pathlib import Path

import botocore.session
import pytest
import yaml
from botocore.validate import validate_parameters
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
PATH = REPOSITORY / "cluster.yaml"
CHECKOUT = "~/training-notes"


@pytest.fixture(scope="module")
def written():
    """What the file says."""
    return yaml.safe_load(PATH.read_text())


@pytest.fixture(scope="module")
def prepared(written):
    """What `ray up` makes of it before it talks to AWS: Ray's defaults filled in."""
    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    return config


def locked_version(package: str) -> str:
    lock = (REPOSITORY / "requirements.lock").read_text()
    (version,) = re.findall(rf"^{re.escape(package)}==(\S+)", lock, re.MULTILINE)
    return version


def test_ray_accepts_the_file(prepared):
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ((), "idle_timeout_minute", 15),
        (("docker",), "run_option", ["--shm-size=10g"]),
        (("available_node_types", "gpu"), "min_worker", 0),
        (("available_node_types", "head", "resources"), "CPU", 0.5),
    ],
)
def test_ray_refuses_a_wrong_name_or_value(written, where, name, value):
    config = copy.deepcopy(written)
    part = config
    for key in where:
        part = part[key]
    part[name] = value
    with pytest.raises(ValidationError):
        validate_config(prepare_config(config))


def test_nothing_of_ray_s_default_commands_is_left(prepared, written):
    # The defaults would install a nightly build of Ray and any boto3.
    for name in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[name] == written[name]
    assert prepared["head_setup_commands"] == written["setup_commands"] + written["head_setup_commands"]
    assert prepared["worker_setup_commands"] == written["setup_commands"]


def test_ec2_knows_every_option_of_the_nodes(prepared):
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    for node_type in prepared["available_node_types"].values():
        validate_parameters({**node_type["node_config"], "MinCount": 1, "MaxCount": 1}, model.input_shape)


def test_image_has_the_locked_ray_and_a_supported_python(written):
    image = re.fullmatch(r"rayproject/ray:([0-9.]+)-py3(\d+)-gpu", written["docker"]["image"])
    assert image, "pin the image to a release of Ray"
    assert image[1] == locked_version("ray")
    assert 11 <= int(image[2]) < 14


def test_head_is_kept_and_runs_no_tasks(prepared):
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_gpu_nodes_are_spot_and_go_when_idle(prepared):
    gpu = prepared["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0
    assert 0 < gpu["max_workers"] <= prepared["max_workers"]
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert 0 < prepared["idle_timeout_minutes"] <= 60
    assert prepared["provider"]["cache_stopped_nodes"] is False


def test_every_node_reaches_the_bucket_by_its_role(prepared):
    for node_type in prepared["available_node_types"].values():
        assert node_type["node_config"]["IamInstanceProfile"].keys() == {"Name"}


def test_containers_get_shared_memory_and_open_files(written):
    docker = written["docker"]
    for kind in ("head", "worker"):
        options = docker["run_options"] + docker[f"{kind}_run_options"]
        assert any(option.startswith("--shm-size=") for option in options)
        assert any(option.startswith("--ulimit nofile=") for option in options)


def test_token_authentication_is_on_everywhere(written):
    assert "--env RAY_AUTH_MODE=token" in written["docker"]["run_options"]
    assert written["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    # No command turns it off again for its own process.
    assert not [command for command in all_commands(written) if "RAY_AUTH" in command]


def test_head_starts_in_the_checkout_that_is_installed(written):
    assert written["file_mounts"][CHECKOUT] == "."
    assert f"cd {CHECKOUT} && pip install -c requirements.lock -e '.[gpu]'" in written["setup_commands"]
    (start,) = [command for command in written["head_start_ray_commands"] if "ray start --head" in command]
    assert f"cd {CHECKOUT} && ray start --head" in start
    assert (REPOSITORY / "jobs" / "train.py").is_file()


def test_job_server_listens_on_the_head_only(written):
    (start,) = [command for command in written["head_start_ray_commands"] if "ray start --head" in command]
    assert "--dashboard-host=127.0.0.1" in start


def test_ray_accepts_the_variant_for_machines_that_are_there(written):
    variant = yaml.safe_load((REPOSITORY / "docs" / "cluster" / "on-premise.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(variant)))
    assert variant["docker"]["image"] == written["docker"]["image"]
    assert variant["file_mounts"] == written["file_mounts"]
    assert variant["setup_commands"] == written["setup_commands"]


def test_the_image_is_built_from_that_of_the_nodes(written):
    text = (REPOSITORY / "docs" / "cluster" / "Dockerfile").read_text()
    assert "\nARG DEVICE=gpu\n" in text
    assert f"\nFROM {written['docker']['image'].removesuffix('gpu')}${{DEVICE}}\n" in text
    for name in re.search(r"^COPY --chown=ray (.*) \./$", text, re.MULTILINE)[1].split():
        assert (REPOSITORY / name).is_file()
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"tests"}
    assert set(re.findall(r"(\w+)/__init__\.py", text)) == packages


def test_no_secret_is_in_the_file():
    text = PATH.read_text()
    # Key ids, names of secrets with a value, and anything as long and as random as a key or a token.
    assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", text)
    assert not re.search(r"(?i)(secret_access_key|session_token|RAY_AUTH_TOKEN|password)\s*[=:]", text)
    assert not re.search(r"\b(?=\w*\d)(?=\w*[A-Za-z])\w{28,}\b", text)


def all_commands(config: dict) -> list[str]:
    return [command for name, commands in config.items() if name.endswith("_commands") for command in commands]
