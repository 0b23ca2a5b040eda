"""Check everything that a job needs before one is started: one line for each finding, and how to fix what is wrong."""

import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.runtime import gpu, storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import InputError
from trainer.runtime.folders import cache_folder
from trainer.runtime.markdown import format_count

_PACKAGES = ("ray", "tensorflow", "tf_keras", "pyarrow", "s3fs")
_PYTHON = ((3, 11), (3, 14))
# A dataset and Ray's objects soon need more than this.
_LEAST_DISK_GIB = 2.0
_NODE_SECONDS = 120.0
_NO_NODE = "start a node that has CPUs, or give --wait SECONDS if the cluster scales automatically"
# Start of the RuntimeError that Ray raises for a node that lacks this project.
_NOT_IMPORTED = "The remote function failed to import"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    found: str
    fix: str = ""
    """How to fix it; empty if nothing is wrong."""

    def __str__(self) -> str:
        verdict, fix = ("wrong", f"; {self.fix}") if self.fix else ("ok   ", "")
        return f"{verdict}  {self.what}: {self.found}{fix}"


@dataclass(frozen=True)
class NodeReport:
    """What a node reports about itself."""

    python: str
    packages: dict[str, str]
    keras: str
    """Package that provides ``tf.keras``."""
    gpus: int
    """Number of GPUs that TensorFlow can use."""
    free_gib: dict[str, float]
    """Free disk space in GiB, by folder that jobs write to."""
    storage_error: str
    cache_error: str = ""
    missing_for_gpus: tuple[str, ...] = ()
    """Libraries and tools that TensorFlow needs to use a GPU, and does not find."""


def check_packages() -> list[Finding]:
    """Check this Python and its packages, without importing them."""
    found = platform.python_version()
    (low, high) = _PYTHON
    fits = low <= tuple(map(int, platform.python_version_tuple()[:2])) < high
    python = Finding(
        "python", found, "" if fits else f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1} (requires-python)"
    )
    versions = _find_versions()
    missing = [name for name in _PACKAGES if name not in versions]
    packages = Finding(
        "packages",
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"install {', '.join(missing)}: pip install -c requirements.lock -e ." if missing else "",
    )
    series = {versions.get(name, "").rpartition(".")[0] for name in ("tensorflow", "tf_keras")}
    keras = Finding(
        "keras",
        "tf_keras matches tensorflow" if len(series) == 1 else "tf_keras and tensorflow have different minor versions",
        "" if len(series) == 1 else "pip install -c requirements.lock -e .",
    )
    return [python, packages, keras]


def check_cluster(storage_uri: str, resources: Resources) -> list[Finding]:
    """Check the connected cluster, on every node.

    Args:
        storage_uri: storage for runs.
        resources: resources of the cluster.
    """
    uri = storage.resolve_uri(storage_uri)
    works = resources.num_cpus >= 1
    findings = [
        Finding("ray", f"{ray.__version__}, {resources.hardware}", "" if works else _NO_NODE),
    ]
    if storage.is_local(uri) and resources.num_nodes > 1:
        findings.append(
            Finding("storage", f"{uri} is a local path, and there are {resources.num_nodes} nodes", "give s3://")
        )
    versions = _find_versions()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    inspect = ray.remote(num_cpus=0, max_retries=0)(inspect_node)
    reports = {
        node["NodeManagerAddress"] + ":" + str(node["NodeManagerPort"]): inspect.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            num_gpus=node["Resources"].get("GPU", 0),
        ).remote(uri)
        for node in nodes
    }
    for (name, reference), node in zip(reports.items(), nodes, strict=True):
        gpus = int(node["Resources"].get("GPU", 0))
        try:
            report = ray.get(reference, timeout=_NODE_SECONDS)
        except ray.exceptions.RayError as error:
            findings.append(explain_silence(name, error, gpus))
        else:
            findings += check_node(name, report, versions, gpus)
    return findings


def explain_silence(name: str, error: ray.exceptions.RayError, gpus: int) -> Finding:
    """Explain why a node did not report.

    Args:
        name: name of the node.
        error: error that Ray raised instead of the report.
        gpus: number of GPUs that Ray counts on the node.
    """
    look_there = "look at Ray's logs there"
    if isinstance(error, ray.exceptions.GetTimeoutError):
        if gpus:
            return Finding(f"node {name}", "its GPUs are in use", "run this again when the job that has them ends")
        return Finding(f"node {name}", f"no answer within {_NODE_SECONDS:.0f} s", look_there)
    lacks_project = isinstance(error, ImportError) or _NOT_IMPORTED in str(error)
    return Finding(
        f"node {name}",
        str(error).strip().splitlines()[-1],
        "install this version of the project there" if lacks_project else look_there,
    )


def inspect_node(uri: str) -> NodeReport:
    """Return the report of the node that this runs on."""
    import tensorflow as tf

    folders = [Path(tempfile.gettempdir())]
    # Check again from here: this may be the node that cannot reach the storage.
    storage.forget_answers()
    storage_error = cache_error = ""
    try:
        storage.check_access(uri)
    except InputError as refused:
        storage_error = str(refused)
    try:
        folders.append(cache_folder())
    except InputError as refused:
        cache_error = str(refused)
    return NodeReport(
        python=platform.python_version(),
        packages=_find_versions(),
        keras=tf.keras.Model.__module__.partition(".")[0],
        gpus=len(tf.config.list_physical_devices("GPU")),
        free_gib={str(folder): shutil.disk_usage(folder).free / 2**30 for folder in folders},
        storage_error=storage_error,
        cache_error=cache_error,
        missing_for_gpus=(*gpu.find_missing_libraries(), *gpu.find_missing_tools()),
    )


def check_node(name: str, report: NodeReport, versions: dict[str, str], gpus: int) -> list[Finding]:
    """Check the report of a node; return its problems, or one finding that says that it is well.

    Args:
        name: name of the node.
        report: report of the node.
        versions: versions of the driver's packages, which the node must have too.
        gpus: number of GPUs that Ray counts on the node.
    """
    others = {one: number for one, number in report.packages.items() if versions.get(one) != number}
    full = {folder: free for folder, free in report.free_gib.items() if free < _LEAST_DISK_GIB}
    disks = ", ".join(f"{folder} has {free:.1f} GiB" for folder, free in full.items())
    wrong = [
        Finding(
            "versions", f"{others}, the driver has {versions}", "install the same requirements.lock" * bool(others)
        ),
        Finding(
            "tf.keras",
            report.keras,
            "" if report.keras == "tf_keras" else "set TF_USE_LEGACY_KERAS=1: it must be tf_keras",
        ),
        Finding(
            "gpus",
            f"TensorFlow sees {report.gpus} of {gpus}",
            "pip install -e '.[gpu]', and a driver that fits its CUDA" * (report.gpus < gpus),
        ),
        Finding(
            "CUDA",
            f"not found: {', '.join(report.missing_for_gpus)}",
            gpu.FIX * bool(gpus and report.missing_for_gpus),
        ),
        Finding("disk", disks, "make room" * bool(full)),
        Finding("storage", "cannot be used", report.storage_error),
        Finding("cache", "cannot be used", report.cache_error),
    ]
    found = [Finding(f"node {name}, {one.what}", one.found, one.fix) for one in wrong if one.fix]
    room = min(report.free_gib.values())
    seen = format_count(report.gpus, "GPU")
    summary = f"tf.keras is {report.keras}, {seen}, {room:.0f} GiB of disk, storage can be written"
    return found or [Finding(f"node {name}", f"Python {report.python}, {summary}")]


def _find_versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
