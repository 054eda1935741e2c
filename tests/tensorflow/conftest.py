"""What the tests of the TensorFlow adapter share: scikit-learn's digits, and models."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from snapcore.data import TrainingData

collect_ignore = ["one_of_several.py"]  # scripts, which the search for doctests would import


@pytest.fixture(scope="session")
def digits():
    """The first 1,000 images as training data; the other 797 are for scoring, see `held_out`."""
    images, labels = load_digits(return_X_y=True)
    x = (images[:1000].reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    return TrainingData(x, labels[:1000], n_classes=10, batch_size=50, seed=3)


@pytest.fixture(scope="session")
def held_out():
    images, labels = load_digits(return_X_y=True)
    return (images[1000:].reshape(-1, 1, 8, 8) / 16).astype(np.float32), labels[1000:]
