"""Ensembles of every kind, of examples, pixels and tokens: against NumPy, and the core's recipes of predictions."""

import numpy as np
import pytest
import torch
from torch import nn

from snapcore import CosineCycles, DataError, Program
from snapcore.data import TrainingData
from snapcore.ensemble import Recipe
from snapcore.run import execute
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.backend import TorchBackend
from snapcore_torch.models import mlp
from snapcore_torch.state import Copy, named_tensors

from ..kinds import KINDS, members_of, pooled_of, recipe_of

STRATEGIES = ("loop", "stacked")
SHAPES = [(8, 3), (4, 5, 3), (2, 3, 5, 3)]


def nets(outputs=4):
    generator = torch.Generator().manual_seed(5)
    members = [nn.Linear(3, outputs) for _ in range(4)]
    for member in members:
        member.weight.data = torch.randn(outputs, 3, generator=generator)
        member.bias.data = torch.randn(outputs, generator=generator)
    return members


def inputs(shape):
    return torch.linspace(-2, 2, int(np.prod(shape))).view(shape)


def outputs_of(members, x):
    return np.array([(x.double() @ net.weight.double().T + net.bias.double()).detach().numpy() for net in members])


def close(found, wanted):
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", KINDS)
def test_members_of_every_kind_are_pooled_with_and_without_a_recipe(activation, shape, strategy):
    """Classes, labels or values are on the last axis of dense outputs and of tokens."""
    members, x, recipe = nets(), inputs(shape), recipe_of(activation)
    outputs = outputs_of(members, x)
    options = {"activation": activation, "strategy": strategy, "axis": -1 if activation == "softmax" else None}
    ensemble = SnapshotEnsemble(members, **options)
    close(ensemble(x), pooled_of(activation, outputs))
    close(ensemble.members(x), members_of(activation, outputs))
    close(SnapshotEnsemble(members, recipe=recipe, **options)(x), pooled_of(activation, outputs, recipe))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mean_and_a_variance_of_one_value_come_without_an_axis_of_values(strategy):
    members, x = nets(2), inputs((8, 3))
    ensemble = SnapshotEnsemble(members, activation="gaussian", strategy=strategy)
    assert ensemble(x).shape == (8, 2)
    assert ensemble.members(x).shape == (4, 8, 2)
    close(ensemble(x), pooled_of("gaussian", outputs_of(members, x)))
    assert [tuple(each(x).shape) for each in ensemble] == [(8, 2)] * 4


def test_outputs_in_half_precision_are_pooled_in_float32():
    members, x = [net.bfloat16() for net in nets()], inputs((8, 3)).bfloat16()
    found = SnapshotEnsemble(members, activation="gaussian")(x)
    assert found.dtype == torch.float32
    outputs = np.array([net(x).detach().float().numpy() for net in members])
    close(found, pooled_of("gaussian", outputs))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_means_and_variances_have_no_logarithm_and_no_temperature(strategy):
    ensemble = SnapshotEnsemble(nets(), activation="gaussian", strategy=strategy)
    for call in (lambda: ensemble(inputs((8, 3)), log=True), lambda: ensemble.predict(inputs((8, 3)), log=True)):
        with pytest.raises(DataError, match="log=True is for probabilities, and activation='gaussian' gives means"):
            call()
    with pytest.raises(DataError, match="a recipe with a temperature needs activation="):
        SnapshotEnsemble(nets(), activation="gaussian", recipe=Recipe((1, 1, 1, 1), temperature=2.0))


def test_an_odd_number_of_outputs_is_no_pairs_of_mean_and_variance():
    with pytest.raises(DataError, match=r"'gaussian' needs outputs .*, got shape \(8, 3\)"):
        SnapshotEnsemble(nets(3), activation="gaussian")(inputs((8, 3)))


def test_a_mixture_has_a_gradient():
    x = inputs((8, 3)).requires_grad_()
    ensemble = SnapshotEnsemble(nets(2), activation="gaussian")
    assert torch.autograd.gradcheck(ensemble.double(), x.double())


def test_a_recipe_in_a_file_is_that_of_its_members(tmp_path):
    members, recipe = nets(), recipe_of("gaussian")
    with SnapshotStore(tmp_path / "run", "w") as store:
        for index, model in enumerate(members, 1):
            arrays = Copy(named_tensors(model)).resolve()
            store.save(arrays, index=index, step=index, cycle=index - 1, lr=0.1, framework="torch")
    recipe.save(tmp_path / "recipe.json")
    ensemble = SnapshotEnsemble.load(
        tmp_path / "run", members[0], activation="gaussian", recipe=tmp_path / "recipe.json"
    )
    assert len(ensemble) == 3  # one has no weight
    close(ensemble(inputs((8, 3))), pooled_of("gaussian", outputs_of(members, inputs((8, 3))), recipe))


def test_a_managed_run_of_means_and_variances_is_loaded_as_it_was_trained(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    data = TrainingData(x, x[:, 0] * 2, 1, 8, loss="gaussian-nll")
    program, backend = Program("test", CosineCycles(0.01, 20, 2)), TorchBackend()
    state = execute(program, backend, model="mlp", data=data, directory=tmp_path, device="cpu")
    outputs = [
        backend.logits(backend.restore(state, SnapshotStore(tmp_path).load(index), optimizer="keep"), x)
        for index in (1, 2)
    ]
    ensemble = SnapshotEnsemble.load(tmp_path, mlp((6,), data.n_outputs), activation="gaussian")
    np.testing.assert_allclose(ensemble.predict(x), pooled_of("gaussian", outputs), rtol=1e-4, atol=1e-5)
