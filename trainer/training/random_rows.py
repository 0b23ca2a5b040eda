"""A replica's rows of random numbers that are drawn for the whole global batch, without drawing the other rows.

The Philox generator numbers what it draws: it makes four numbers from a key and a counter, and the next four from the
next counter (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405). So it can start anywhere.
"""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

_PHILOX = 1
_NUMBERS_PER_COUNT = 4


def draw_rows(seed: Any, first: Any, rows: Any, row_shape: Sequence[int]) -> Any:
    """Return some rows of what ``tf.random.stateless_uniform([all_rows, *row_shape], seed)`` returns.

    Args:
        seed: int64 ``[2]``.
        first: int scalar, the number of the first row to return.
        rows: int scalar, how many.
        row_shape: shape of a row.

    Returns:
        float32 ``[rows, *row_shape]``, uniform in [0, 1).
    """
    per_row = math.prod(row_shape)
    start, count = tf.cast(first, tf.int64) * per_row, rows * per_row
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    # The lower half of the counter is 0, and no batch has enough numbers to reach the upper half. There is no addition
    # of uint64 on every device.
    skipped = tf.bitcast(counter, tf.int64) + tf.stack([start // _NUMBERS_PER_COUNT, tf.constant(0, tf.int64)])
    drawn = tf.raw_ops.StatelessRandomUniformV2(
        # The first row may start at any of the four numbers of a counter.
        shape=[count + _NUMBERS_PER_COUNT - 1],
        key=key,
        counter=tf.bitcast(skipped, tf.uint64),
        alg=_PHILOX,
    )
    own = tf.slice(drawn, [start % _NUMBERS_PER_COUNT], [count])
    return tf.reshape(own, [rows, *row_shape])
