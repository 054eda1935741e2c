"""The ensemble is the mean of its members' probabilities, whatever the model is written in and however it is run."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from snapcore import CorruptSnapshotError, DataError, StoreError
from snapcore.ensemble import combine
from snapcore.metrics import score
from snapcore.store import SnapshotStore
from snapcore_jax import SnapshotEnsemble
from snapcore_jax.state import Copy, named_leaves

X = np.linspace(-2, 2, 15, dtype=np.float32).reshape(5, 3)
ONE_DEVICE = ("loop", "stacked", "map")


def write(directory, *trees, framework="jax", unfinished=()):
    with SnapshotStore(directory, "w") as store:
        for index, tree in enumerate(trees, 1):
            entry = {"index": index, "step": index, "cycle": index - 1, "lr": 0.1, "framework": framework}
            arrays = Copy(named_leaves(tree, random=False)).resolve()
            store.save(arrays, **entry, unfinished=index in unfinished)
    return directory


def varied(tree, number):
    """Another member: every floating array moved a little."""
    if isinstance(tree, nnx.Module):
        graph, state = nnx.split(tree)
        return nnx.merge(graph, varied(state, number))
    return jax.tree.map(
        lambda leaf: (
            leaf + 0.3 * jnp.sin(number + jnp.arange(leaf.size).reshape(leaf.shape)).astype(leaf.dtype)
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
        ),
        tree,
    )


def linear():
    return {"w": jnp.arange(12.0).reshape(3, 4) / 10, "b": jnp.zeros(4)}


def apply_linear(params, x):
    return x @ params["w"] + params["b"]


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(linen.BatchNorm(use_running_average=True)(x))


class Module(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.into = nnx.Linear(3, 4, rngs=rngs)
        self.again = self.into  # shared
        self.scale = 2.0

    def __call__(self, x):
        return self.into(self.dropout(self.norm(x))) * self.scale


def equinox(model, x):
    return jax.vmap(model)(x)


MODELS = {
    "function": (linear, apply_linear),
    "tuple": (lambda: (jnp.ones((3, 4)), [jnp.zeros(4)]), lambda p, x: x @ p[0] + p[1][0]),
    "linen": (lambda: Dense().init(jax.random.key(0), X), Dense().apply),
    "nnx module": (lambda: Module(nnx.Rngs(0)), lambda model, x: model(x)),
    "equinox": (lambda: eqx.nn.MLP(3, 4, 6, 1, key=jax.random.key(0)), equinox),
    "integers too": (lambda: {**linear(), "seen": jnp.array(3)}, lambda p, x: apply_linear(p, x) / p["seen"]),
}


def softmax64(logits):
    """The textbook formula in NumPy, float64."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def expected(trees, apply_fn, x=X):
    """Average by hand: a Python loop, NumPy's softmax of every member's own outputs, the core's float64 mean."""
    return combine([softmax64(np.asarray(apply_fn(tree, x), np.float64)) for tree in trees])


@pytest.mark.exhaustive(keep=6)
@pytest.mark.parametrize("strategy", ONE_DEVICE)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_mean_of_the_softmax_of_its_members(tmp_path, name, strategy):
    make, apply_fn = MODELS[name]
    like = make()
    trees = [varied(like, number) for number in range(3)]
    ensemble = SnapshotEnsemble.load(write(tmp_path / "run", *trees), apply_fn, like=like, strategy=strategy)
    np.testing.assert_allclose(ensemble(X), expected(trees, apply_fn), atol=1e-6)
    each = ensemble.members(X)
    assert (each.shape, each.dtype, len(ensemble)) == ((3, 5, 4), jnp.float32, 3)
    for found, tree in zip(each, trees, strict=True):
        np.testing.assert_allclose(found, softmax64(np.asarray(apply_fn(tree, X), np.float64)), atol=1e-6)
    assert not np.array_equal(each[0], each[1])


@pytest.fixture
def run(tmp_path):
    trees = [varied(linear(), number) for number in range(4)]
    return write(tmp_path / "run", *trees), trees


@pytest.mark.parametrize("last", [None, 4, 3, 2, 1])
def test_the_last_members_are_used(run, last):
    directory, trees = run
    ensemble = SnapshotEnsemble.load(directory, apply_linear, like=linear(), last=last)
    np.testing.assert_allclose(ensemble(X), expected(trees[-(last or 4) :], apply_linear), atol=1e-6)


