"""How sure is a mean difference? The paired bootstrap over images, with percentile intervals."""

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95

# Numbers held at once, in resamples times images.
_ROOM = 1_000_000


def paired_bootstrap(differences: NDArray[np.float64], *, seed: int) -> NDArray[np.float64]:
    """Limits `[2, M]` between which the mean difference lies, with a confidence of 95 %.

    Args:
        differences: `[N, M]`: for each of N images, the differences of M measurements of it. Every resample takes the
            same images for all of them.

    Raises:
        ValueError: there are fewer than two images, or a number that is not finite.
    """
    count = len(differences)
    if count < 2:
        raise ValueError(f"{count} images have no confidence interval; valid: at least two")
    if not np.isfinite(differences).all():
        raise ValueError("a difference is not finite")
    # One of its own: the global generator is never used.
    generator = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, differences.shape[1]))
    step = max(1, _ROOM // count)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = generator.integers(count, size=(rows, count))
        # How often each image was drawn: a product then gives the sums of all columns.
        drawn += np.arange(rows)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        means[start : start + rows] = times @ differences / count
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(means, [tail, 1 - tail], axis=0)
