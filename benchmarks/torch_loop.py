"""The plain CNNs of the notes as a PyTorch loop: what somebody would write instead of the notes' script.

A contestant of `benchmarks.training`, for which PyTorch has to be installed (`pip install torch`); it is no dependency.
The same layers, batch, optimizer and images as the script's, shuffled each epoch, normalised on the device.
"""

import json
import resource
import sys
import time

import numpy as np
import torch

from benchmarks.notes_script import BATCH
from benchmarks.training import EPOCHS
from trainer.architectures import ARCHITECTURES
from trainer.training.dataset import load_manifest, open_split


def build_network(arch: str, image_size: int, channels: int, num_classes: int) -> torch.nn.Module:
    arguments = ARCHITECTURES[arch].arguments
    layers: list[torch.nn.Module] = []
    before = channels
    for filters in (image_size, *arguments["later_filters"]):
        layers += [torch.nn.Conv2d(before, filters, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        before = filters
    layers += [torch.nn.Flatten(), torch.nn.LazyLinear(1024), torch.nn.ReLU(), torch.nn.Linear(1024, num_classes)]
    return torch.nn.Sequential(*layers)


def main(dataset: str, arch: str) -> None:
    """Print when its first step and its epochs ended, as JSON."""
    manifest = load_manifest(dataset)
    split = open_split(dataset, manifest, "train")
    images = torch.from_numpy(np.moveaxis(split.take(np.arange(len(split))), -1, 1).copy())
    labels = torch.from_numpy(split.labels.astype(np.int64))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_network(arch, manifest.image_size, manifest.channels, manifest.num_classes).to(device)
    model(images[:1].to(device) / 255)  # sizes the lazy layer
    optimizer = torch.optim.Adam(model.parameters())
    rates, first_step = [], 0.0
    for _ in range(EPOCHS):
        began = time.time()
        for rows in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[rows].to(device) / 255), labels[rows].to(device))
            loss.backward()
            optimizer.step()
            first_step = first_step or time.time()
        loss.item()  # waits for the device
        rates.append(len(labels) / (time.time() - began))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"rates": rates, "first_step": first_step, "last_epoch": time.time(), "peak_gib": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
