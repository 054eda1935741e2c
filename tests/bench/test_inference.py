"""An ensemble's forward pass beside a plain loop over the same six modules."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from snapcore_torch import SnapshotEnsemble
from snapcore_torch.models import cnn

from .compare import Contender

MEMBERS = 6


@pytest.mark.parametrize(("batch", "number"), [(1, 32), (32, 8), (512, 1)])
def test_forward_of_six_cnns_beside_a_plain_loop(compare, batch, number):
    models = [cnn((1, 28, 28), 10).eval().requires_grad_(False) for _ in range(MEMBERS)]
    ensemble = SnapshotEnsemble(models)
    x = torch.randn(batch, 1, 28, 28)

    def loop(x: Tensor) -> Tensor:
        return torch.stack([model(x).softmax(-1) for model in models]).mean(0)

    compare(
        f"SnapshotEnsemble, {MEMBERS} CNNs, batch {batch}",
        _inference(ensemble, x, number),
        {"loop over the modules, then mean": _inference(loop, x, number)},
    )


def _inference(predict: Callable[[Tensor], Tensor], x: Tensor, number: int) -> Contender:
    def run() -> None:
        with torch.inference_mode():
            predict(x)

    return Contender(run, number=number)
