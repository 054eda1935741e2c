"""Members stacked into one call give what the loop gives, or are refused by name; and the fastest way is kept."""

import copy

import pytest
import torch
from torch import nn

from snapcore import DataError
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.state import Copy, named_tensors

X = torch.linspace(-2, 2, 30).view(2, 5, 3)


def varied(model):
    """Another member of the same architecture: every floating tensor moved a little."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) / 5)
    return other


def write(directory, *models):
    with SnapshotStore(directory, "w") as store:
        for index, model in enumerate(models, 1):
            arrays = Copy(named_tensors(model)).resolve()
            store.save(arrays, index=index, step=index, cycle=index - 1, lr=0.1, framework="torch")


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    """Two layers with one weight: stacking each parameter once would leave the second without."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(3, 4, bias=False)
        self.out = nn.Linear(4, 3)
        self.back = nn.Linear(3, 4, bias=False)
        self.back.weight = self.into.weight

    def forward(self, x):
        return self.back(self.out(self.into(x)))


class WithScratch(nn.Module):
    """A module with a buffer that its state does not hold."""

    def __init__(self, offset=0.5):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("offset", torch.full((4,), offset), persistent=False)

    def forward(self, x):
        return self.linear(x) + self.offset * torch.arange(4)


class WithReferences(nn.Module):
    """A module that keeps its weights in a plain list too, which stacking does not reach."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.weights = [self.linear.weight]

    def forward(self, x):
        return x @ self.weights[0].T


class Branching(nn.Linear):
    def forward(self, x):
        outputs = super().forward(x)
        return outputs if outputs.sum().item() > 0 else -outputs


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.encoder(x)[0]


class Half(nn.Linear):
    def __init__(self):
        super().__init__(3, 4)
        self.bfloat16()

    def forward(self, x):
        return super().forward(x.bfloat16())


MODULES = {
    "linear": lambda: nn.Linear(3, 4),
    "convolution": lambda: nn.Conv1d(5, 4, 3, padding=1),
    "batch norm and dropout": lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(3, 4)),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4)),
    "attention": lambda: Attention(3, 1, batch_first=True),
    "transformer": lambda: nn.TransformerEncoderLayer(3, 1, 8, batch_first=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    "tied": Tied,
    "non-persistent buffer": WithScratch,
    "double": lambda: nn.Linear(3, 4).double(),
    "half": Half,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own word on some layers under vmap
@pytest.mark.parametrize("name", MODULES)
def test_stacked_members_give_what_the_loop_gives(tmp_path, name):
    model = MODULES[name]()
    write(tmp_path, *(varied(model) for _ in range(3)))
    x = X.to(torch.float64) if name == "double" else X
    loop = SnapshotEnsemble.load(tmp_path, model, axis=-1)
    stacked = SnapshotEnsemble.load(tmp_path, model, strategy="stacked", axis=-1)
    for found, wanted in ((stacked(x), loop(x)), (stacked.members(x), loop.members(x))):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 if name == "half" else 1e-6)
    assert not torch.equal(*stacked.members(x)[:2])


def test_tied_weights_are_stacked_once_and_reach_every_name(tmp_path):
    """A stack of parameters without their second names gives garbage and no error."""
    write(tmp_path, Tied(), Tied())
    ensemble = SnapshotEnsemble.load(tmp_path, Tied(), strategy="stacked", axis=-1)
    ensemble(X)
    tensors = ensemble._stacked._tensors
    assert tensors["back.weight"] is tensors["into.weight"]


def test_gradients_with_respect_to_the_input_flow_through_every_member():
    models = [nn.Linear(3, 4) for _ in range(3)]
    gradients = []
    for strategy in ("loop", "stacked"):
        x = X.clone().requires_grad_()
        SnapshotEnsemble(copy.deepcopy(models), strategy=strategy, axis=-1)(x)[..., 0].sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients_too(mode):
    models = [nn.Linear(3, 4) for _ in range(3)]
    with mode():
        found = SnapshotEnsemble(models, strategy="stacked", axis=-1)(X)
        torch.testing.assert_close(found, SnapshotEnsemble(models, axis=-1)(X))


def test_output_and_a_callable_activation_see_one_member_at_a_time():
    class Model(nn.Linear):
        def forward(self, x, *, scale):
            return {"logits": super().forward(x) * scale, "hidden": None}

    models = [Model(3, 4) for _ in range(2)]
    options = {"output": lambda found: found["logits"], "activation": lambda logits: logits.softmax(0)}
    loop = SnapshotEnsemble(models, **options)(X, scale=2)
    torch.testing.assert_close(SnapshotEnsemble(models, strategy="stacked", **options)(X, scale=2), loop)


def test_weights_that_come_later_are_the_ones_that_count():
    ensemble = SnapshotEnsemble([nn.Linear(3, 4) for _ in range(2)], strategy="stacked", axis=-1)
    ensemble(X)
    other = SnapshotEnsemble([nn.Linear(3, 4) for _ in range(2)], axis=-1)
    ensemble.load_state_dict(other.state_dict())
    torch.testing.assert_close(ensemble(X), other(X))
    torch.testing.assert_close(ensemble.double()(X.double()), other(X).double())


def test_autocast_is_refused_because_it_would_be_left_out_in_part():
    """Under vmap PyTorch's autocast gives float32 outputs and says nothing."""
    models = [nn.Linear(3, 4) for _ in range(2)]
    stacked, loop = SnapshotEnsemble(models, strategy="stacked", axis=-1), SnapshotEnsemble(models, axis=-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert loop(X).dtype == torch.float32
        with pytest.raises(DataError, match=r"leave autocast out in part: use strategy='loop'.*model.bfloat16\(\)"):
            stacked(X)
        assert stacked.tune(X, rounds=1)["stacked"].refused is not None
    torch.testing.assert_close(stacked(X), loop(X))


def test_a_recurrent_layer_is_refused_by_its_name():
    ensemble = SnapshotEnsemble([Recurrent(), Recurrent()], strategy="stacked", axis=-1)
    with pytest.raises(DataError, match=r"'encoder' is LSTM, for which torch.vmap has no rule: use strategy='loop'"):
        ensemble(X)


def test_what_one_member_fails_at_too_is_not_laid_to_being_stacked():
    """By PyTorch's own error, which is the same in the loop."""
    for strategy in ("loop", "stacked"):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as failure:
            SnapshotEnsemble([nn.Linear(3, 4) for _ in range(2)], strategy=strategy, axis=-1)(torch.ones(2, 5))
        assert not isinstance(failure.value, DataError)


def test_a_model_that_asks_for_a_value_is_refused_with_the_reason():
    ensemble = SnapshotEnsemble([Branching(3, 4), Branching(3, 4)], strategy="stacked", axis=-1)
    with pytest.raises(DataError, match=r"Branching cannot be run stacked: .*\.item\(\).*; use strategy='loop'"):
        ensemble(X)


def test_weights_that_stacking_does_not_reach_are_found_out_on_the_first_batch():
    ensemble = SnapshotEnsemble([WithReferences(), WithReferences()], strategy="stacked", axis=-1)
    for _ in range(2):
        with pytest.raises(DataError, match=r"give something else than the loop, by .* use strategy='loop'"):
            ensemble(X)


def test_members_of_two_classes_are_refused():
    ensemble = SnapshotEnsemble([nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4))], strategy="stacked", axis=-1)
    with pytest.raises(DataError, match="of one class, but member 2 is Sequential, the first Linear"):
        ensemble(X)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Linear(3, 4, bias=False), r"'bias' of member 2 is missing, the first's is \(4,\) torch.float32"),
        (lambda: nn.Linear(3, 4).half(), r"member 2 is \(4.* torch.float16 on cpu, the first's is \(4.* torch.float32"),
    ],
)
def test_members_with_other_tensors_are_refused_by_name(other, message):
    ensemble = SnapshotEnsemble([nn.Linear(3, 4), other()], strategy="stacked", axis=-1)
    with pytest.raises(DataError, match=message):
        ensemble(X)


