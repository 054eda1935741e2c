"""The core's calibration error against torchmetrics, which needs PyTorch."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from snapcore.metrics import ece


@pytest.mark.parametrize("seed", range(5))
def test_ece_is_the_l1_calibration_error_of_torchmetrics(seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(500, 5)) * 2)
    p, y = logits.softmax(dim=-1), rng.integers(5, size=500)
    oracle = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1")
    assert ece(p.numpy(), y) == pytest.approx(float(oracle(p, torch.from_numpy(y))), abs=1e-6)
