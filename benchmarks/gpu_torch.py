"""One item of `benchmarks.gpu` in PyTorch: a network from its layers, channels_last, bfloat16 autocast.

A script by itself, for a Python that has PyTorch and need not have this project: gpu_torch.py WAY FOLDER CASE BATCH.
"""

import fcntl
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROUNDS, ROUND_SECONDS, WARM_STEPS = 4, 0.4, 5
MERGES = {"Add": sum, "Concatenate": lambda tensors: torch.cat(tensors, 1)}


class Same(nn.Module):
    """Padding as TensorFlow's "same"."""

    def __init__(self, kernel: int, strides: int, value: float = 0.0) -> None:
        super().__init__()
        self.kernel, self.strides, self.value = kernel, strides, value

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images with a border."""
        size = images.shape[-1]
        pad = max((math.ceil(size / self.strides) - 1) * self.strides + self.kernel - size, 0)
        return nn.functional.pad(images, (pad // 2, pad - pad // 2) * 2, value=self.value) if pad else images


class FromLayers(nn.Module):
    """A network of the layers that `benchmarks.gpu` has written."""

    def __init__(self, described: dict) -> None:
        super().__init__()
        image = torch.zeros(2, described["channels"], described["size"], described["size"])
        self.parts = nn.ModuleDict()
        # Name, kind, and the layers before it; the images are what no layer makes.
        self.order: list[tuple[str, str, list[str]]] = []
        examples: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, kind, values, before in described["layers"]:
                if kind == "InputLayer":
                    continue
                self.order.append((name, kind, before))
                inputs = [examples.get(one, image) for one in before]
                if kind not in MERGES:
                    self.parts[name] = nn.Sequential(*build_layer(kind, values, inputs[0]))
                    self.parts[name].eval()
                examples[name] = self.call(name, kind, inputs)
        self.train()

    def call(self, name: str, kind: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Return the output of a layer."""
        if kind in MERGES:
            return MERGES[kind](inputs)
        output: torch.Tensor = self.parts[name](inputs[0])
        return output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        outputs: dict[str, torch.Tensor] = {}
        for name, kind, before in self.order:
            outputs[name] = self.call(name, kind, [outputs.get(one, images) for one in before])
        return outputs[self.order[-1][0]]


def build_layer(kind: str, values: dict, example: torch.Tensor) -> list[nn.Module]:
    """Return the modules of a Keras layer, for inputs like the example."""
    modules: list[nn.Module] = []
    inputs, activation = example.shape[1], values.get("activation")
    if kind in ("Conv2D", "MaxPooling2D"):
        convolves = kind == "Conv2D"
        kernel, strides = values["kernel_size" if convolves else "pool_size"], values["strides"]
        if values["padding"] == "same":
            modules.append(Same(kernel, strides, 0.0 if convolves else -math.inf))
        if convolves:
            modules.append(nn.Conv2d(inputs, values["filters"], kernel, strides, bias=values["use_bias"]))
        else:
            modules.append(nn.MaxPool2d(kernel, strides))
    elif kind == "ZeroPadding2D":
        modules.append(nn.ZeroPad2d(values["padding"][0][0]))
    elif kind == "BatchNormalization":
        modules.append(nn.BatchNorm2d(inputs, values["epsilon"]))
    elif kind == "GlobalAveragePooling2D":
        modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    elif kind == "Flatten":
        modules.append(nn.Flatten())
    elif kind == "Dense":
        modules.append(nn.Linear(inputs, values["units"], bias=values["use_bias"]))
    elif kind == "Dropout":
        modules.append(nn.Dropout(values["rate"]))
    elif kind == "Activation":
        pass
    else:
        sys.exit(f"no layer {kind} in PyTorch here")
    if activation not in (None, "linear"):
        modules.append({"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}[activation]())
    return modules


def process_start() -> float:
    """Return when this process began, as `benchmarks.gpu` does, which this script does without."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def main(way: str, folder: str, case: str, batch: int) -> None:
    described = json.loads(Path(folder, f"{case}.json").read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    model = FromLayers(described).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=device == "cuda")
    shape = (batch, described["channels"], described["size"], described["size"])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, described["classes"], (batch,), device=device)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return nn.functional.cross_entropy(model(images.float() / 60 - 2).float(), labels)

    forward = torch.compile(loss_of) if way == "torch.compile" else loss_of

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(images, labels)
        loss.backward()
        optimizer.step()
        return loss

    step().item()
    first = time.time() - process_start()
    for _ in range(WARM_STEPS):
        step().item()
    rounds, host = [], []
    for _ in range(ROUNDS):
        with open(Path(folder, "device.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            step().item()
            start = time.perf_counter()
            step().item()
            count = max(2, round(ROUND_SECONDS / (time.perf_counter() - start)))
            start = time.perf_counter()
            for _ in range(count):
                loss = step()
            host.append((time.perf_counter() - start) / count)
            loss.item()
            rounds.append((time.perf_counter() - start) / count)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    measured = {"first_seconds": first, "step_seconds": rounds, "host_seconds": min(host), "peak_gib": peak}
    print(json.dumps({**measured, "kernels": math.nan}), flush=True)
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step().item()
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
        print(json.dumps({**measured, "kernels": kernels}), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(sys.argv[2], "inductor")))
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
