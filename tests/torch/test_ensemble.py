"""The ensemble is the mean of its members' probabilities, and touches nothing that it is given."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from snapcore import CosineCycles, DataError, StoreError
from snapcore.ensemble import combine
from snapcore.metrics import score
from snapcore_torch import SnapshotEnsemble, SnapshotRun

CYCLES = CosineCycles(lr=0.2, steps=8, cycles=4)


def small():
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4))


def update(model, optimizer):
    x = torch.randn(8, 3)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x).float(), torch.randint(4, (8,))).backward()
    optimizer.step()


def train(directory, model, stop=8):
    """Return deep copies of the model at every trough, made by hand."""
    optimizer, copies = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), []
    with SnapshotRun(directory, CYCLES, model, optimizer) as run:
        for step in range(1, stop + 1):
            update(model, optimizer)
            if step % 2 == 0:
                copies.append(copy.deepcopy(model).eval())
            run.step()
        if not run.finished:
            run.finish("stopped early")
    return copies


def softmax64(logits):
    """The textbook formula in NumPy, float64."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def expected(models, x):
    """Average by hand: NumPy's softmax of every copy's own outputs, through the core's float64 mean."""
    with torch.no_grad():
        return combine([softmax64(model(x).double().numpy()) for model in models])


@pytest.fixture
def run(tmp_path):
    model = small()
    copies = train(tmp_path / "run", model)
    return tmp_path / "run", model, copies


X = torch.linspace(-2, 2, 15).view(5, 3)


@pytest.mark.parametrize("last", [None, 4, 3, 2, 1])
def test_it_is_the_mean_of_the_softmax_of_the_last_members(run, last):
    directory, model, copies = run
    ensemble = SnapshotEnsemble.load(directory, model, last=last)
    np.testing.assert_allclose(ensemble(X).numpy(), expected(copies[-(last or 4) :], X), atol=1e-6)
    assert len(ensemble.models) == (last or 4)


def test_members_are_given_one_by_one_in_the_order_they_were_taken(run):
    directory, model, copies = run
    each = SnapshotEnsemble.load(directory, model, last=3).members(X)
    assert each.shape == (3, 5, 4)
    for probabilities, by_hand in zip(each, copies[-3:], strict=True):
        assert torch.equal(probabilities, by_hand(X).softmax(-1))


def test_members_of_several_runs_meet_and_last_counts_per_run(tmp_path):
    first, second = small(), small()
    copies = [train(tmp_path / "a", first), train(tmp_path / "b", second)]
    ensemble = SnapshotEnsemble.load([tmp_path / "a", str(tmp_path / "b")], first, last=2)
    np.testing.assert_allclose(ensemble(X).numpy(), expected(copies[0][-2:] + copies[1][-2:], X), atol=1e-6)


def test_unfinished_members_are_left_out(tmp_path):
    model = small()
    copies = train(tmp_path / "run", model, stop=5)
    ensemble = SnapshotEnsemble.load(tmp_path / "run", model)
    np.testing.assert_allclose(ensemble(X).numpy(), expected(copies[:2], X), atol=1e-6)


def test_its_likelihood_is_never_worse_than_the_members_mean(run):
    """Jensen's inequality: −log of a mean is at most the mean of −log."""
    directory, model, _ = run
    x, labels = torch.randn(64, 3), torch.randint(4, (64,)).numpy()
    ensemble = SnapshotEnsemble.load(directory, model)
    alone = [score(probabilities.numpy(), labels)["nll"] for probabilities in ensemble.members(x)]
    assert score(ensemble(x).detach().numpy(), labels)["nll"] <= sum(alone) / 4


class Constant(nn.Module):
    def __init__(self, value, dtype=torch.float32):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([float(value)], dtype=dtype))

    def forward(self, x):
        return self.value.expand(len(x), 1)


@pytest.mark.parametrize(("m", "mean"), [(1, 1.0), (2, 1.5), (3, 2.0), (4, 2.5)])
def test_the_running_mean_favours_no_member(m, mean):
    """Torch-uncertainty's is biased to the first: 1, 1.33, 1.75, 2.2."""
    ensemble = SnapshotEnsemble([Constant(value) for value in range(1, m + 1)], activation="identity")
    assert ensemble(torch.zeros(2, 1)).tolist() == [[mean], [mean]]