def test_members_of_several_runs_meet_and_last_counts_per_run(tmp_path):
    trees = [varied(linear(), number) for number in range(6)]
    runs = [write(tmp_path / "a", *trees[:3]), str(write(tmp_path / "b", *trees[3:]))]
    ensemble = SnapshotEnsemble.load(runs, apply_linear, like=linear(), last=2)
    np.testing.assert_allclose(ensemble(X), expected(trees[1:3] + trees[4:], apply_linear), atol=1e-6)


def test_unfinished_members_are_left_out(tmp_path):
    trees = [varied(linear(), number) for number in range(3)]
    directory = write(tmp_path / "run", *trees, unfinished={3})
    found = SnapshotEnsemble.load(directory, apply_linear, like=linear())(X)
    np.testing.assert_allclose(found, expected(trees[:2], apply_linear), atol=1e-6)


def test_its_likelihood_is_never_worse_than_the_members_mean(run):
    """Jensen's inequality: −log of a mean is at most the mean of −log."""
    ensemble = SnapshotEnsemble.load(run[0], apply_linear, like=linear())
    labels = np.array([0, 1, 2, 3, 0])
    alone = [score(np.asarray(probabilities), labels)["nll"] for probabilities in ensemble.members(X)]
    assert score(np.asarray(ensemble(X)), labels)["nll"] <= sum(alone) / 4


@pytest.mark.parametrize("strategy", ONE_DEVICE)
def test_batches_of_one_shape_are_traced_once(run, strategy):
    """A function that is traced anew for every batch is slower than one that is not compiled at all."""
    traces = []

    def apply_fn(params, x):
        traces.append(x.shape)
        return apply_linear(params, x)

    ensemble = SnapshotEnsemble.load(run[0], apply_fn, like=linear(), strategy=strategy)
    ensemble(X)
    first = len(traces)
    for scale in range(5):
        ensemble(X * scale)
        ensemble(jnp.array(X) + scale)
    assert len(traces) == first <= 4
    ensemble(X[:2])
    assert len(traces) == 2 * first


def test_what_two_layers_share_is_stacked_once():
    weight = [jnp.ones((3, 4)) * number for number in range(2)]
    trees = [{"into": each, "back": each} for each in weight]
    ensemble = SnapshotEnsemble(trees, lambda p, x: x @ p["into"] + x @ p["back"], strategy="stacked")
    back, into = ensemble._run._weights
    assert back is into
    np.testing.assert_allclose(ensemble(X), expected(trees, lambda p, x: 2 * x @ p["into"]), atol=1e-6)


def test_an_abstract_model_is_enough_to_load_into(run):
    directory, trees = run
    ensemble = SnapshotEnsemble.load(directory, apply_linear, like=jax.eval_shape(linear))
    np.testing.assert_allclose(ensemble(X), expected(trees, apply_linear), atol=1e-6)


def test_the_given_model_stays_as_it_is(run):
    model = Module(nnx.Rngs(0))
    before = [np.array(leaf) for leaf in named_leaves(model, random=False).values()]
    directory = write(run[0].parent / "other", varied(model, 1), varied(model, 2))
    SnapshotEnsemble.load(directory, lambda model, x: model(x), like=model)(X)
    for found, leaf in zip(named_leaves(model, random=False).values(), before, strict=True):
        np.testing.assert_array_equal(found, leaf)


def test_it_may_be_part_of_a_compiled_function_and_has_gradients_of_its_input(run):
    directory, trees = run
    ensemble = SnapshotEnsemble.load(directory, apply_linear, like=linear())
    np.testing.assert_allclose(jax.jit(ensemble)(X), ensemble(X), atol=1e-6)
    found = jax.grad(lambda x: ensemble(x)[:, 0].sum())(X)
    by_hand = jax.grad(lambda x: sum(jax.nn.softmax(apply_linear(tree, x))[:, 0].sum() for tree in trees) / 4)(X)
    np.testing.assert_allclose(found, by_hand, atol=1e-6)


def identity(value, x):
    return x * 0 + value


