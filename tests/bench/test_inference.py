"""An ensemble's forward pass beside a plain loop over the same six modules, its best strategy, and torchensemble's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from snapcore.ensemble import Cascade, Recipe
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.models import cnn, mlp
from snapcore_torch.strategies import STRATEGIES

from .compare import PAIRS, SECONDS, Contender, fastest
from .workloads import NAMES, Residual

MEMBERS = 6
MODELS = {"mlp": mlp, "cnn": cnn, "residual": Residual}


@pytest.mark.parametrize(("batch", "number"), [(1, 32), (32, 8), (512, 1)])
def test_forward_of_six_cnns_beside_a_plain_loop(compare, batch, number):
    models = members("cnn", side=28)
    x = torch.randn(batch, 1, 28, 28)
    compare(
        f"SnapshotEnsemble, {MEMBERS} CNNs, batch {batch}",
        _inference(SnapshotEnsemble(models), x, number),
        {"loop over the modules, then mean": _inference(plain_loop(models), x, number)},
    )


@pytest.mark.parametrize(("batch", "number"), [(1, 8), (32, 2), (512, 1)])
@pytest.mark.parametrize("model", NAMES)
def test_tuned_ensemble_beside_its_best_strategy(compare, model, batch, number):
    models, x = members(model, side=8), torch.randn(batch, 1, 8, 8)
    number *= 4 if model == "mlp" else 1
    ensemble = SnapshotEnsemble(models)
    report = ensemble.tune(x)
    run = [name for name in STRATEGIES if report[name].seconds is not None]
    fixed = {name: _inference(SnapshotEnsemble(models, strategy=name), x, number) for name in run}
    best = fastest(fixed, pairs=PAIRS, seconds=SECONDS)
    compare(
        f"PyTorch: tuned ensemble ({ensemble.strategy}), {MEMBERS} {NAMES[model]} 8×8, batch {batch}",
        _inference(ensemble, x, number),
        {
            f"its best strategy ({best})": fixed[best],
            "loop over the modules, then mean": _inference(plain_loop(models), x, number),
        },
        target="≤ 1.05",
    )


@pytest.mark.parametrize(("batch", "number"), [(1, 8), (32, 2), (512, 1)])
@pytest.mark.parametrize("model", NAMES)
def test_tuned_ensemble_beside_torchensemble(compare, model, batch, number):
    torchensemble = pytest.importorskip("torchensemble", reason="torchensemble is not installed: make bench does")
    models, x = members(model, side=8), torch.randn(batch, 1, 8, 8)
    number *= 4 if model == "mlp" else 1
    peer = torchensemble.SnapshotEnsembleClassifier(estimator=models[0], n_estimators=MEMBERS, cuda=False)
    peer.estimators_ = nn.ModuleList(models)
    ensemble = SnapshotEnsemble(models)
    torch.testing.assert_close(peer.predict(x), ensemble(x))
    ensemble.tune(x)
    compare(
        f"PyTorch: tuned ensemble ({ensemble.strategy}), {MEMBERS} {NAMES[model]} 8×8, batch {batch}",
        _inference(ensemble, x, number),
        {"torchensemble predict()": _inference(peer.predict, x, number)},
    )


def test_cascade_beside_all_members(compare):
    """One example in ten goes on to a second member, and some of them further."""
    models, x = members("cnn", side=28), torch.randn(256, 1, 28, 28)
    highest = models[-1](x).softmax(-1).sort(-1).values
    threshold = float((highest[:, -1] - highest[:, -2]).quantile(0.1))
    recipe = Recipe((1.0,) * MEMBERS, cascade=Cascade("margin", threshold, (1.0,) * MEMBERS))
    ensemble = SnapshotEnsemble(models, recipe=recipe)
    used = ensemble.cascade(x, return_used=True)[1].mean()
    compare(
        f"ensemble.cascade(x), {MEMBERS} CNNs, batch 256, {used:.2f} members an example",
        _inference(ensemble.cascade, x, 1),
        {"ensemble(x)": _inference(ensemble, x, 1)},
        target="≤ 0.4",
    )


def members(model: str, *, side: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [MODELS[model]((1, side, side), 10).eval().requires_grad_(False) for _ in range(MEMBERS)]


def plain_loop(models: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([model(x).softmax(-1) for model in models]).mean(0)


def _inference(predict: Callable[[Tensor], Tensor], x: Tensor, number: int) -> Contender:
    def run() -> None:
        with torch.inference_mode():
            predict(x)

    return Contender(run, number=number)
