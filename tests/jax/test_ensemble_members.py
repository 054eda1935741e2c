"""Members run their own variables and are averaged as what they are, or the ensemble is refused."""

import operator
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from snapcore import CorruptSnapshotError, DataError
from snapcore.store import SnapshotStore
from snapcore_jax import SnapshotEnsemble
from snapcore_jax.state import Copy, named_leaves

X = np.linspace(-2, 2, 15, dtype=np.float32).reshape(5, 3)
ONE_DEVICE = ("loop", "stacked", "map")


def write(directory, *trees):
    with SnapshotStore(directory, "w") as store:
        for index, tree in enumerate(trees, 1):
            arrays = Copy(named_leaves(tree, random=False)).resolve()
            store.save(arrays, index=index, step=index, cycle=index - 1, lr=0.1, framework="jax")
    return directory


def member(number):
    return {"w": jnp.sin(number + jnp.arange(12.0)).reshape(3, 4), "b": jnp.cos(number + jnp.arange(4.0))}


def apply_linear(params, x):
    return x @ params["w"] + params["b"]


def softmax64(logits, axis=-1):
    """The textbook formula in NumPy, float64."""
    powers = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


MEMBERS = [member(number) for number in range(3)]
WANTED = np.array([softmax64(X @ np.asarray(m["w"]) + np.asarray(m["b"])) for m in MEMBERS])


