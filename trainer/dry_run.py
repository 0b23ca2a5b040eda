"""Describe what a run would do without starting it: its config as far as it is known, and what would be measured."""

from typing import Any

from data_prep.manifest import Manifest, read_manifest
from trainer.batch.finder import describe_search, recall_batch
from trainer.config.recipes import describe_rescaling
from trainer.config.request import RunRequest, format_options, resolve
from trainer.launch import describe_steps, embedded_dataset, load_checked_manifest
from trainer.runtime.cluster import Resources
from trainer.runtime.storage import resolve_uri
from trainer.workers.groups import parse_num_workers


def preview_run(request: RunRequest, storage_uri: str, resources: Resources) -> str:
    """Describe a run as a TOML file that ``--config`` reads; values that are not known yet are comments.

    Args:
        request: request for the run.
        storage_uri: storage of run folders and tables of batch sizes.
        resources: resources of the machine or the cluster.

    Raises:
        InputError: the run would be refused.
    """
    num_workers = parse_num_workers(request.num_workers, resources).now
    manifest = _find_manifest(request, storage_uri, resources)
    root = resolve_uri(storage_uri)
    batch = recall_batch(request, manifest, num_workers, root, resources) if manifest else None
    if manifest is None or batch is None:
        return _describe_open(request, manifest, num_workers, resources)
    config = resolve(request, manifest, num_workers, batch)
    steps = describe_steps(config, manifest)
    return "\n".join(
        [*_comment(batch.explanation, str(steps), describe_rescaling(config)), format_options(config.model_dump())]
    )


def _find_manifest(request: RunRequest, storage_uri: str, resources: Resources) -> Manifest | None:
    if request.dataset:
        return load_checked_manifest(request, resources)
    return read_manifest(embedded_dataset(request.arch, storage_uri)[0])


def _describe_open(request: RunRequest, manifest: Manifest | None, num_workers: int, resources: Resources) -> str:
    """Describe what is known before anything is measured, or before the embedded dataset is prepared."""
    batch = request.batch
    limits = batch.model_dump(include={"min_steps_per_epoch", "memory_limit_gib"}, exclude_none=True)
    known: dict[str, Any] = {"arch": request.arch, "recipe": request.recipe, "num_workers": request.num_workers}
    unknown = []
    if request.dataset:
        known["dataset"] = request.dataset
    else:
        unknown.append("dataset: 5,000 MNIST images, prepared when the first run starts")
    if batch.given_size is None:
        how = describe_search(request, manifest, num_workers, resources) if manifest else "measured on the workers"
        unknown.append(f"global_batch_size: {batch.global_batch_size}, {how}")
    else:
        known["global_batch_size"] = batch.global_batch_size
    if batch.precision == "auto":
        unknown.append("precision: the fastest that trains alike, measured on the workers")
    else:
        known["precision"] = batch.precision
    if request.epochs:
        known["epochs"] = request.epochs
    elif request.steps:
        known["steps"] = request.steps
    else:
        unknown.append("epochs: those of the recipe, or more if the batch leaves too few steps")
    known |= limits | request.settings.model_dump()
    return "\n".join([*_comment(f"on {resources.hardware}", *unknown), format_options(known)])


def _comment(*texts: str) -> list[str]:
    return [f"# {text}" for text in texts if text]
