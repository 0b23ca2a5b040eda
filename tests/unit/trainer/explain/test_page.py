"""The page that explains a run, made in this process instead of a worker."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from trainer.explain.page import _draw_maps, _explain, check_output, choose_worst, explain_run, save_explanation
from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import InputError
from trainer.training.dataset import open_split

RESOURCES = Resources(num_nodes=1, num_cpus=1, num_gpus=0, free_gpus=0, devices="1 core", node_memory_gib=1)


def test_the_worst_images_are_those_with_the_highest_loss(trained_run):
    worst = choose_worst(trained_run.uri, 2)
    assert [one.name for one in worst] == ["val row 1", "val row 3"]
    manifest = trained_run.read_manifest()
    split = open_split(trained_run.read_record().config.dataset, manifest, "val")
    for row, one in zip((1, 3), worst, strict=True):
        np.testing.assert_array_equal(one.pixels, split.take(np.array([row]))[0])
        assert one.label == manifest.class_names[split.labels[row]]


def test_a_run_without_its_predictions_is_refused_with_what_to_do(trained_run):
    for name in storage.find_files(trained_run.checkpoints):
        storage.delete_file(storage.join(trained_run.checkpoints, name))
    with pytest.raises(InputError, match=r"first has no predictions: its checkpoint is gone; .* --images"):
        choose_worst(trained_run.uri, 2)


def test_an_unknown_method_is_refused_before_anything_is_started(trained_run):
    with pytest.raises(InputError, match="--method 'lime' is unknown; choose from grad_cam, integrated_gradients"):
        explain_run(trained_run.uri, [], ["grad_cam", "lime"], RESOURCES, output="")


def test_the_page_has_a_verdict_for_each_method_and_a_picture_for_each_image(trained_run, tmp_path):
    methods = ("grad_cam", "integrated_gradients")
    images = choose_worst(trained_run.uri, 2)
    events = []
    storage.write_bytes(trained_run.path("note.md"), b"")
    explanation = _explain(trained_run.uri, images, methods, 5, str(tmp_path), events.append)
    assert [str(event) for event in events] == [
        f"explain: {done} of 4, {method}: {part}"
        for done, (method, part) in enumerate(itertools.product(methods, ("maps", "its test")))
    ]
    assert {(one.method, one.threshold) for one in explanation.tests} == {(name, 0.025) for name in methods}
    # Those that fail come last, the largest effect first.
    keys = [(not one.passed, -one.effect) for one in explanation.tests]
    assert keys == sorted(keys)
    names = ["image-000", "image-001", "filters of the first convolution", "their activations for the first image"]
    assert list(explanation.pictures) == names
    assert all(content.startswith(b"\x89PNG") for content in explanation.pictures.values())
    titles = re.findall(r"<h2>(.*)</h2>", explanation.page)
    assert titles[0] == "Do the maps mean anything?"
    for title, one in zip(titles[1:3], images, strict=True):
        assert re.fullmatch(
            rf"{one.name}: predicted (cat|dog|eel) \(confidence 0\.\d\d\), true class {one.label}", title
        )
    assert set(re.findall(r'src="(.{10})', explanation.page)) == {"data:image"}
    assert "grad_cam reads the layer " in explanation.page
    (address,) = re.findall(r'<a href="(.*?)">note</a>', explanation.page)
    assert (tmp_path / address).resolve() == Path(trained_run.path("note.md")).resolve()
    assert "To test that, the quarter of an image that a method marks is blanked" in explanation.page
    for test in explanation.tests:
        assert f"{test.method}: blanking the quarter of the image that it marks" in explanation.page

    output = check_output(trained_run.uri, str(tmp_path / "out"))
    report = save_explanation(explanation, output)
    assert storage.read_bytes(report).decode() == explanation.page
    assert set(storage.find_files(output)) == {"report.html", *(f"{name}.png" for name in names)}
    assert check_output(trained_run.uri, output) == output  # its own page is replaced
    storage.delete_file(report)
    with pytest.raises(InputError, match=r"out/.*\.png was not written by this job .* another folder with --output"):
        check_output(trained_run.uri, output)


def test_the_maps_of_a_method_that_failed_say_so():
    maps = {"grad_cam": np.ones((8, 8)), "occlusion": np.ones((8, 8))}
    figure = _draw_maps(np.zeros((8, 8, 1), np.uint8), maps, {"grad_cam"})
    *maps_of, legend = figure.axes
    assert [axes.get_title() for axes in maps_of] == ["image", "grad_cam: failed its test", "occlusion"]
    assert [label.get_text() for label in legend.get_yticklabels()] == ["against", "neutral", "for it"]


@pytest.mark.parametrize("name", ["report.html", "image-000.png", "filters of the first convolution.png"])
def test_a_file_of_another_program_is_not_replaced(trained_run, tmp_path, name):
    storage.write_bytes(str(tmp_path / "out" / "holidays.png"), b"mine")
    check_output(trained_run.uri, str(tmp_path / "out"))
    storage.write_bytes(str(tmp_path / "out" / name), b"mine")
    with pytest.raises(InputError, match=rf"out/{name} was not written by this job"):
        check_output(trained_run.uri, str(tmp_path / "out"))


def test_an_explanation_goes_into_the_run_unless_another_place_is_given(trained_run):
    assert check_output(trained_run.uri, "") == trained_run.path("explanations")