class Module(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def with_a_module_of_its_own():
    model = Module(nnx.Rngs(0))
    return lambda variables, x: model(x)


def with_params_of_its_own():
    params = member(7)
    return lambda variables, x: apply_linear(params, x)


def with_an_equinox_model_of_its_own():
    model = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    return lambda variables, x: jax.vmap(model)(x)


OWN = [with_a_module_of_its_own, with_params_of_its_own, with_an_equinox_model_of_its_own]


@pytest.mark.parametrize("make", OWN)
@pytest.mark.parametrize("strategy", ONE_DEVICE)
def test_a_function_that_runs_other_variables_than_it_is_given_is_refused(make, strategy):
    """One that closes over the model gives the same for all members."""
    message = "weights differ, yet their outputs are bit-equal: have apply_fn use the variables"
    for ask in (
        SnapshotEnsemble.__call__,
        SnapshotEnsemble.members,
        SnapshotEnsemble.tune,
        lambda e, x: e.predict([x]),
    ):
        ensemble = SnapshotEnsemble(MEMBERS, make(), strategy=strategy)
        for _ in range(2):
            with pytest.raises(DataError, match=message):
                ask(ensemble, X)
    found = SnapshotEnsemble(MEMBERS, make(), strategy=strategy, allow_equal=True)(X)
    np.testing.assert_allclose(found, softmax64(make()(None, X)), atol=1e-6)


TRANSFORMED = {
    "jit": lambda ensemble: jax.jit(ensemble)(X),
    "grad": lambda ensemble: jax.grad(lambda x: ensemble(x)[0, 0])(X),
    "vmap": lambda ensemble: jax.vmap(ensemble)(X[None]),
    "scan": lambda ensemble: jax.lax.map(ensemble, X[None]),
}


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("activation", ["softmax", "identity"])
def test_it_is_refused_inside_a_transformed_function_too(name, activation):
    ensemble = SnapshotEnsemble(MEMBERS, with_params_of_its_own(), activation=activation)
    with pytest.raises(DataError, match="bit-equal"):
        TRANSFORMED[name](ensemble)
    TRANSFORMED[name](SnapshotEnsemble(MEMBERS, apply_linear, activation=activation))


def test_probabilities_are_noticed_inside_a_transformed_function_too():
    ensemble = SnapshotEnsemble(MEMBERS, lambda params, x: jax.nn.softmax(apply_linear(params, x)))
    for _ in range(2):
        with pytest.raises(DataError, match="already are probabilities"):
            jax.jit(ensemble)(X)


def test_what_is_random_may_be_an_argument_inside_a_transformed_function():
    ensemble = SnapshotEnsemble(MEMBERS, lambda params, x, key: apply_linear(params, x))
    np.testing.assert_allclose(jax.jit(ensemble)(X, jax.random.key(0)), WANTED.mean(0), atol=1e-6)


def test_members_that_are_traced_themselves_are_not_looked_at():
    found = jax.jit(lambda members: SnapshotEnsemble(members, apply_linear)(X))(MEMBERS)
    np.testing.assert_allclose(found, WANTED.mean(0), atol=1e-6)


def test_the_same_variables_may_give_the_same_and_zeros_decide_nothing():
    assert SnapshotEnsemble([member(1), member(1)], apply_linear)(X).shape == (5, 4)
    ensemble = SnapshotEnsemble(MEMBERS, lambda params, x: x @ params["w"])
    assert ensemble(0 * X)[0].tolist() == [0.25] * 4
    assert ensemble(X).shape == (5, 4)
    live = member(9)["w"]
    wrong = SnapshotEnsemble(MEMBERS, lambda params, x: x @ live)
    wrong(0 * X)
    with pytest.raises(DataError, match="bit-equal"):
        wrong(X)


def test_a_module_instead_of_the_function_is_refused_with_the_cure():
    for model in (Module(nnx.Rngs(0)), linen.Dense(4), 3):
        with pytest.raises(DataError, match=r"apply_fn must be a function of \(variables, x\), got .* operator\.call"):
            SnapshotEnsemble(MEMBERS, model)
    wrapped = eqx.filter_jit(apply_linear)  # is a module of Equinox, and a function all the same
    np.testing.assert_allclose(SnapshotEnsemble(MEMBERS, wrapped)(X), WANTED.mean(0), atol=1e-6)


def with_state(params, x):
    return apply_linear(params, x), {"count": x.sum()}


def in_a_dict(params, x):
    return {"hidden": None, "logits": apply_linear(params, x)}


Named = namedtuple("Named", ["hidden", "logits"])


def named(params, x):
    return Named(x, apply_linear(params, x))


def as_an_object(params, x):
    return SimpleNamespace(logits=apply_linear(params, x))


def picked(returned):
    return returned[0]


@pytest.mark.parametrize(
    ("apply_fn", "cure", "output"),
    [
        (with_state, r"tuple: pass output=0, or another position in 0\.\.1", 0),
        (with_state, r"tuple: pass output=0", picked),
        (in_a_dict, r"dict: pass output='logits', or another of its keys", "logits"),
        (named, r"Named: pass output=0", "logits"),
        (as_an_object, r"SimpleNamespace: pass output=, the name of the tensor's attribute", "logits"),
    ],
)
@pytest.mark.parametrize("strategy", ONE_DEVICE)
def test_what_the_function_returns_is_picked_from_or_refused_naming_output(apply_fn, cure, output, strategy):
    with pytest.raises(DataError, match=rf"^the model must return one tensor, got {cure}"):
        SnapshotEnsemble(MEMBERS, apply_fn, strategy=strategy)(X)
    found = SnapshotEnsemble(MEMBERS, apply_fn, output=output, strategy=strategy)(X)
    np.testing.assert_allclose(found, WANTED.mean(0), atol=1e-6)


@pytest.mark.parametrize("strategy", ONE_DEVICE)
def test_one_axis_is_that_of_the_batch_and_refused(strategy):
    def squeezed(params, x):
        return x @ params["w"][:, 0]

    for ask in (lambda e: e(X), lambda e: jax.jit(e)(X)):
        with pytest.raises(DataError, match=r"got shape \(5,\): pass activation='sigmoid'"):
            ask(SnapshotEnsemble(MEMBERS, squeezed, strategy=strategy))
    found = SnapshotEnsemble(MEMBERS, squeezed, activation="sigmoid", strategy=strategy)(X)
    np.testing.assert_allclose(found, sum(1 / (1 + np.exp(-squeezed(m, X))) for m in MEMBERS) / 3, atol=1e-6)
    alone = SnapshotEnsemble(MEMBERS, apply_linear, axis=0, strategy=strategy)(X[0])
    np.testing.assert_allclose(alone, WANTED.mean(0)[0], atol=1e-6)


def conv(params, x):
    return jnp.einsum("bhwi,io->bhwo", x, params["w"])


@pytest.mark.parametrize("strategy", ONE_DEVICE)
def test_softmax_is_over_the_axis_of_the_classes(strategy):
    images = np.sin(np.arange(2 * 4 * 5 * 3, dtype=np.float32)).reshape(2, 4, 5, 3)
    logits = np.array([np.einsum("bhwi,io->bhwo", images, m["w"]) for m in MEMBERS])
    last = SnapshotEnsemble(MEMBERS, conv, strategy=strategy)(images)
    np.testing.assert_allclose(last, softmax64(logits).mean(0), atol=1e-6)

    def first(params, x):
        return jnp.moveaxis(conv(params, x), -1, 1)

    found = SnapshotEnsemble(MEMBERS, first, axis=1, strategy=strategy)(images)
    np.testing.assert_allclose(found, np.moveaxis(softmax64(logits).mean(0), -1, 1), atol=1e-6)
    with pytest.raises(DataError, match="already are probabilities"):
        SnapshotEnsemble(MEMBERS, lambda p, x: jax.nn.softmax(first(p, x), 1), axis=1, strategy=strategy)(images)
    with pytest.raises(DataError, match=r"axis must be in -4\.\.3 .* got -5"):
        SnapshotEnsemble(MEMBERS, conv, axis=-5, strategy=strategy)(images)


def call_each(model, x):
    return jax.vmap(model)(x)


def test_convolutions_of_equinox_have_their_classes_first_and_ask_for_the_axis():
    members = [eqx.nn.Conv2d(3, 4, 1, key=jax.random.key(number)) for number in range(2)]
    images = np.sin(np.arange(2 * 3 * 4 * 5, dtype=np.float32)).reshape(2, 3, 4, 5)
    with pytest.raises(DataError, match=r"\(2, 4, 4, 5\) may be its axis 1 or its last: pass axis=1 or axis=-1"):
        SnapshotEnsemble(members, call_each)(images)
    found = SnapshotEnsemble(members, call_each, axis=1)(images)
    wanted = sum(softmax64(call_each(m, images), 1) for m in members) / 2
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def halved(outputs):
    return outputs / 2


def call_linen(variables, x):
    return linen.Dense(4).apply(variables, x)


PICKLED = {
    "a dictionary": (MEMBERS, apply_linear, {}),
    "options": (MEMBERS, in_a_dict, {"output": "logits", "axis": 1, "strategy": "stacked"}),
    "activation": (MEMBERS, apply_linear, {"activation": halved, "strategy": "map"}),
    "linen": ([linen.Dense(4).init(jax.random.key(n), X) for n in range(2)], call_linen, {}),
    "nnx": ([Module(nnx.Rngs(n)) for n in range(2)], operator.call, {}),
    "equinox": ([eqx.nn.Linear(3, 4, key=jax.random.key(n)) for n in range(2)], call_each, {}),
    "bfloat16": ([jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), m) for m in MEMBERS], apply_linear, {}),
}


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.parametrize("used", [False, True])
def test_it_pickles(name, used):
    members, apply_fn, options = PICKLED[name]
    ensemble = SnapshotEnsemble(members, apply_fn, **options)
    if used:
        ensemble(X)
    again = pickle.loads(pickle.dumps(ensemble))
    np.testing.assert_array_equal(again(X), ensemble(X))
    assert again.strategy == ensemble.strategy


