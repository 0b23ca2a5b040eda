"""Weights of `tf_keras.applications`, trained on ImageNet, by name: ``keras:resnet50``.

A job downloads a file once and keeps it in the cache of its machine, and in the storage of its runs if that is a
bucket: from there its workers read it, which need no internet.
"""

import hashlib
import http.client
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.events import OnEvent, StageProgressed
from trainer.runtime.folders import cache_folder

_PREFIX = "keras:"
_URL = "https://storage.googleapis.com/tensorflow/keras-applications"
_FOLDER = "weights"
_TIMEOUT_SECONDS = 30.0
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class PublishedWeights:
    """A weight file of `tf_keras.applications`, without the layers after the last pooling."""

    url: str
    md5: str
    input_scaling: Literal["imagenet", "symmetric"]
    """Scaling of the pixels that the weights expect."""
    is_bgr: bool
    """Whether the first convolution takes blue, green and red in this order."""

    @property
    def file_name(self) -> str:
        """Name of the file."""
        return storage.basename(self.url)


# Files and checksums are in the code of `tf_keras.applications`, where importing them would take TensorFlow.
# test_pretrained.py: test_the_files_are_those_that_keras_would_download
PUBLISHED: Mapping[str, PublishedWeights] = {
    "vgg16": PublishedWeights(
        f"{_URL}/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "6d6bbae143d832006294945121d1f1fc",
        "imagenet",
        is_bgr=True,
    ),
    "vgg19": PublishedWeights(
        f"{_URL}/vgg19/vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "253f8cb515780f3b799900260a226db6",
        "imagenet",
        is_bgr=True,
    ),
    "resnet50": PublishedWeights(
        f"{_URL}/resnet/resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "4d473c1dd8becc155b73f8504c6f6626",
        "imagenet",
        is_bgr=True,
    ),
    "inception_v3": PublishedWeights(
        f"{_URL}/inception_v3/inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "bcbd6486424b2319ff4ef7d526e38f63",
        "symmetric",
        is_bgr=False,
    ),
    "xception": PublishedWeights(
        f"{_URL}/xception/xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "b0042744bf5b25fce3cb969f33bebb97",
        "symmetric",
        is_bgr=False,
    ),
}


def find_published(init_from: str) -> PublishedWeights | None:
    """Return the weights that ``keras:NAME`` names, or None if the text is a location.

    Raises:
        InputError: there are none of this name.
    """
    if not init_from.startswith(_PREFIX):
        return None
    try:
        return PUBLISHED[init_from.removeprefix(_PREFIX)]
    except KeyError:
        named = ", ".join(f"{_PREFIX}{name}" for name in PUBLISHED)
        raise InputError(f"--init-from {init_from}: there are no such weights; choose from {named}") from None


def resolve_init_from(init_from: str) -> str:
    """Return a location as `trainer.runtime.storage` takes it, and the name of published weights as it is.

    Raises:
        InputError: it is neither.
    """
    return init_from if find_published(init_from) else storage.resolve_uri(init_from)


def check_arch_of_published(init_from: str, arch: str) -> None:
    """Raise InputError where published weights are those of another architecture."""
    if find_published(init_from) and init_from != _PREFIX + arch:
        raise InputError(
            f"--init-from {init_from} has the weights of {init_from.removeprefix(_PREFIX)}, not of --arch {arch}; give "
            "both the same name"
        )


def locate_published(published: PublishedWeights, storage_uri: str) -> str:
    """Return where the workers of runs in a storage read published weights."""
    root = str(cache_folder()) if storage.is_local(storage_uri) else storage_uri
    return storage.join(root, _FOLDER, published.file_name)


def fetch_published(published: PublishedWeights, storage_uri: str, on_event: OnEvent) -> None:
    """Put published weights where `locate_published` says, unless they are there.

    Raises:
        InputError: they cannot be downloaded, or what was downloaded is not what was published.
    """
    place = locate_published(published, storage_uri)
    if storage.exists(place):
        return
    cached = str(cache_folder() / _FOLDER / published.file_name)
    if not storage.exists(cached):
        storage.write_bytes(cached, _download(published, place, on_event))
    if place != cached:
        storage.write_bytes(place, _read_whole(published, cached))


def read_published(published: PublishedWeights, storage_uri: str) -> bytes:
    """Return the file of published weights that `fetch_published` put in its place.

    Raises:
        InputError: it is gone, or is not the published file.
    """
    return _read_whole(published, locate_published(published, storage_uri))


def _read_whole(published: PublishedWeights, place: str) -> bytes:
    try:
        content = storage.read_bytes(place)
    except FileNotFoundError as error:
        raise InputError(f"{place} is gone; run the same command again") from error
    if (digest := _digest(content)) != published.md5:
        raise InputError(
            f"{place} is not the published file: its MD5 is {digest}, not {published.md5}; delete it, and run the same "
            "command again"
        )
    return content


def _download(published: PublishedWeights, place: str, on_event: OnEvent) -> bytes:
    content = bytearray()
    stage = f"download {published.file_name}"
    try:
        with urllib.request.urlopen(published.url, timeout=_TIMEOUT_SECONDS) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            while chunk := answer.read(_CHUNK_BYTES):
                content += chunk
                on_event(StageProgressed(stage, len(content) // _CHUNK_BYTES, total // _CHUNK_BYTES))
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"{published.url} cannot be downloaded ({error}); download it where there is internet, and put the file at "
            f"{place}"
        ) from error
    if (digest := _digest(content)) != published.md5:
        raise InputError(
            f"{published.url} gave a file whose MD5 is {digest}, not {published.md5}: it is cut off or another file; "
            "run the same command again"
        )
    return bytes(content)


def _digest(content: bytes | bytearray) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
