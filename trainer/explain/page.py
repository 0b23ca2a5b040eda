"""Explain a run's network: attribution maps, a test of whether they mean anything, and the first layer."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from trainer.explain.perturbation import EXPLAINED, PerturbationTest, check_attribution
from trainer.inference import read_finished_run
from trainer.notes.plots import to_png
from trainer.notes.report import REPORT_NAME as OVERVIEW_NAME
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import InputError
from trainer.runtime.events import OnEvent, StageProgressed, ignore_event
from trainer.runtime.html import Section, find_links, render_sections
from trainer.runtime.pages import check_place
from trainer.training.dataset import open_split
from trainer.workers.groups import call_in_worker

# The keys of `trainer.explain.attribution.METHODS`, which imports TensorFlow.
METHOD_NAMES = ("grad_cam", "integrated_gradients", "smooth_grad", "occlusion")
REPORT_NAME = "report.html"
# The first section of every page that this program writes.
_FIRST_TITLE = "Do the maps mean anything?"
_FILTERS, _ACTIVATIONS = "filters of the first convolution", "their activations for the first image"
_PICTURE_NAME = re.compile(rf"(image-\d{{3,}}|{_FILTERS}|{_ACTIVATIONS})\.png")
_LEGEND = (
    "Below, red marks pixels that speak for the predicted class and blue those that speak against it, the more the "
    "stronger the color; grad_cam and smooth_grad have no blue, and a map of grad_cam without color found nothing that "
    "speaks for the class. The methods with the largest effect come first."
)
_SIGNIFICANCE = 0.05
_MOST_FILTERS = 64


@dataclass(frozen=True)
class ExplainedImage:
    """An image to explain."""

    name: str
    pixels: npt.NDArray[np.uint8]
    """``[height, width, channels]``."""
    label: str = ""
    """Its true class; empty if unknown."""


@dataclass(frozen=True)
class Explanation:
    """Tests and page that explain a network."""

    tests: list[PerturbationTest]
    """One for each method."""
    page: str
    """HTML, with its pictures inside."""
    pictures: dict[str, bytes]
    """PNG files by name without suffix."""


def choose_worst(uri: str, count: int) -> list[ExplainedImage]:
    """Return the ``count`` validation images with the highest loss in a finished run.

    Raises:
        InputError: the run is not finished, or its dataset or predictions are gone.
    """
    run, config, _ = read_finished_run(uri)
    manifest = run.read_manifest()
    predictions = run.read_predictions()
    if predictions is None:
        raise InputError(f"RUN {uri} has no predictions: its checkpoint is gone; choose images with --images")
    split = open_split(config.dataset, manifest, "val", config.cache_gib)
    worst = np.argsort(-predictions["loss"].to_numpy(), kind="stable")[:count]
    known = "path" in predictions.column_names
    return [
        ExplainedImage(
            predictions["path"][row].as_py() if known else f"val row {row}",
            pixels,
            manifest.class_names[split.labels[row]],
        )
        for row, pixels in zip(worst.tolist(), split.take(worst), strict=True)
    ]


def explain_run(
    uri: str,
    images: Sequence[ExplainedImage],
    methods: Sequence[str],
    resources: Resources,
    *,
    tested_images: int = 64,
    output: str,
    on_event: OnEvent = ignore_event,
) -> Explanation:
    """Compute maps of some images and test each method; `save_explanation` writes the result.

    Args:
        uri: URI of a finished run.
        images: images of the run's size and channels.
        methods: some of METHOD_NAMES; empty for all.
        resources: resources of the connected cluster.
        tested_images: number of validation images, drawn with a fixed seed, that the methods are tested on.
        output: URI of the folder that the page is for, from which its links lead, as `check_output` returns it.
        on_event: called with the progress.

    Raises:
        InputError: the run is not finished, or its model or its dataset is gone, or a method is unknown.
        JobError: the worker failed.
    """
    if unknown := [name for name in methods if name not in METHOD_NAMES]:
        raise InputError(f"--method {unknown[0]!r} is unknown; choose from {', '.join(METHOD_NAMES)}")
    # A worker has a current folder of its own.
    arguments = (storage.resolve_uri(uri), images, methods or METHOD_NAMES, tested_images, output)
    found: Explanation = call_in_worker(_explain, *arguments, resources=resources, on_event=on_event)
    return found


def check_output(uri: str, output: str) -> str:
    """Return the URI to write an explanation to: ``output``, or the folder explanations of the run if that is empty.

    Raises:
        InputError: the folder cannot be written, or has files of these names that this program did not write.
    """
    folder = storage.choose_output(output, storage.join(storage.resolve_uri(uri), "explanations"))
    pictures = [name for name in storage.find_files(folder) if _PICTURE_NAME.fullmatch(name)]
    check_place(folder, REPORT_NAME, pictures, [f"<h2>{_FIRST_TITLE}</h2>"], "--output")
    return folder


def save_explanation(explanation: Explanation, output: str) -> str:
    """Write the pictures and the page below a URI, and return the URI of the page."""
    # The page first: it vouches for the other files.
    report = storage.join(output, REPORT_NAME)
    storage.write_bytes(report, explanation.page.encode())
    for name, content in explanation.pictures.items():
        storage.write_bytes(storage.join(output, f"{name}.png"), content)
    return report


def _explain(
    uri: str,
    images: Sequence[ExplainedImage],
    methods: Sequence[str],
    tested_images: int,
    folder: str,
    send_event: OnEvent = ignore_event,
) -> Explanation:
    # Runs in a worker: the driver must not import TensorFlow.
    from trainer.explain.attribution import METHODS
    from trainer.training.devices import check_gpu

    check_gpu()
    run, config, _ = read_finished_run(uri)
    manifest = run.read_manifest()
    network = _Network(run)
    shown = network.scale(np.stack([one.pixels for one in images]))
    labels, confidence = network.predict(shown)
    split = open_split(config.dataset, manifest, "val", config.cache_gib)
    rows = np.random.default_rng(0).permutation(len(split))[:tested_images]
    sample = network.scale(split.take(np.sort(rows)))
    sample_labels, _ = network.predict(sample)
    maps, tests = {}, []
    for number, name in enumerate(methods):
        send_event(StageProgressed("explain", 2 * number, 2 * len(methods), f"{name}: maps"))
        maps[name] = METHODS[name](network.logits, shown, labels)
        send_event(StageProgressed("explain", 2 * number + 1, 2 * len(methods), f"{name}: its test"))
        of_sample = METHODS[name](network.logits, sample, sample_labels)
        tests.append(
            check_attribution(
                name,
                of_sample,
                sample,
                lambda batch: network.score(batch, sample_labels),
                _SIGNIFICANCE / len(methods),
            )
        )
    tests.sort(key=lambda test: (not test.passed, -test.effect))
    pictures = {}
    lines = [*EXPLAINED, *_describe_layer(network.logits, methods), *map(str, tests), _LEGEND]
    sections = [Section(_FIRST_TITLE, lines)]
    for index, one in enumerate(images):
        predicted = manifest.class_names[labels[index]]
        title = f"{one.name}: predicted {predicted} (confidence {confidence[index]:.2f})"
        title += f", true class {one.label}" if one.label else ""
        name = f"image-{index:03d}"
        of_image = {test.method: maps[test.method][index] for test in tests}
        pictures[name] = to_png(_draw_maps(one.pixels, of_image, {test.method for test in tests if not test.passed}))
        sections.append(Section(title, [], picture=name))
    for name, figure in network.draw_first_layer(shown[:1]).items():
        pictures[name] = to_png(figure)
        sections.append(Section(name.capitalize(), [], picture=name))
    places = {"note": run.path("note.md"), "all runs": storage.join(storage.parent(run.uri), OVERVIEW_NAME)}
    links = find_links(folder, places)
    page = render_sections(f"What {run.name} looks at", f"{config.arch}, {run.uri}", sections, pictures, links=links)
    return Explanation(tests, page, pictures)


class _Network:
    """The exported network of a run, split into the scaling of pixels, the layers up to the logits, and the scores."""

    def __init__(self, run: RunFolder) -> None:
        from trainer.training.export import load_export

        _, self._scaling, self.logits, self._head = load_export(run).layers

    def scale(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return images as the network sees them, scaled to float32."""
        return np.asarray(self._scaling(pixels.astype(np.float32)), np.float32)

    def predict(self, images: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the predicted class of each image, and its score."""
        scores = self._scores(images)
        return scores.argmax(axis=1), scores.max(axis=1)

    def score(self, images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the score of one class for each image."""
        return self._scores(images)[np.arange(len(labels)), labels]

    def draw_first_layer(self, images: npt.NDArray[np.float32]) -> dict[str, Figure]:
        """Draw the kernels of the first convolution, and their activations for the first image."""
        import tf_keras

        layer = next((one for one in self.logits.layers if isinstance(one, tf_keras.layers.Conv2D)), None)
        if layer is None:
            return {}
        kernels = np.moveaxis(np.asarray(layer.kernel), -1, 0).mean(axis=-1)
        features = np.asarray(tf_keras.Model(self.logits.inputs, layer.output)(images, training=False))[0]
        return {
            _FILTERS: _draw_grid(kernels),
            _ACTIVATIONS: _draw_grid(np.moveaxis(features, -1, 0)),
        }

    def _scores(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.asarray(self._head(self.logits(images, training=False)), np.float32)


def _describe_layer(logits: Any, methods: Sequence[str]) -> list[str]:
    """Describe which feature map Grad-CAM reads, if it is one of the methods."""
    from trainer.explain.attribution import find_features

    if "grad_cam" not in methods:
        return []
    layer = find_features(logits)
    height, width = layer.output.shape[1:3]
    return [f"grad_cam reads the layer {layer.name}, a map of {height}x{width}, enlarged to the image."]


def _draw_maps(pixels: npt.NDArray[np.uint8], maps: dict[str, Any], failed: Collection[str]) -> Figure:
    """Draw an image and its maps, with what their colors mean; those of methods that failed their test say so."""
    figure = Figure(figsize=(2.6 * (len(maps) + 1) + 1, 2.9), layout="constrained")
    first, *others = figure.subplots(1, len(maps) + 1, squeeze=False)[0]
    first.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255)
    first.set_title("image", fontsize=9)
    gray = pixels.mean(axis=-1)
    for axes, (name, values) in zip(others, maps.items(), strict=True):
        axes.imshow(gray, cmap="gray", vmin=0, vmax=255)
        # A percentile, so that one outlier does not wash out the rest.
        limit = max(float(np.percentile(np.abs(values), 99)), 1e-12)
        colored = axes.imshow(values / limit, cmap="RdBu_r", vmin=-1, vmax=1, alpha=0.6)
        if name in failed:
            axes.set_title(f"{name}: failed its test", fontsize=9, color="#b00020")
        else:
            axes.set_title(name, fontsize=9)
    for axes in figure.axes:
        axes.set_axis_off()
    legend = figure.colorbar(colored, ax=figure.axes, ticks=[-1, 0, 1], fraction=0.03)
    legend.ax.set_yticklabels(["against", "neutral", "for it"], fontsize=8)
    return figure


def _draw_grid(pictures: npt.NDArray[Any]) -> Figure:
    pictures = pictures[:_MOST_FILTERS]
    columns = min(16, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(0.7 * columns, 0.7 * rows), layout="constrained")
    places = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes in places:
        axes.set_axis_off()
    for axes, picture in zip(places, pictures, strict=False):
        axes.imshow(picture, cmap="gray")
    return figure
