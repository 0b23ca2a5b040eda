"""Find images that are identical or nearly so, so that no two of them end up in different splits."""

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_prep.manifest import SPLITS, SplitName

_HASH_SIDE = 16
HASH_BYTES = _HASH_SIDE * _HASH_SIDE // 8
# Re-encoded, resized or slightly brighter copies of a photo differ in a few of the hundred or so bits that are set in
# one of the two hashes. A fraction, not a number: a digit on black sets 30 bits, and other digits may differ in 6.
_MOST_DIFFERENT_SHARE = 0.06
# Smaller differences, in gray levels, are noise of the encoder in plain regions, not shape.
_LEAST_DIFFERENCE = 3
_ORDERS = 8
_NEIGHBORS = 16


def perceptual_hash(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return a hash of 256 bits that hardly changes when an image is re-encoded, resized or brightened.

    The difference hash (Krawetz 2013, "Kind of Like That"): each bit says whether a pixel of the image, averaged down
    to 17x16 gray pixels, is brighter than its left neighbor.

    Args:
        pixels: uint8 ``[height, width, channels]``.
    """
    small = cv2.resize(pixels, (_HASH_SIDE + 1, _HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    gray = small.mean(axis=2) if small.ndim == 3 else small
    return np.packbits(np.diff(gray, axis=1) > _LEAST_DIFFERENCE).tobytes()


def group_duplicates(pixels_sha256: npt.NDArray[np.str_], hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return a group number for each image; images in the same group are identical or nearly so.

    Candidates are neighbors in the sorted lists of the hashes under a few fixed orders of their bits (Charikar 2002,
    section 4): near pairs share a long prefix in one of them. The work is nearly proportional to the number of images.

    Args:
        pixels_sha256: hash of the pixels of each image; equal hashes mean identical images.
        hashes: uint8 ``[images, HASH_BYTES]``, the `perceptual_hash` of each image.
    """
    count = len(hashes)
    _, same = np.unique(pixels_sha256, return_inverse=True)
    first_of_same = np.full(same.max() + 1, count)
    np.minimum.at(first_of_same, same, np.arange(count))
    pairs = [(np.arange(count), first_of_same[same])]
    bits = np.unpackbits(hashes, axis=1)
    for order in range(_ORDERS):
        permuted = np.packbits(bits[:, np.random.default_rng(order).permutation(bits.shape[1])], axis=1)
        by_hash = np.lexsort(permuted.T[::-1])
        for distance in range(1, min(_NEIGHBORS, count - 1) + 1):
            one, other = by_hash[:-distance], by_hash[distance:]
            different_bits = np.bitwise_count(hashes[one] ^ hashes[other]).sum(axis=1, dtype=np.int64)
            set_bits = np.bitwise_count(hashes[one] | hashes[other]).sum(axis=1, dtype=np.int64)
            near = (different_bits <= _MOST_DIFFERENT_SHARE * set_bits) & (set_bits > 0)
            pairs.append((one[near], other[near]))
    ones, others = (np.concatenate(side) for side in zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(ones), np.int8), (ones, others)), shape=(count, count))
    groups: npt.NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return groups


def list_duplicates(images: pa.Table, groups: npt.NDArray[np.int64], splits: list[SplitName]) -> pa.Table:
    """Return a table of the images that have a duplicate, sorted by group: group, path, split and leaks.

    ``leaks`` is true if the group is in more than one split, which happens only if the source gives the splits.
    """
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(sizes[group_of] > 1)
    _, split_of = np.unique(np.asarray(splits), return_inverse=True)
    lowest, highest = np.full(len(sizes), len(SPLITS)), np.full(len(sizes), -1)
    np.minimum.at(lowest, group_of, split_of)
    np.maximum.at(highest, group_of, split_of)
    table = pa.table(
        {
            "group": pa.array(group_of[rows], pa.int64()),
            "path": images["path"].take(rows),
            "split": pa.array([splits[row] for row in rows], pa.string()),
            "leaks": pa.array(lowest[group_of[rows]] != highest[group_of[rows]], pa.bool_()),
        }
    )
    return table.sort_by([("group", "ascending"), ("path", "ascending")])