@pytest.mark.exhaustive
def test_a_loaded_ensemble_pickles_for_another_process(tmp_path):
    model = Module(nnx.Rngs(0))
    directory = write(tmp_path / "run", Module(nnx.Rngs(1)), Module(nnx.Rngs(2)))
    state = nnx.state(model)
    (tmp_path / "apply.py").write_text(
        "def apply(state, x): return x @ state['linear']['kernel'] + state['linear']['bias']"
    )
    code = (
        "import pickle, sys, numpy as np; from apply import apply; from snapcore_jax import SnapshotEnsemble;"
        "like = {'linear': {'kernel': np.zeros((3, 4), 'f'), 'bias': np.zeros(4, 'f')}};"
        "e = SnapshotEnsemble.load('run', apply, like=like);"
        "e = pickle.loads(pickle.dumps(e)) if sys.argv[1] == 'write' else pickle.load(open('e', 'rb'));"
        "pickle.dump(e, open('e', 'wb')); print(e(np.linspace(-2, 2, 15, dtype='f').reshape(5, 3)).tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))}
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, what],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=tmp_path,
        ).stdout
        for what in ("write", "read")
    ]
    assert printed[0] == printed[1]
    assert set(state) == {"linear"}
    wanted = SnapshotEnsemble.load(directory, operator.call, like=model)(X)
    np.testing.assert_allclose(eval(printed[0]), wanted, atol=1e-6)