def everything(model):
    tensors = {name: (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.clone())
               for name, tensor in model.state_dict(keep_vars=True).items()}  # fmt: skip
    return tensors, [module.training for module in model.modules()], [*map(id, model.parameters())]


def test_the_given_model_stays_exactly_as_it_is_and_does_not_grow(run):
    """Torch-uncertainty's copies join the trained model's parameters; TorchEnsemble's second fit doubles."""
    directory, model, _ = run
    model[0].weight.requires_grad_(False)
    model[1].eval()
    before = everything(model)
    for _ in range(2):
        ensemble = SnapshotEnsemble.load(directory, model)
        ensemble(X)
        assert len(ensemble.models) == 4
    (tensors, modes, parameters), (old, old_modes, old_parameters) = everything(model), before
    assert (modes, parameters) == (old_modes, old_parameters)
    assert {name: values[:3] for name, values in tensors.items()} == {n: values[:3] for n, values in old.items()}
    assert all(torch.equal(values[3], old[name][3]) for name, values in tensors.items())
    assert not {id(parameter) for parameter in ensemble.parameters()} & set(parameters)


def test_training_the_given_model_further_changes_no_member(run):
    directory, model, _ = run
    ensemble = SnapshotEnsemble.load(directory, model)
    before = ensemble(X)
    update(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert torch.equal(ensemble(X), before)


def test_members_are_not_trained(run):
    directory, model, _ = run
    ensemble = SnapshotEnsemble.load(directory, model)
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())


def test_it_evaluates_with_its_own_statistics_and_no_dropout_even_after_train(run):
    """Users fear that batch norm needs new statistics: averaging predictions needs nothing."""
    directory, model, copies = run
    model.train()
    ensemble = SnapshotEnsemble.load(directory, model)
    wrapper = nn.Sequential(ensemble)
    assert ensemble.train() is ensemble
    wrapper.train()
    assert not any(module.training for module in ensemble.modules())
    once = ensemble(X)
    assert torch.equal(once, ensemble(X))
    np.testing.assert_allclose(once.numpy(), expected(copies, X), atol=1e-6)
    means = [member[1].running_mean for member in ensemble.models]
    assert [mean.tolist() for mean in means] == [by_hand[1].running_mean.tolist() for by_hand in copies]
    assert means[0].tolist() != means[3].tolist()


def test_gradients_with_respect_to_the_input_flow_through_every_member(run):
    directory, model, copies = run
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(SnapshotEnsemble.load(directory, model)(x)[:, 0].sum(), x)
    (by_hand,) = torch.autograd.grad(sum(member(x).softmax(-1)[:, 0].sum() for member in copies) / 4, x)
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_what_the_caller_passes_in_is_never_written_to(m):
    x = torch.tensor([[0.25, 0.75]])
    ensemble = SnapshotEnsemble([nn.Identity() for _ in range(m)], activation="identity")
    found = ensemble(x)
    found += 1
    assert x.tolist() == [[0.25, 0.75]]
    assert found.tolist() == [[1.25, 1.75]]


def test_outputs_that_already_are_probabilities_are_refused_with_the_cure():
    """TorchEnsemble applies cross-entropy, and so a softmax, to probabilities."""
    members = [nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)) for _ in range(2)]
    ensemble = SnapshotEnsemble(members)
    for _ in range(2):  # and refused again, not only once
        with pytest.raises(DataError, match=r"already are probabilities.*activation='identity'"):
            ensemble(X)
    by_hand = (members[0](X) + members[1](X)) / 2
    torch.testing.assert_close(SnapshotEnsemble(members, activation="identity")(X), by_hand)


def test_logits_that_only_look_a_little_like_probabilities_pass():
    looks = torch.tensor([[0.5, 0.5], [0.9, 0.3]])
    negative = torch.tensor([[1.5, -0.5]])
    for logits in (looks, negative, torch.empty(0, 2)):
        assert SnapshotEnsemble([nn.Identity()])(logits).shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_in_half_precision_are_recognised_though_their_sums_are_rounded(dtype):
    members = [nn.Sequential(nn.Linear(3, 200), nn.Softmax(-1)).to(dtype)]
    with pytest.raises(DataError, match="already are probabilities"):
        SnapshotEnsemble(members)(X.to(dtype))
    off = torch.tensor([[0.5, 0.49]])  # in half precision as good as 1
    assert SnapshotEnsemble([nn.Identity()])(off).shape == (1, 2)
    with pytest.raises(DataError, match="already are probabilities"):
        SnapshotEnsemble([nn.Identity()])(off.to(dtype))


