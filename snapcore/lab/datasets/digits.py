"""The digits that come with scikit-learn: 1797 images of 8x8, split once and for all."""

import numpy as np

from snapcore.errors import DataError
from snapcore.lab.datasets.arrays import Arrays

_TEST_SIZE = 450


def read_digits() -> Arrays:
    """Return 1347 images to train on and 450 to test on, pixels in 0..1.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise DataError("digits needs scikit-learn: pip install 'snapcore[lab]'") from error
    pixels, labels = load_digits(return_X_y=True)
    images, labels = np.reshape(pixels, (-1, 8, 8)) / 16, np.asarray(labels)
    # NumPy promises the raw stream for ever, but not what `permutation` makes of it.
    order = np.argsort(np.random.PCG64(2017).random_raw(len(images)), kind="stable")
    test, train = order[:_TEST_SIZE], order[_TEST_SIZE:]
    return Arrays(images[train], labels[train], images[test], labels[test])
