"""The digits that come with scikit-learn: 1797 images of 8x8, split once and for all."""

import numpy as np

from snapcore.lab.datasets.arrays import Arrays, scikit_learn, seeded_order

_TEST_SIZE = 450


def read_digits() -> Arrays:
    """Return 1347 images to train on and 450 to test on, pixels in 0..1.

    Raises:
        DataError: scikit-learn is not installed.
    """
    pixels, labels = scikit_learn("datasets", "digits").load_digits(return_X_y=True)
    images, labels = np.reshape(pixels, (-1, 8, 8)) / 16, np.asarray(labels)
    order = seeded_order(len(images))
    test, train = order[:_TEST_SIZE], order[_TEST_SIZE:]
    return Arrays(images[train], labels[train], images[test], labels[test])
