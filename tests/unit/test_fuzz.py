"""Whatever a file holds, reading it ends in what it means or in one clear error: no other exception, no hang.

`pytest tests/unit/test_fuzz.py --hypothesis-profile=long` tries 10,000 cases of each.
"""

import io
import json
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.decode import ImageOptions, decode_image
from data_prep.formats import RejectedImageError
from data_prep.manifest import Manifest
from data_prep.sources import find_images
from tests.conftest import REPOSITORY
from trainer.config.config import TrainConfig, validate
from trainer.runtime.errors import InputError
from trainer.study.file import Study, parse_study

MANIFEST = {
    "image_size": 32,
    "channels": 1,
    "resize": "fit",
    "background": 255,
    "class_names": ["cat", "dog"],
    "splits": {"train": {"rows_per_class": [1, 1]}},
    "shards": [],
    "tables": {},
    "rejected": {},
    "duplicate_images": 0,
    "leaked_images": 0,
    "pixel_mean": [120.0],
    "pixel_std": [60.0],
    "seed": 0,
    "val_fraction": 0.15,
    "test_fraction": 0.15,
    "source": "/images",
    "fingerprint": "f00d",
}
STUDY = (REPOSITORY / "jobs" / "schedule" / "study.toml").read_text()
CONFIG = {
    "arch": "alexnet",
    "dataset": "/d",
    "dataset_fingerprint": "f00d",
    "num_workers": 1,
    "global_batch_size": 64,
    "base_learning_rate": 0.1,
}
TABLE = "path,label,split\na.png,cat,train\nb.png,dog,val\nc.png,,\n"

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def edits(length: int):
    """Places in something of that length, with what is put there and how much of it is taken away."""
    return st.lists(st.tuples(st.integers(0, length), st.integers(0, 40), st.binary(max_size=12)), max_size=6)


def edit(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, removed, added in changes:
        content = content[:place] + added + content[place + removed :]
    return content


def attempt(expected: type[Exception], function, *arguments) -> tuple[object, str | None]:
    """Return what a function returns, or the message of the one kind of error that it may raise."""
    try:
        return function(*arguments), None
    except expected as error:
        return None, str(error)


@given(st.sampled_from(sorted(MANIFEST)), anything)
def test_a_manifest_is_read_or_refused(name, value):
    _, message = attempt(InputError, Manifest.parse, json.dumps({**MANIFEST, name: value}), "manifest.json")
    assert message is None or message.startswith("manifest.json cannot be read: ")


@given(edits(len(json.dumps(MANIFEST))))
def test_a_damaged_manifest_is_read_or_refused(changes):
    _, message = attempt(InputError, Manifest.parse, edit(json.dumps(MANIFEST).encode(), changes), "manifest.json")
    assert message is None or message.startswith("manifest.json cannot be read: ")


@given(st.sampled_from(sorted(TrainConfig.model_fields)), anything)
def test_a_config_is_read_or_refused(name, value):
    _, message = attempt(InputError, validate, TrainConfig, {**CONFIG, name: value})
    assert message is None or message.startswith("--")


@given(st.sampled_from(sorted(Study.model_fields)), anything)
def test_a_study_is_read_or_refused(name, value):
    values = {**tomllib.loads(STUDY), name: value}
    study, _ = attempt(ValueError, Study.model_validate, values)
    if study is not None:
        _, message = attempt(InputError, lambda: study.parameters)
        assert message is None or message.startswith(("scientific", "nuisance"))


@given(edits(len(STUDY)))
def test_a_damaged_study_is_read_or_refused(changes):
    text = edit(STUDY.encode(), changes).decode(errors="replace")
    _, message = attempt(InputError, parse_study, text, "study.toml")
    assert message is None or message.startswith("study.toml")


@pytest.mark.parametrize("name", ["images.csv", "images.jsonl"])
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(changes=edits(len(TABLE)))
def test_a_damaged_table_is_read_or_refused(name, changes):
    rows = [dict(zip(("path", "label", "split"), line.split(","), strict=True)) for line in TABLE.splitlines()[1:]]
    text = TABLE if name.endswith("csv") else "\n".join(map(json.dumps, rows))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(edit(text.encode(), changes))
        found, message = attempt(InputError, find_images, folder)
        assert (found is None) == (message is not None)
        paths = found.images["path"].to_pylist() if found else []
        assert all(".." not in Path(path).parts for path in paths)


def encode(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA"])
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_image_is_decoded_or_rejected(kind, data):
    content = encode(kind)
    options = ImageOptions(image_size=16)
    changes = data.draw(edits(len(content)))
    pixels, reason = attempt(RejectedImageError, decode_image, edit(content, changes), options)
    assert reason or (pixels.shape, pixels.dtype) == ((16, 16, 1), np.uint8)
