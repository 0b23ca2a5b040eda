"""The training step on one GPU: with and without XLA, against model.fit of the same layers, and against PyTorch.

Every item is one network in one way, a process of its own with a time limit, and prints one line as soon as it has been
measured, so that what was measured stays if the machine is lost. Several processes start and compile at once; they
take turns at the GPU, by rounds. The median of the rounds counts: a process that still compiles may try kernels during
one of another. Images are random and in memory. Every way has the same layers, batch, precision and optimizer (AdamW).
This project's steps augment as well, as the recipe says, and model.fit and PyTorch do not.

PyTorch with channels_last and bfloat16 autocast takes part where the Python of --torch-python has it; it need not be
this one.

Small networks are also measured with 20 steps in a call (xla-20, plain-20). --tiny shows on CPUs that all of it runs.

Marks: at least PyTorch's images/s by torch.compile, and 1.5 times those of model.fit.

Run: python -m benchmarks gpu [--total 300] [--only resnet50,alexnet] [--torch-python PYTHON] [--tiny]
"""

import contextlib
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.table import Mark, describe_machine
from trainer.runtime.cluster import read_machine

HERE, TORCH = "benchmarks.gpu", Path(__file__).with_name("gpu_torch.py")
ROUNDS = 4
ROUND_SECONDS = 0.4
WARM_STEPS = 5
# A process with less time is not started.
LEAST_SECONDS = 5


@dataclass(frozen=True)
class Case:
    """A network on random images."""

    arch: str
    size: int
    channels: int
    classes: int
    batch: int
    tiny: dict[str, Any]
    """Arguments of the architecture for --tiny, which shows that this runs."""


CASES = {
    "resnet50": Case("resnet50", 224, 3, 1000, 256, {"width": 0.125, "blocks": [1, 1, 1, 1]}),
    "vgg19": Case("vgg19", 224, 3, 1000, 128, {"filters": [8, 8, 16, 16, 16], "dense_units": 32}),
    "alexnet": Case("alexnet", 227, 3, 1000, 512, {"width": 0.05, "dense_units": 16}),
    "cnn_tapered": Case("cnn_tapered", 250, 1, 10, 256, {"first_filters": 4, "dense_units": 8}),
    "small_cnn": Case("cnn_softmax", 28, 1, 10, 64, {"first_filters": 4, "dense_units": 8}),
    "small_alexnet": Case("alexnet", 67, 1, 10, 344, {"width": 0.05, "dense_units": 16}),
}
# Enough for --tiny: they have every kind of layer.
TINY_CASES = ("resnet50", "alexnet", "small_cnn")
TINY_SIZE, TINY_BATCH = 67, 4
WAYS = ("xla", "xla-20", "plain", "plain-20", "fit", "torch.compile", "torch")


@dataclass
class Measured:
    """What one item prints, as JSON: after it was timed, and once more when its kernels have been counted."""

    first_seconds: float
    """From the start of the process to the end of the first step."""
    step_seconds: list[float]
    """Of each round."""
    host_seconds: float
    """A step, until it has been handed to the device."""
    kernels: float
    """On the device, a step; NaN where there is no GPU."""
    peak_gib: float


