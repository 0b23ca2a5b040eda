"""The predictions of a run as people read them: with the file and the names of the classes of each image.

``predictions.parquet`` has one row per validation image, in the order of the split:

    path           string, relative to the source of the dataset
    sha256         string, hash of the source file's bytes
    label          string, the class that the dataset says
    predicted      string
    confidence     float32, the probability of the predicted class
    loss           float32, cross-entropy in nats
    mean_loss      float32, mean of the loss over the epochs: where it is high, the label may be wrong
    probabilities  float32 [num_classes], in the order of the manifest's class_names; only on request

``thumbnails.parquet`` has small pictures of the rows that `select_shown` chooses: row (int32) and image (WEBP).
"""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from trainer.record.evaluation_result import find_mistakes

PREDICTIONS_NAME = "predictions.parquet"
THUMBNAILS_NAME = "thumbnails.parquet"

_MOST_MISTAKES = 2000
_MOST_SUSPECTS = 24
_THUMBNAIL_PIXELS, _THUMBNAIL_QUALITY = 56, 60


def name_predictions(predictions: pa.Table, sources: pa.Table | None, class_names: Sequence[str]) -> pa.Table:
    """Return predictions with names of classes in place of labels, and with the file of each image.

    Args:
        predictions: label, predicted, confidence and loss of each row of a split.
        sources: path and sha256 of each row; None if they are not known.
        class_names: the names by label.
    """
    names = np.array(class_names, np.object_)
    columns = {} if sources is None else {name: sources[name] for name in ("path", "sha256")}
    for name in ("label", "predicted"):
        columns[name] = pa.array(names[predictions[name].to_numpy()], pa.string())
    columns |= {name: predictions[name] for name in ("confidence", "loss") if name in predictions.column_names}
    return pa.table(columns)


def find_suspects(predictions: pa.Table) -> npt.NDArray[np.int64]:
    """Return the rows whose labels are most likely wrong, most likely first: those with the highest mean loss.

    Only images that the best epoch predicts as another class: of the others the network has come to agree with the
    label. Only where the network held the label less likely than a guess would, on average, and is itself better than
    always predicting the most frequent class. Empty for runs of earlier versions, which did not keep the mean loss.
    """
    if "mean_loss" not in predictions.column_names:
        return np.empty(0, np.int64)
    wrong = find_mistakes(predictions, most=None)
    counts = predictions["label"].value_counts().field("counts").to_numpy()
    if len(predictions) - len(wrong) <= counts.max(initial=0):
        return wrong[:0]
    losses = predictions["mean_loss"].to_numpy()[wrong]
    suspects = wrong[np.argsort(-losses, kind="stable")]
    return suspects[: min(_MOST_SUSPECTS, int((losses > np.log(len(counts))).sum()))]


def select_shown(predictions: pa.Table) -> npt.NDArray[np.int64]:
    """Return the rows that get a thumbnail: mistakes, of very many those with the highest loss, and suspects."""
    return np.union1d(find_mistakes(predictions, most=_MOST_MISTAKES), find_suspects(predictions))


def make_thumbnails(images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> pa.Table:
    """Return small pictures of some images of a split.

    Args:
        images: uint8 ``[rows, height, width, channels]``, the images.
        rows: their rows in the split.
    """
    pictures = [_to_webp(image) for image in images]
    return pa.table({"row": pa.array(rows, pa.int32()), "image": pa.array(pictures, pa.binary())})


def _to_webp(pixels: npt.NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=_THUMBNAIL_QUALITY)
    return sink.getvalue()
