"""The gradient noise scale: how many images a batch can have before more of them stop saving steps.

McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1: the gradient of a batch of B images has the expected squared
length G^2 + S / B, where G is the true gradient and S, the noise, the sum of the variances of one image's gradient. The
scale is S / G^2; with it, reaching a result takes steps in proportion to 1 + scale / B.
"""

import numpy as np
import numpy.typing as npt


def find_noise_scale(
    noises: npt.NDArray[np.floating], norms: npt.NDArray[np.floating], global_batch_size: int
) -> float:
    """Return the noise scale over some steps, in images: the ratio of two means, which vary less than their ratio.

    NaN where no step measured the noise, infinite where the gradients are no longer than their noise.

    Args:
        noises: ``[steps]``: S, as a training step measured it; NaN where it did not.
        norms: ``[steps]``: L2 norms of the gradients of the batches.
        global_batch_size: images of a batch.
    """
    measured, finite = noises[np.isfinite(noises)], norms[np.isfinite(norms)]
    if not len(measured) or not len(finite):
        return float("nan")
    noise = float(measured.mean(dtype=np.float64))
    signal = float(np.mean(finite.astype(np.float64) ** 2)) - noise / global_batch_size
    return noise / signal if signal > 0 else float("inf")
