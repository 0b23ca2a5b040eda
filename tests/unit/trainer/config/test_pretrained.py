import hashlib
import importlib
import inspect
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.config.pretrained import (
    PUBLISHED,
    PublishedWeights,
    fetch_published,
    find_published,
    locate_published,
    read_published,
)
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.events import ignore_event

CONTENT = b"weights" * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"resnet50"}))
def test_the_files_are_those_that_keras_would_download(name):
    # tf_keras/src/applications/NAME.py: the checksum stands in a call of get_file, and nowhere else.
    module, published = importlib.import_module(f"tf_keras.src.applications.{name}"), PUBLISHED[name]
    call = re.search(rf'"{published.file_name}",\s*(\w+),[^)]*file_hash="(\w+)"', inspect.getsource(module))
    assert (getattr(module, call[1]), call[2]) == (published.url, published.md5)


def test_the_file_of_resnet50_is_that_which_keras_would_download():
    from tf_keras.src.applications import resnet

    published = PUBLISHED["resnet50"]
    assert published.url == resnet.BASE_WEIGHTS_PATH + published.file_name
    assert published.file_name == "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert published.md5 == resnet.WEIGHTS_HASHES["resnet50"][1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_scaling_and_the_order_of_colors_are_those_of_keras(name):
    module = getattr(keras.applications, name)
    pixel = tf.constant([[[[10.0, 20.0, 30.0]]]])
    scaled = module.preprocess_input(pixel).numpy().ravel()
    published = PUBLISHED[name]
    expected = (
        [30 - 103.939, 20 - 116.779, 10 - 123.68]
        if published.is_bgr
        else [10 / 127.5 - 1, 20 / 127.5 - 1, 30 / 127.5 - 1]
    )
    assert scaled == pytest.approx(expected, abs=1e-4)
    assert published.input_scaling == ("imagenet" if published.is_bgr else "symmetric")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "training-notes" / "weights"


@pytest.fixture
def server():
    """A web server that has /net.h5, /cut.h5 and nothing else; yields its URL and the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = {"/net.h5": CONTENT, "/cut.h5": CONTENT[:99]}.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()


def published_at(url: str) -> PublishedWeights:
    return PublishedWeights(url, MD5, "imagenet", is_bgr=True)


def test_weights_are_downloaded_once_and_kept_in_the_cache(cache, server, tmp_path):
    url, asked = server
    net, events = published_at(f"{url}/net.h5"), []
    for _ in range(2):
        fetch_published(net, str(tmp_path / "runs"), events.append)
    assert asked == ["/net.h5"]
    assert (cache / "net.h5").read_bytes() == CONTENT
    assert read_published(net, str(tmp_path / "elsewhere")) == CONTENT
    assert {event.stage for event in events} == {"download net.h5"}


def test_a_bucket_gets_a_copy_once_for_workers_without_internet(cache, server, bucket):
    url, asked = server
    net = published_at(f"{url}/net.h5")
    fetch_published(net, f"{bucket}/runs", ignore_event)
    assert locate_published(net, f"{bucket}/runs") == f"{bucket}/runs/weights/net.h5"
    (cache / "net.h5").unlink()
    fetch_published(net, f"{bucket}/runs", ignore_event)
    assert read_published(net, f"{bucket}/runs") == CONTENT
    fetch_published(net, f"{bucket}/others", ignore_event)
    assert asked == ["/net.h5", "/net.h5"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/net.h5", "/missing.h5"])
def test_without_the_file_the_message_says_where_to_put_it(cache, server, url, tmp_path):
    net = published_at(url if url.startswith("http") else server[0] + url)
    place = locate_published(net, str(tmp_path))
    with pytest.raises(InputError, match=rf"{net.url} cannot be downloaded \(.*\); .* put the file at {place}$"):
        fetch_published(net, str(tmp_path), ignore_event)
    # As the message says.
    storage.write_bytes(place, CONTENT)
    fetch_published(net, str(tmp_path), ignore_event)
    assert read_published(net, str(tmp_path)) == CONTENT


def test_a_download_that_is_cut_off_is_refused_and_not_kept(cache, server, tmp_path):
    with pytest.raises(InputError, match=f"whose MD5 is .*, not {MD5}: it is cut off"):
        fetch_published(published_at(f"{server[0]}/cut.h5"), str(tmp_path), ignore_event)
    assert not (cache / "cut.h5").exists()


def test_another_file_in_its_place_is_refused(cache, tmp_path):
    net = published_at("http://127.0.0.1:9/net.h5")
    storage.write_bytes(locate_published(net, str(tmp_path)), b"other")
    with pytest.raises(InputError, match=f"is not the published file: its MD5 is .*, not {MD5}; delete it"):
        read_published(net, str(tmp_path))


def test_a_name_that_is_unknown_is_refused_with_those_that_there_are():
    with pytest.raises(
        InputError, match="there are no such weights; choose from keras:vgg16, keras:vgg19, keras:resnet50"
    ):
        find_published("keras:resnet51")
    assert find_published("runs/first") is None