@pytest.mark.parametrize("strategy", ONE_DEVICE)
def test_outputs_that_already_are_probabilities_are_refused_with_the_cure(strategy):
    """TorchEnsemble applies cross-entropy, and so a softmax, to probabilities."""
    trees = [varied(linear(), number) for number in range(2)]

    def apply_fn(params, x):
        return jax.nn.softmax(apply_linear(params, x))

    ensemble = SnapshotEnsemble(trees, apply_fn, strategy=strategy)
    for _ in range(2):  # and refused again, not only once
        with pytest.raises(DataError, match=r"already are probabilities.*activation='identity'"):
            ensemble(X)
    with pytest.raises(DataError, match="already are probabilities"):
        ensemble.members(X)
    found = SnapshotEnsemble(trees, apply_fn, activation="identity", strategy=strategy)(X)
    np.testing.assert_allclose(found, expected(trees, apply_linear), atol=1e-6)


@pytest.mark.parametrize("logits", [[[0.5, 0.5], [0.9, 0.3]], [[1.5, -0.5]], np.empty((0, 2))])
def test_logits_that_only_look_a_little_like_probabilities_pass(logits):
    logits = jnp.array(logits)
    assert SnapshotEnsemble([{}], lambda _, x: x)(logits).shape == logits.shape


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_probabilities_in_half_precision_are_recognised_though_their_sums_are_rounded(dtype):
    off = jnp.array([[0.5, 0.49]])  # in half precision as good as 1
    assert SnapshotEnsemble([{}], lambda _, x: x)(off).shape == (1, 2)
    with pytest.raises(DataError, match="already are probabilities"):
        SnapshotEnsemble([{}], lambda _, x: x)(off.astype(dtype))


@pytest.mark.parametrize("strategy", ONE_DEVICE)
def test_softmax_of_one_output_is_refused_since_it_is_one_whatever_it_is(strategy):
    trees = [jnp.array([[1.0], [0.5], [-1.0]]), jnp.array([[0.0], [2.0], [1.0]])]

    def apply_fn(weights, x):
        return x @ weights

    ensemble = SnapshotEnsemble(trees, apply_fn, strategy=strategy)
    for ask in (ensemble, ensemble.members, jax.jit(ensemble), ensemble):
        with pytest.raises(DataError, match=r"softmax over one output is 1 .* activation='sigmoid'"):
            ask(X)
    found = SnapshotEnsemble(trees, apply_fn, activation="sigmoid", strategy=strategy)(X)
    np.testing.assert_allclose(found, sum(jax.nn.sigmoid(X @ tree) for tree in trees) / 2, atol=1e-6)


def test_only_the_first_batch_is_checked():
    ensemble = SnapshotEnsemble([{}], lambda _, x: x)
    ensemble(jnp.array([[3.0, -1.0]]))
    assert ensemble(jnp.array([[0.5, 0.5]])).tolist() == [[0.5, 0.5]]


def test_sigmoid_averages_independent_labels():
    found = SnapshotEnsemble([jnp.array(-1.0), jnp.array(2.0)], identity, activation="sigmoid")(jnp.zeros((1, 1)))
    assert found.item() == pytest.approx((1 / (1 + math.exp(1)) + 1 / (1 + math.exp(-2))) / 2)


def test_a_callable_may_be_the_activation_and_sees_one_member_at_a_time():
    for strategy in ONE_DEVICE:
        members = [jnp.array(3.0), jnp.array(4.0)]
        found = SnapshotEnsemble(members, identity, activation=lambda o: o.sum(0) ** 2, strategy=strategy)
        assert found(jnp.zeros((1, 1))).item() == 12.5


def test_output_picks_the_logits_and_arguments_go_to_the_function():
    def apply_fn(params, x, *, scale, train, name):
        assert (train, name) == (False, "head")  # values, not tracers
        return {"logits": apply_linear(params, x) * scale, "hidden": None}

    trees = [varied(linear(), number) for number in range(2)]
    ensemble = SnapshotEnsemble(trees, apply_fn, output=lambda found: found["logits"])
    for scale in (2, 3.0):
        found = ensemble(X, scale=scale, train=False, name="head")
        wanted = expected(trees, lambda params, x, scale=scale: apply_linear(params, x) * scale)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("strategy", ONE_DEVICE)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype, strategy):
    values = [1.0, 1 + 2**-7, 1 + 2**-7]
    members = [jnp.array(value, dtype) for value in values]
    ensemble = SnapshotEnsemble(members, identity, activation="identity", strategy=strategy)
    found = ensemble(jnp.zeros((1, 1), dtype))
    assert found.dtype == jnp.float32
    assert found.item() == pytest.approx(sum(values) / 3, rel=1e-6)


