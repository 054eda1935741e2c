"""Log-probabilities, recipes and cascades: against NumPy and SciPy in float64, and the core's own predictions."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn

from snapcore import DataError
from snapcore.ensemble import Cascade, Predictions, Recipe, run_cascade
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.state import Copy, named_tensors

STRATEGIES = ("loop", "stacked")
WEIGHTS = np.array([0.5, 0.0, 0.2, 0.3])
CASCADE = Cascade("probability", 0.7, (1.3, 1.2, 1.0))
X = torch.linspace(-2, 2, 24).view(8, 3)


def nets(count=4):
    generator = torch.Generator().manual_seed(5)
    members = [nn.Linear(3, 4) for _ in range(count)]
    for member in members:
        member.weight.data = 2 * torch.randn(4, 3, generator=generator)
        member.bias.data = torch.randn(4, generator=generator)
    return members


def logits_of(members, x=X):
    return np.array([(x.double() @ net.weight.double().T + net.bias.double()).detach().numpy() for net in members])


def predictions_of(members, kind="classes"):
    logits = logits_of(members)
    logs = special.log_softmax(logits, -1) if kind == "classes" else special.log_expit(logits)
    return Predictions(logs, kind=kind)


def write(directory, members):
    with SnapshotStore(directory, "w") as store:
        for index, model in enumerate(members, 1):
            arrays = Copy(named_tensors(model)).resolve()
            store.save(arrays, index=index, step=index, cycle=index - 1, lr=0.1, framework="torch")
        return tuple(member.sha256 for member in store.members)


def close(found, wanted, atol=1e-6):
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=atol, rtol=1e-6)


class Fixed(nn.Module):
    """Gives the same logits whatever it is given, and counts the rows."""

    def __init__(self, *logits):
        super().__init__()
        self.logits, self.rows = nn.Parameter(torch.tensor(logits)), []

    def forward(self, x, **options):
        assert "log" not in options
        self.rows.append(len(x))
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity", "callable"])
def test_log_probabilities_are_the_logarithm_of_the_mean(strategy, activation):
    members, axis = nets(), 1 if activation == "callable" else -1
    by_hand = special.log_expit if activation == "sigmoid" else lambda logits: special.log_softmax(logits, axis)
    wanted = special.logsumexp(by_hand(logits_of(members)), axis=0) - np.log(4)
    given = (lambda logits: logits.softmax(0)) if activation == "callable" else activation
    if activation == "identity":
        members = [nn.Sequential(net, nn.Softmax(-1)) for net in members]
    ensemble = SnapshotEnsemble(members, activation=given, strategy=strategy)
    close(ensemble(X, log=True), wanted)
    close(ensemble(X), np.exp(wanted))
    np.testing.assert_allclose(ensemble.predict(X, log=True), wanted, atol=1e-6)


def test_a_loaders_predictions_are_logarithms_too():
    ensemble = SnapshotEnsemble(nets())
    found = ensemble.predict([(X[:5], None), (X[5:], None)], log=True)
    np.testing.assert_allclose(found, ensemble(X, log=True).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_underflows_as_a_probability_is_exact_as_a_logarithm(strategy):
    ensemble = SnapshotEnsemble([Fixed(0.0, -2000.0), Fixed(0.0, -2000.0)], strategy=strategy, allow_equal=True)
    assert ensemble(X[:1], log=True).tolist() == [[0.0, -2000.0]]
    assert ensemble(X[:1]).tolist() == [[1.0, 0.0]]


def test_classes_that_are_masked_leave_the_gradient_finite():
    members = nets(2)
    x = X.clone().requires_grad_()

    class Masked(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)

    found = SnapshotEnsemble([Masked(net) for net in members])(x, log=True)
    assert (found[:, 1] == -torch.inf).all()
    found[:, 0].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_recipe_from_disk_gives_what_it_gives_of_predictions(tmp_path, strategy, activation, temperature):
    members = nets()
    names = write(tmp_path / "run", members)
    recipe = Recipe(tuple(WEIGHTS), temperature=temperature, members=names)
    recipe.save(tmp_path / "recipe.json")
    wanted = recipe.apply(predictions_of(members, "classes" if activation == "softmax" else "labels"))
    options = {"activation": activation, "strategy": strategy, "recipe": tmp_path / "recipe.json"}
    ensemble = SnapshotEnsemble.load(tmp_path / "run", nn.Linear(3, 4), **options)
    assert len(ensemble) == 3
    assert ensemble.recipe == Recipe((0.5, 0.2, 0.3), temperature=temperature, members=(names[0], *names[2:]))
    close(ensemble(X, log=True), wanted)
    close(ensemble(X), np.exp(wanted))
    np.testing.assert_allclose(ensemble.predict(X), np.exp(wanted), atol=1e-6)
    close(SnapshotEnsemble(members, activation=activation, strategy=strategy, recipe=recipe)(X), np.exp(wanted))


def test_files_of_members_without_a_weight_are_not_read(tmp_path):
    members = nets()
    names = write(tmp_path, members)
    file = SnapshotStore(tmp_path).file(2)
    file.unlink()
    recipe = Recipe(tuple(WEIGHTS), members=names)
    assert len(SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4), recipe=recipe)) == 3


def test_outputs_that_are_values_are_averaged_by_weight():
    ensemble = SnapshotEnsemble(nets(), activation="identity", recipe=Recipe(tuple(WEIGHTS)))
    close(ensemble(X), np.average(logits_of(nets()), axis=0, weights=WEIGHTS), atol=1e-5)


def test_without_a_recipe_nothing_changes_bit_for_bit():
    members = nets()
    probabilities = [net(X).softmax(-1) for net in members]
    total = probabilities[0]
    for each in probabilities[1:]:
        total = total + each
    assert torch.equal(SnapshotEnsemble(members)(X), total / 4)
    assert torch.equal(
        SnapshotEnsemble(members, strategy="stacked")(X),
        SnapshotEnsemble(members, strategy="stacked").members(X).mean(0),
    )


def test_members_one_by_one_are_their_own_whatever_the_recipe():
    recipe = Recipe(tuple(WEIGHTS), temperature=2.0)
    ensemble = SnapshotEnsemble(nets(), recipe=recipe)
    wanted = special.softmax(logits_of(nets()), -1)
    close(ensemble.members(X), wanted)
    for member, expected in zip(ensemble, wanted, strict=True):
        assert member.recipe is None
        close(member(X), expected)
        close(member(X, log=True), np.log(expected), atol=1e-5)


def test_copies_pickles_and_tuning_keep_the_recipe():
    recipe = Recipe(tuple(WEIGHTS), temperature=2.0)
    ensemble = SnapshotEnsemble(nets(), recipe=recipe)
    wanted = ensemble(X)
    for again in (pickle.loads(pickle.dumps(ensemble)), copy.deepcopy(ensemble)):
        assert again.recipe == recipe
        assert torch.equal(again(X), wanted)
    report = ensemble.tune(X, rounds=1)
    assert report["stacked"].deviation <= 1e-6
    torch.testing.assert_close(ensemble(X), wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_compiled_and_vectorised_as_a_plain_call_is(strategy):
    recipe = Recipe(tuple(WEIGHTS), temperature=2.0)
    ensemble = SnapshotEnsemble(nets(), recipe=recipe, strategy=strategy)
    wanted = ensemble(X, log=True)
    compiled = torch.compile(ensemble, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, log=True), wanted)
    torch.testing.assert_close(torch.vmap(lambda x: ensemble(x, log=True))(X[None])[0], wanted)


def test_a_first_stacked_call_for_logarithms_is_proven_too():
    """Where a class is impossible its logarithm is −inf, which has no distance from itself."""
    members = [Fixed(1.0, -torch.inf, 0.0), Fixed(2.0, -torch.inf, 0.0)]
    found = SnapshotEnsemble(members, strategy="stacked")(X, log=True)
    assert (found[:, 1] == -torch.inf).all()
    assert found[:, [0, 2]].isfinite().all()


def test_a_cascade_gives_what_it_gives_of_predictions_and_each_members_row_is_asked_once():
    members = nets()
    recipe = Recipe(tuple(WEIGHTS), cascade=CASCADE)
    wanted, members_used = run_cascade(predictions_of(members), recipe)
    assert len({*members_used}) > 1
    rows = {}
    for index, net in enumerate(members):
        net.register_forward_hook(
            lambda _, given, __, index=index: rows.update({index: rows.get(index, 0) + len(given[0])})
        )
    ensemble = SnapshotEnsemble(members, recipe=recipe)
    found, used = ensemble.cascade(X, log=True, return_used=True)
    close(found, wanted)
    np.testing.assert_array_equal(used, members_used)
    assert used.dtype.kind == "i"
    assert rows == {3: 8, 2: (used > 1).sum(), **({0: (used > 2).sum()} if (used > 2).any() else {})}
    close(ensemble.cascade(X), np.exp(wanted))
    assert isinstance(ensemble.cascade(X), torch.Tensor)


def test_an_example_that_needs_one_member_never_reaches_the_second():
    first, second = Fixed(0.0, 1.0), Fixed(9.0, 0.0)
    recipe = Recipe((1, 1), cascade=Cascade("probability", 0.9, (1.0, 1.0)))
    found, used = SnapshotEnsemble([first, second], recipe=recipe).cascade(X, return_used=True)
    assert (second.rows, first.rows) == ([8], [])
    assert used.tolist() == [1] * 8
    close(found, special.softmax([[9.0, 0.0]] * 8, -1))


def test_every_tensor_that_goes_to_the_model_is_taken_apart():
    class Masked(nn.Linear):
        def forward(self, batch, *, mask, scale):
            assert len(batch["x"]) == len(mask)
            return super().forward(batch["x"][0:]) * mask[:, None] * scale

    plain = nets()
    members = [Masked(3, 4) for _ in plain]
    for member, net in zip(members, plain, strict=True):
        member.load_state_dict(net.state_dict())
    recipe = Recipe(tuple(WEIGHTS), cascade=CASCADE)
    found = SnapshotEnsemble(members, recipe=recipe).cascade({"x": X}, mask=torch.ones(8), scale=torch.tensor(1.0))
    assert torch.equal(found, SnapshotEnsemble(plain, recipe=recipe).cascade(X))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "needs a recipe that has one"),
        ({"recipe": Recipe((1, 1, 1, 1))}, "needs a recipe that has one"),
        ({"recipe": Recipe((1, 1, 1, 0), cascade=CASCADE), "activation": "sigmoid"}, "needs activation='softmax'"),
        ({"recipe": Recipe((1, 1, 1, 0), cascade=CASCADE), "activation": "identity"}, "the outputs are others"),
    ],
)
def test_a_cascade_that_cannot_be_is_refused(options, told):
    with pytest.raises(DataError, match=told):
        SnapshotEnsemble(nets(), **options).cascade(X)


def test_a_cascade_of_images_or_of_probabilities_is_refused():
    recipe = Recipe((1, 1, 1, 0), cascade=CASCADE)
    with pytest.raises(DataError, match=r"needs outputs \[batch, classes\], got shape \(2, 4, 4\)"):
        SnapshotEnsemble(nets(), recipe=recipe, axis=-1).cascade(X.view(2, 4, 3))
    models = [nn.Sequential(net, nn.Softmax(-1)) for net in nets()]
    with pytest.raises(DataError, match="already are probabilities"):
        SnapshotEnsemble(models, recipe=recipe).cascade(X)
    found = SnapshotEnsemble(models, recipe=recipe, activation="identity").cascade(X)
    torch.testing.assert_close(found, SnapshotEnsemble(nets(), recipe=recipe).cascade(X))


def test_a_recipe_for_other_members_is_refused(tmp_path):
    names = write(tmp_path, nets())
    with pytest.raises(DataError, match="the recipe is for 4 members, got 2"):
        SnapshotEnsemble(nets(2), recipe=Recipe(tuple(WEIGHTS)))
    with pytest.raises(DataError, match="last and members must be left out where there is a recipe"):
        SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4), last=2, recipe=Recipe(tuple(WEIGHTS), members=names))
    with pytest.raises(DataError, match="the recipe is for members that are not in"):
        SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4), recipe=Recipe((1,), members=("0" * 64,)))