@pytest.mark.parametrize("strategy", ["loop", "stacked"])
def test_softmax_of_one_output_is_refused_since_it_is_one_whatever_it_is(strategy):
    members = [nn.Linear(3, 1) for _ in range(2)]
    for method in ("__call__", "members"):
        with pytest.raises(DataError, match=r"softmax over one output is 1 .* activation='sigmoid'"):
            getattr(SnapshotEnsemble(members, strategy=strategy), method)(X)
    by_hand = sum(member(X).sigmoid() for member in members) / 2
    torch.testing.assert_close(SnapshotEnsemble(members, activation="sigmoid")(X), by_hand)


def test_the_first_batch_is_checked_inside_functional_transforms_too():
    linear = nn.Linear(3, 4)
    logits, probabilities = SnapshotEnsemble([linear]), SnapshotEnsemble([nn.Softmax(-1)])
    found = torch.func.grad(lambda x: logits(x)[:, 0].sum())(X)
    by_hand = torch.func.grad(lambda x: linear(x).softmax(-1)[:, 0].sum())(X)
    torch.testing.assert_close(found, by_hand)
    with pytest.raises(DataError, match="already are probabilities"):
        torch.func.grad(lambda x: probabilities(x)[:, 0].sum())(X)


def test_only_the_first_batch_is_checked_so_that_later_ones_cost_nothing():
    ensemble = SnapshotEnsemble([nn.Identity()])
    ensemble(torch.tensor([[3.0, -1.0]]))
    assert ensemble(torch.tensor([[0.5, 0.5]])).tolist() == [[0.5, 0.5]]


def test_sigmoid_averages_independent_labels():
    found = SnapshotEnsemble([Constant(-1), Constant(2)], activation="sigmoid")(torch.zeros(1, 1))
    assert found.item() == pytest.approx((1 / (1 + math.exp(1)) + 1 / (1 + math.exp(-2))) / 2)


def test_a_callable_may_be_the_activation():
    found = SnapshotEnsemble([Constant(3), Constant(4)], activation=torch.square)(torch.zeros(1, 1))
    assert found.item() == 12.5


def test_softmax_is_over_the_last_axis_whatever_is_before_it():
    logits = torch.randn(2, 7, 5, 4)
    found = SnapshotEnsemble([nn.Identity()], axis=-1)(logits)
    np.testing.assert_allclose(found.numpy(), softmax64(logits.double().numpy()), atol=1e-6)


def test_output_picks_the_logits_out_of_what_the_model_returns():
    class Model(nn.Linear):
        def forward(self, x, *, scale):
            return {"logits": super().forward(x) * scale, "hidden": x}

    members = [Model(3, 4), Model(3, 4)]
    ensemble = SnapshotEnsemble(members, output=lambda found: found["logits"])
    by_hand = sum((nn.functional.linear(X, m.weight, m.bias) * 2).softmax(-1) for m in members) / 2
    torch.testing.assert_close(ensemble(X, scale=2), by_hand)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype):
    values = [1.0, 1 + 2**-7, 1 + 2**-7]
    ensemble = SnapshotEnsemble([Constant(value, dtype) for value in values], activation="identity")
    found = ensemble(torch.zeros(1, 1))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(sum(values) / 3, rel=1e-6)


def test_double_precision_stays_so():
    values = [1.0, 1 + 2**-40]
    found = SnapshotEnsemble([Constant(v, torch.float64) for v in values], activation="identity")(torch.zeros(1, 1))
    assert (found.dtype, found.item()) == (torch.float64, 1 + 2**-41)


def test_an_unknown_activation_is_refused_with_those_there_are():
    with pytest.raises(
        DataError, match=r"one of \['gaussian', 'identity', 'sigmoid', 'softmax'\] or a callable, got 'argmax'"
    ):
        SnapshotEnsemble([Constant(1)], activation="argmax")


def test_no_members_make_no_ensemble():
    with pytest.raises(StoreError, match="at least one finished member"):
        SnapshotEnsemble([])