def test_bfloat16_members_come_back_bit_for_bit(tmp_path):
    trees = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), varied(linear(), number)) for number in range(2)]
    ensemble = SnapshotEnsemble.load(write(tmp_path, *trees), lambda p, x: p["w"], like=trees[0], activation="identity")
    for found, tree in zip(ensemble.members(X), trees, strict=True):
        np.testing.assert_array_equal(found, tree["w"].astype(jnp.float32))


def test_double_precision_is_kept_or_refused_with_the_cure(tmp_path):
    directory = write(tmp_path, {"w": np.full((1, 1), 1 + 2**-40)}, {"w": np.ones((1, 1))})
    with jax.enable_x64(True):
        like = {"w": jnp.zeros((1, 1))}
        found = SnapshotEnsemble.load(directory, lambda p, x: p["w"], like=like, activation="identity")(X)
        assert (found.dtype, found.item()) == (jnp.float64, 1 + 2**-41)
    with pytest.raises(DataError, match=r"'w' of .* is float64, .*jax_enable_x64"):
        SnapshotEnsemble.load(directory, lambda p, x: p["w"], like={"w": jnp.zeros((1, 1))})


def test_tune_measures_every_strategy_and_keeps_the_fastest(run):
    """Users ask for inference of M members that costs less than M times; no way is the fastest everywhere."""
    directory, trees = run
    ensemble = SnapshotEnsemble.load(directory, apply_linear, like=linear())
    report = ensemble.tune(X, rounds=3)
    assert list(report) == ["loop", "stacked", "map", "sharded"]
    for name in ONE_DEVICE:
        assert report[name].refused is None
        assert report[name].seconds > 0
        assert report[name].deviation <= 1e-6
    able = [name for name, trial in report.items() if trial.refused is None]
    assert ensemble.strategy == report.chosen == min(able, key=lambda name: report[name].seconds)
    np.testing.assert_allclose(ensemble(X), expected(trees, apply_linear), atol=1e-6)


def test_one_member_cannot_be_spread_over_devices():
    message = "cannot be done with 1 members and .* devices: use another strategy"
    with pytest.raises(DataError, match=message):
        SnapshotEnsemble([linear()], apply_linear, strategy="sharded")
    assert "cannot be done" in SnapshotEnsemble([linear()], apply_linear).tune(X, rounds=1)["sharded"].refused


def test_a_member_with_other_names_and_shapes_is_refused_with_a_list(run):
    like = {"w": jnp.ones((3, 5)), "c": jnp.ones(4)}
    message = (
        r"snapshot-001.safetensors does not fit the model \(3 differences\): 'c' \(4,\) is missing; 'b' .*'w' is \(3"
    )
    with pytest.raises(DataError, match=message):
        SnapshotEnsemble.load(run[0], apply_linear, like=like)


def test_members_of_another_framework_are_refused_by_name(tmp_path):
    directory = write(tmp_path, linear(), framework="torch")
    with pytest.raises(DataError, match=r"member 1 .* was written by torch, not by jax"):
        SnapshotEnsemble.load(directory, apply_linear, like=linear())


def test_a_file_that_was_altered_is_refused(run):
    """Nobody else checks what is loaded."""
    file = run[0] / "snapshot-002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptSnapshotError, match=r"snapshot-002.safetensors.*SHA-256"):
        SnapshotEnsemble.load(run[0], apply_linear, like=linear())


@pytest.mark.parametrize("last", [0, 5])
def test_last_must_be_among_the_finished_members(run, last):
    with pytest.raises(StoreError, match=rf"last must be in 1\.\.4.*got {last}"):
        SnapshotEnsemble.load(run[0], apply_linear, like=linear(), last=last)


def test_an_unknown_activation_or_strategy_is_refused_with_those_there_are():
    with pytest.raises(
        DataError, match=r"one of \['gaussian', 'identity', 'sigmoid', 'softmax'\] or a callable, got 'argmax'"
    ):
        SnapshotEnsemble([linear()], apply_linear, activation="argmax")
    with pytest.raises(DataError, match=r"one of \['loop', 'stacked', 'map', 'sharded'\], got 'guess'"):
        SnapshotEnsemble([linear()], apply_linear, strategy="guess")


def test_no_members_make_no_ensemble():
    with pytest.raises(StoreError, match="at least one finished member"):
        SnapshotEnsemble([], apply_linear)


def test_members_of_two_structures_are_refused():
    with pytest.raises(DataError, match="differ in the values of arrays alone, but member 2 has another structure"):
        SnapshotEnsemble([linear(), {"w": jnp.ones(3)}], apply_linear)