def test_outputs_that_already_are_probabilities_are_refused_when_stacked_too():
    models = [nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)) for _ in range(2)]
    with pytest.raises(DataError, match="activation='identity'"):
        SnapshotEnsemble(models, strategy="stacked", axis=-1)(X)


def test_after_the_first_batch_the_loop_is_not_run_any_more():
    models, calls = [nn.Linear(3, 4) for _ in range(3)], []
    ensemble = SnapshotEnsemble(models, strategy="stacked", axis=-1)
    models[2].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        ensemble(X)
    assert len(calls) == 1


def test_tune_measures_those_that_can_be_run_and_keeps_the_fastest():
    """Users ask for inference of M members that costs less than M times; no way is the fastest everywhere."""
    models = [nn.Linear(3, 4) for _ in range(3)]
    ensemble, before = SnapshotEnsemble(models, axis=-1), SnapshotEnsemble(models, axis=-1)(X)
    report = ensemble.tune(X, rounds=3)
    assert list(report) == ["loop", "stacked", "graph"]
    run = {name: trial for name, trial in report.items() if trial.refused is None}
    assert list(run) == ["loop", "stacked"]  # of a batch on the CPU
    assert all(trial.seconds > 0 and trial.deviation <= 1e-6 for trial in run.values())
    assert ensemble.strategy == report.chosen == min(run, key=lambda name: report[name].seconds)
    torch.testing.assert_close(ensemble(X), before)


@pytest.mark.parametrize("make", [Recurrent, WithReferences, lambda: Branching(3, 4)])
def test_tune_keeps_the_loop_where_stacking_is_wrong_or_impossible(make):
    models = [make() for _ in range(3)]
    ensemble = SnapshotEnsemble(models, axis=-1)
    report = ensemble.tune(X, rounds=1)
    assert (ensemble.strategy, report["loop"].refused) == ("loop", None)
    assert report["stacked"].refused
    torch.testing.assert_close(ensemble(X), SnapshotEnsemble(models, axis=-1)(X))


def test_an_unknown_strategy_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(DataError, match=r"strategy must be one of \['loop', 'stacked', 'graph'\], got 'guess'"):
        SnapshotEnsemble.load(tmp_path / "none", nn.Linear(3, 4), strategy="guess", axis=-1)