def main(
    total: Annotated[float, typer.Option(help="Seconds for everything; what has not begun by then is left out.")] = 300,
    only: Annotated[
        str,
        typer.Option(
            help=f"Cases, separated by commas. Default: {','.join(CASES)}; with --tiny {','.join(TINY_CASES)}."
        ),
    ] = "",
    ways: Annotated[str, typer.Option(help="Ways, separated by commas.")] = ",".join(WAYS),
    limit: Annotated[float, typer.Option(help="Seconds for one process.")] = 150,
    jobs: Annotated[int, typer.Option(help="Processes that start and compile at once, at most one a core.")] = 6,
    precision: Annotated[str, typer.Option(help="Of everything but PyTorch's.")] = "mixed_bfloat16",
    torch_python: Annotated[str, typer.Option(help="A Python that has PyTorch.")] = sys.executable,
    tiny: Annotated[bool, typer.Option(help="Narrow networks and batches of 4, to see that it runs.")] = False,
) -> None:
    started = time.monotonic()
    print(", ".join([*describe_machine().values(), read_machine().hardware]), flush=True)
    print(_LINE.format("case", "way", "images/s", "ms", "host ms", "kernels", "GiB", "first s"), flush=True)
    rates: dict[tuple[str, str], float] = {}
    chosen = only.split(",") if only else TINY_CASES if tiny else CASES
    items = [(name, way) for way in ways.split(",") for name in chosen if _is_asked(name, way)]
    if any(_is_torch(way) for _, way in items) and not _has_torch(torch_python):
        print(f"PyTorch is left out: {torch_python} has none; give --torch-python", flush=True)
        items = [(name, way) for name, way in items if not _is_torch(way)]
    jobs = min(jobs, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def measure(name: str, way: str) -> None:
            if _is_torch(way) and not _wait_for_layers(Path(folder, f"{name}.json"), ours[name]):
                print(
                    f"{name:<14} {way:<14} left out: its layers are written by one of {', '.join(WAYS[:5])}", flush=True
                )
                return
            left = total - (time.monotonic() - started)
            outcome = _run_item(name, way, precision, torch_python, tiny, folder, min(left, limit))
            if isinstance(outcome, str):
                print(f"{name:<14} {way:<14} {outcome}", flush=True)
                return
            batch = TINY_BATCH if tiny else CASES[name].batch
            rates[name, way] = batch / statistics.median(outcome.step_seconds)
            print(_format_line(name, way, rates[name, way], outcome), flush=True)

        ours: dict[str, list[Future[None]]] = {name: [] for name in chosen}
        for name, way in sorted(items, key=lambda item: _is_torch(item[1])):
            future = pool.submit(measure, name, way)
            if not _is_torch(way):
                ours[name].append(future)
    # The marks are those of real sizes on a GPU.
    for mark in [] if tiny else _marks(rates):
        print(mark, flush=True)


def _is_torch(way: str) -> bool:
    return way.startswith("torch")


def _is_asked(name: str, way: str) -> bool:
    """Return whether a way is of use for a case: only a small network waits for the host."""
    return "-" not in way or name.startswith("small")


def _has_torch(python: str) -> bool:
    """Return whether a Python has PyTorch."""
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        return subprocess.run([python, "-c", find], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def _wait_for_layers(path: Path, writers: list[Future[None]]) -> bool:
    """Wait for a file that the first process of a case writes, and return whether it is there."""
    while not path.exists() and not all(one.done() for one in writers):
        time.sleep(0.2)
    return path.exists()


_LINE = "{:<14} {:<14} {:>9} {:>8} {:>8} {:>8} {:>6} {:>8}"


def _format_line(name: str, way: str, rate: float, measured: Measured) -> str:
    milliseconds = statistics.median(measured.step_seconds) * 1000
    return _LINE.format(
        *(name, way, f"{rate:.0f}", f"{milliseconds:.2f}", f"{measured.host_seconds * 1000:.2f}"),
        *(f"{measured.kernels:.0f}", f"{measured.peak_gib:.2f}", f"{measured.first_seconds:.1f}"),
    )


def _marks(rates: dict[tuple[str, str], float]) -> Iterator[Mark]:
    for (name, way), rate in rates.items():
        for other, limit in (("torch.compile", 1.0), ("fit", 1.5)):
            if way.startswith("xla") and (name, other) in rates:
                yield Mark(f"{name}, {way}, images/s against {other}", rate / rates[name, other], limit)


def _run_item(
    name: str, way: str, precision: str, torch_python: str, tiny: bool, folder: str, seconds: float
) -> Measured | str:
    """Measure in a process of its own; return why there is no measurement if there is none.

    What a process printed before it failed or was given up counts.
    """
    if seconds < LEAST_SECONDS:
        return "left out: no time left"
    words = [name, way, precision, str(int(tiny)), folder]
    environment = dict(os.environ)
    if _is_torch(way):
        command = [torch_python, str(TORCH), way, folder, name, str(TINY_BATCH if tiny else CASES[name].batch)]
        if torch_python != sys.executable:
            # Its packages are its own.
            environment = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    else:
        command = [sys.executable, "-m", HERE, *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment)
        errors = done.stderr.decode().strip().splitlines() or ["no output"]
        output, problem = done.stdout, f"failed: {errors[-1][:200]}"
    except subprocess.TimeoutExpired as error:
        output, problem = error.stdout or b"", f"given up after {seconds:.0f} s"
    lines = [line for line in output.decode().splitlines(keepends=True) if line.startswith("{") and line.endswith("\n")]
    return Measured(**json.loads(lines[-1])) if lines else problem


@contextlib.contextmanager
def _own_device(folder: str) -> Iterator[None]:
    """Keep the other processes off the device in the context."""
    with open(Path(folder, "device.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _time_calls(call: Callable[[], Any], folder: str) -> tuple[list[float], float]:
    """Return the seconds of a call by rounds, and the least that handing one over took."""
    import numpy as np

    rounds, host = [], []
    for _ in range(ROUNDS):
        with _own_device(folder):
            np.asarray(call())
            began = time.perf_counter()
            np.asarray(call())
            count = max(2, round(ROUND_SECONDS / (time.perf_counter() - began)))
            began = time.perf_counter()
            for _ in range(count):
                answer = call()
            host.append((time.perf_counter() - began) / count)
            np.asarray(answer)
            rounds.append((time.perf_counter() - began) / count)
    return rounds, min(host)


def measure_ours(name: str, way: str, precision: str, tiny: bool, folder: str) -> Iterator[Measured]:
    """Measure a step of this project, or of model.fit; yield that twice, as `Measured` says."""
    began = _process_start()
    from trainer.runtime.cluster import WORKER_ENVIRONMENT

    os.environ.update(WORKER_ENVIRONMENT)
    import numpy as np
    import tensorflow as tf

    from trainer.training.devices import peak_memory_gib, share_devices
    from trainer.training.network import build_network
    from trainer.training.step import compile_execution

    share_devices(1)
    case = CASES[name]
    manifest, config = _configure(case, precision, tiny)
    network = build_network(manifest, config, steps_per_epoch=1000)
    write_layers(network.model, Path(folder, f"{name}.json"), manifest)
    random = np.random.default_rng(0)
    kind, _, number = way.partition("-")
    steps = int(number or 1)
    size = manifest.image_size
    images = tf.constant(
        random.integers(0, 256, (steps, config.global_batch_size, size, size, case.channels), np.uint8)
    )
    labels = tf.constant(random.integers(0, case.classes, images.shape[:2], np.int32))
    if kind == "fit":
        call = _fit_step(manifest, config, images[0], labels[0])
    else:
        execute = compile_execution(network, manifest, config, use_xla=kind == "xla", repeats=steps > 1)

        def call() -> Any:
            return execute(images, labels)

    np.asarray(call())
    first = time.time() - began
    for _ in range(WARM_STEPS):
        np.asarray(call())
    rounds, host = _time_calls(call, folder)
    measured = Measured(first, [one / steps for one in rounds], host / steps, math.nan, peak_memory_gib())
    yield measured
    yield replace(measured, kernels=_count_kernels(call) / steps)


def _configure(case: Case, precision: str, tiny: bool) -> tuple[Any, Any]:
    from data_prep.manifest import Manifest, Split
    from trainer.config.batch_table import given_batch
    from trainer.config.request import parse_request, resolve

    split = Split(rows_per_class=[100] * case.classes, files=[])
    manifest = Manifest.model_construct(
        image_size=min(case.size, TINY_SIZE) if tiny else case.size,
        channels=case.channels,
        class_names=[f"class {number}" for number in range(case.classes)],
        splits={"train": split, "val": split, "test": split},
        pixel_mean=[120.0] * case.channels,
        pixel_std=[60.0] * case.channels,
        fingerprint="0" * 64,
    )
    options = {
        "arch": case.arch,
        "optimizer": "adamw",
        "dataset": "/random",
        "arch_arguments": case.tiny if tiny else {},
    }
    request = parse_request(options)
    return manifest, resolve(
        request, manifest, 1, given_batch(request.batch, TINY_BATCH if tiny else case.batch, precision)
    )


def _fit_step(manifest: Any, config: Any, images: Any, labels: Any) -> Callable[[], Any]:
    """Return the step that model.fit takes, of the same layers and optimizer."""
    import tensorflow as tf
    import tf_keras as keras

    from trainer.architectures import build_model
    from trainer.training.scaling import build_scaling

    # A model of its own: model.fit has no strategy here.
    layers = build_model(
        config.arch, manifest.image_size, manifest.channels, manifest.num_classes, config.arch_arguments
    )
    inputs = keras.Input(images.shape[1:], dtype="uint8")
    scaled = build_scaling(manifest, config)(tf.cast(inputs, tf.float32))
    model = keras.Model(inputs, layers(scaled))
    model.compile(
        keras.optimizers.AdamW(1e-3, global_clipnorm=config.clip_norm or None, jit_compile=False),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    train = model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).cache().repeat())
    return lambda: train(batches)["loss"]


def _count_kernels(call: Callable[[], Any], calls: int = 3) -> float:
    """Return how many kernels the device ran for a call of this process; NaN where there is no GPU."""
    import numpy as np
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    if not tf.config.list_physical_devices("GPU"):
        return float("nan")
    with tempfile.TemporaryDirectory() as traces:
        tf.profiler.experimental.start(traces)
        for _ in range(calls):
            answer = call()
        np.asarray(answer)
        tf.profiler.experimental.stop()
        (trace,) = Path(traces).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(trace.read_bytes())
    streams = [
        line
        for plane in space.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
    ]
    return sum(len(line.events) for line in streams) / calls


def write_layers(model: Any, path: Path, manifest: Any) -> None:
    """Write the layers of a network, each with the layers that it takes, for `benchmarks.gpu_torch`."""
    layers = []
    for layer in model.layers:
        node = layer.inbound_nodes[0]
        before = [node.inbound_layers] if not isinstance(node.inbound_layers, list) else node.inbound_layers
        values = {
            name: value[0] if isinstance(value, tuple | list) and name != "padding" else value
            for name, value in layer.get_config().items()
            if isinstance(value, str | int | float | bool | tuple | list)
        }
        layers.append([layer.name, type(layer).__name__, values, [one.name for one in before]])
    part = path.with_suffix(f".{os.getpid()}")
    images = {"size": manifest.image_size, "channels": manifest.channels, "classes": manifest.num_classes}
    part.write_text(json.dumps({"layers": layers, **images}))
    part.replace(path)


def _process_start() -> float:
    """Return when this process began, as time.time says it: proc(5), field 22 of stat."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    _name, _way, _precision, _tiny, _folder = sys.argv[1:]
    for _measured in measure_ours(_name, _way, _precision, bool(int(_tiny)), _folder):
        print(json.dumps(asdict(_measured)), flush=True)