def test_it_has_a_length_and_yields_its_members_compiled_once():
    traces = []

    def apply_fn(params, x):
        traces.append(x.shape)
        return apply_linear(params, x)

    ensemble = SnapshotEnsemble(MEMBERS, apply_fn, strategy="stacked")
    assert len(ensemble) == len(list(ensemble)) == 3
    for each, probabilities in zip(ensemble, WANTED, strict=True):
        np.testing.assert_allclose(each(X), probabilities, atol=1e-6)
        np.testing.assert_allclose(each.members(X)[0], probabilities, atol=1e-6)
        np.testing.assert_allclose(each.predict([X]), probabilities, atol=1e-6)
        assert (len(each), each.strategy) == (1, "loop")
    assert len(traces) == 1
    assert (len(ensemble), ensemble.strategy) == (3, "stacked")


def test_predict_gives_the_mean_for_all_of_a_loader():
    ensemble = SnapshotEnsemble(MEMBERS, apply_linear)
    for loader in ([X[:3], X[3:]], [(X[:3], "labels"), (X[3:], "labels")], iter([jnp.array(X)]), X, jnp.array(X)):
        found = ensemble.predict(loader)
        assert (type(found), found.dtype) == (np.ndarray, np.float32)
        np.testing.assert_allclose(found, WANTED.mean(0), atol=1e-6)
    with pytest.raises(DataError, match="at least one batch, got none"):
        ensemble.predict(iter([]))


def test_members_are_chosen_by_their_indices_and_a_damaged_one_may_be_left_out(tmp_path):
    directory = write(tmp_path / "run", *MEMBERS)
    found = SnapshotEnsemble.load(directory, apply_linear, like=member(0), members=[3, 1]).members(X)
    np.testing.assert_allclose(found, WANTED[[2, 0]], atol=1e-6)
    Path(directory, "snapshot-002.safetensors").write_bytes(b"?")
    with pytest.raises(CorruptSnapshotError, match=r"members=\[1, 3\] leaves it out"):
        SnapshotEnsemble.load(directory, apply_linear, like=member(0))
    found = SnapshotEnsemble.load([directory, directory], apply_linear, like=member(0), members=[1, 3]).members(X)
    np.testing.assert_allclose(found, WANTED[[0, 2, 0, 2]], atol=1e-6)
    with pytest.raises(DataError, match="either last or members must be left out"):
        SnapshotEnsemble.load(directory, apply_linear, like=member(0), members=[1], last=1)


def test_what_changes_a_file_in_place_does_not_reach_a_loaded_ensemble(tmp_path):
    directory = write(tmp_path / "run", *MEMBERS)
    like = {name: np.zeros_like(array) for name, array in member(0).items()}
    ensembles = [SnapshotEnsemble.load(directory, apply_linear, like=each, mapped=False) for each in (member(0), like)]
    for file in Path(directory).glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.seek(-64, os.SEEK_END)
            opened.write(np.full(16, 9, np.float32).tobytes())
    for ensemble in ensembles:
        np.testing.assert_allclose(ensemble.members(X), WANTED, atol=1e-6)
    with pytest.raises(DataError, match="mapped=True is for PyTorch alone"):
        SnapshotEnsemble.load(directory, apply_linear, like=like, mapped=True)
