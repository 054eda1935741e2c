"""Digits in a picture, and a class for each pixel of it: made from scikit-learn's, the same for ever."""

import numpy as np
import pytest

from snapcore import DataError
from snapcore.lab.datasets import load_data


@pytest.fixture(scope="module")
def data():
    return load_data("digits-dense")


def test_there_are_as_many_pictures_as_digits_in_each_part(data):
    assert data.x_train.shape == (1347, 1, 16, 16)
    assert data.y_train.shape == (1347, 16, 16)
    assert (data.x_test.shape, data.y_test.shape) == ((450, 1, 16, 16), (450, 16, 16))
    assert (data.kind, data.n_classes, data.ignore, data.positions) == ("classes", 11, 255, (16, 16))


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_pixel_is_labelled_by_its_ink(data, part):
    images, labels = getattr(data, f"x_{part}")[:, 0], getattr(data, f"y_{part}")
    ink = np.rint((images * data.std + data.mean) * 16)
    np.testing.assert_array_equal(labels == 0, ink == 0)
    np.testing.assert_array_equal(labels == 255, (ink > 0) & (ink < 8))
    assert set(labels[ink >= 8]) == set(range(1, 11))


def test_each_half_of_a_picture_is_a_digit_of_its_part_with_its_label(data):
    digits = load_data("digits")
    known = {}
    for image, number in zip(digits.x_train[:, 0] * digits.std + digits.mean, digits.y_train, strict=True):
        known.setdefault(np.rint(image * 16).astype(int).tobytes(), int(number))
    pictures = np.rint((data.x_train[:, 0] * data.std + data.mean) * 16).astype(int)
    for picture, labels in zip(pictures[:50], data.y_train[:50], strict=True):
        for half in (slice(0, 8), slice(8, 16)):
            windows = [picture[top : top + 8, half] for top in range(9)]
            numbers = {
                known[w.tobytes()] for w in windows if w.sum() == picture[:, half].sum() and w.tobytes() in known
            }
            stroke = set(labels[:, half][(labels[:, half] > 0) & (labels[:, half] < 255)] - 1)
            assert stroke <= numbers
            assert len(stroke) == 1


def test_the_pictures_are_pinned_so_that_results_stay_comparable(data):
    assert np.bincount(data.y_test[data.y_test < 255]).tolist() == PINNED


PINNED = [85772, 1804, 1694, 1966, 1858, 2054, 1376, 1866, 1704, 2060, 2182]


def test_pictures_are_kept_back_by_the_seed_and_nothing_is_lost(data):
    one, other = (load_data("digits-dense", held_out=0.1, seed=seed) for seed in (0, 1))
    assert (len(one.y_train), len(one.y_held_out)) == (1212, 135)
    assert not np.array_equal(one.y_held_out, other.y_held_out)
    together = np.concatenate([one.y_train, one.y_held_out]).reshape(1347, -1)
    np.testing.assert_array_equal(np.sort(together.sum(axis=1)), np.sort(data.y_train.reshape(1347, -1).sum(axis=1)))


def test_a_directory_is_refused_rather_than_left_unread(tmp_path):
    with pytest.raises(DataError, match="digits-dense comes with scikit-learn"):
        load_data("digits-dense", tmp_path)
