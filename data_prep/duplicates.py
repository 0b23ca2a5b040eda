"""Find images that are identical or nearly so, so that no two of them end up in different splits."""

import functools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_prep.columns import Splits, as_words, name_splits, sort_by_keys
from data_prep.manifest import SPLITS, DuplicateRule, binary_array

_HASH_SIDE = 16
HASH_BYTES = _HASH_SIDE * _HASH_SIDE // 8
# Re-encoded, resized or slightly brighter copies of a photo differ in a few of the hundred or so bits that are set in
# one of the two hashes. A fraction, not a number: a digit on black sets 30 bits, and other digits may differ in 6.
_MOST_DIFFERENT_SHARE = 0.06
# Smaller differences, in gray levels, are noise of the encoder in plain regions, not shape.
_LEAST_DIFFERENCE = 3.5
# A bit takes a byte while bits are permuted.
_ROWS_PER_PART = 2**16
_ORDERS = 8
_NEIGHBORS = 16


def perceptual_hash(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return a hash of 256 bits that hardly changes when an image is re-encoded, resized or brightened.

    The difference hash (Krawetz 2013, "Kind of Like That"): each bit says whether a pixel of the image, averaged down
    to 17x16 gray pixels, is brighter than its left neighbor. All sums are of whole numbers, so that every CPU finds the
    same bits.

    Args:
        pixels: uint8 ``[size, size, channels]``.
    """
    size, _, channels = pixels.shape
    rows, differences = _area_weights(size, channels)
    # Exact as float32: no sum exceeds 255 * size. Four times as fast as OpenCV's INTER_AREA.
    sums = rows @ pixels.reshape(size, -1).astype(np.float32)
    brighter = sums.astype(np.float64) @ differences > _LEAST_DIFFERENCE * size**2 * channels
    return np.packbits(brighter).tobytes()


@functools.lru_cache(maxsize=4)
def _area_weights(size: int, channels: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Return what averages the rows of an image down to 16, times size, and what takes the differences of 17 columns.

    Returns:
        float32 ``[16, size]`` and float64 ``[size * channels, 16]``.
    """

    def overlaps(cells: int) -> npt.NDArray[np.int64]:
        # In units of 1 / cells of a pixel, so that all are whole numbers.
        edges, pixels = np.arange(cells + 1) * size, np.arange(size + 1) * cells
        ends: npt.NDArray[np.int64] = np.minimum(edges[1:, None], pixels[1:])
        return np.clip(ends - np.maximum(edges[:-1, None], pixels[:-1]), 0, None)

    differences = np.diff(overlaps(_HASH_SIDE + 1), axis=0).T.repeat(channels, axis=0)
    return overlaps(_HASH_SIDE).astype(np.float32), differences.astype(np.float64)


def group_duplicates(images: pa.Table, rule: DuplicateRule) -> npt.NDArray[np.int64]:
    """Return a group number for each image; images in the same group are identical or, by the rule near, nearly so.

    Candidates are neighbors in the sorted lists of the hashes under a few fixed orders of their bits (Charikar 2002,
    section 4): near pairs share a long prefix in one of them. The work is nearly proportional to the number of images.

    Args:
        images: table with the columns pixels_sha256, of which equal ones mean identical images, and perceptual_hash.
        rule: which images are duplicates.
    """
    count = len(images)
    same = images["pixels_sha256"].combine_chunks().dictionary_encode().indices.to_numpy()
    groups: npt.NDArray[np.int64] = same.astype(np.int64)
    if rule == "exact":
        return groups
    # Values of the dictionary are in the order of their first occurrence.
    _, first_of_same = np.unique(same, return_index=True)
    pairs = [(np.arange(count), first_of_same[same])]
    hashes = binary_array(images["perceptual_hash"])
    most_different = _MOST_DIFFERENT_SHARE * hashes.shape[1] * 8
    for order in range(_ORDERS):
        by_hash = sort_by_keys(*as_words(_permute_bits(hashes, order)).T)
        words = np.ascontiguousarray(as_words(hashes[by_hash]).T)
        set_bits = np.bitwise_count(words).sum(axis=0, dtype=np.int16)
        for distance in range(1, min(_NEIGHBORS, count - 1) + 1):
            # Most pairs differ too much in their first word alone.
            first = np.flatnonzero(np.bitwise_count(words[0, :-distance] ^ words[0, distance:]) <= most_different)
            second = first + distance
            different = np.bitwise_count(words[:, first] ^ words[:, second]).sum(axis=0, dtype=np.int16)
            in_one = (set_bits[first] + set_bits[second] + different) // 2
            near = first[(different <= _MOST_DIFFERENT_SHARE * in_one) & (in_one > 0)]
            pairs.append((by_hash[near], by_hash[near + distance]))
    ones, others = (np.concatenate(side) for side in zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(ones), np.int8), (ones, others)), shape=(count, count))
    groups = connected_components(graph, directed=False)[1].astype(np.int64)
    return groups


def _permute_bits(hashes: npt.NDArray[np.uint8], order: int) -> npt.NDArray[np.uint8]:
    permutation = np.random.default_rng(order).permutation(hashes.shape[1] * 8)
    parts = np.array_split(hashes, -(-len(hashes) // _ROWS_PER_PART))
    return np.concatenate(
        [np.packbits(np.take(np.unpackbits(part, axis=1), permutation, axis=1), axis=1) for part in parts]
    )


def list_duplicates(images: pa.Table, groups: npt.NDArray[np.int64], splits: Splits) -> pa.Table:
    """Return a table of the images that have a duplicate, sorted by group: group, path, split and leaks.

    ``leaks`` is true if the group is in more than one split, which happens only if the source gives the splits.
    """
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(sizes[group_of] > 1)
    lowest, highest = np.full(len(sizes), len(SPLITS), np.int8), np.full(len(sizes), -1, np.int8)
    np.minimum.at(lowest, group_of, splits)
    np.maximum.at(highest, group_of, splits)
    table = pa.table(
        {
            "group": pa.array(group_of[rows], pa.int64()),
            "path": images["path"].take(rows),
            "split": name_splits(splits[rows]),
            "leaks": pa.array(lowest[group_of[rows]] != highest[group_of[rows]], pa.bool_()),
        }
    )
    return table.sort_by([("group", "ascending"), ("path", "ascending")])
