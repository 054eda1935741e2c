"""Log-probabilities, recipes and cascades: against NumPy and SciPy in float64, and the core's own predictions."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from snapcore import DataError
from snapcore.ensemble import Cascade, Predictions, Recipe, run_cascade
from snapcore.store import SnapshotStore
from snapcore_jax import SnapshotEnsemble

STRATEGIES = ("loop", "stacked", "map")
WEIGHTS = np.array([0.5, 0.0, 0.2, 0.3])
CASCADE = Cascade("probability", 0.7, (1.3, 1.2, 1.0))
RECIPE = Recipe(tuple(WEIGHTS), temperature=2.5, cascade=CASCADE)
X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(8, 3)
MEMBERS = [{"w": values} for values in np.random.default_rng(5).normal(size=(4, 3, 4)).astype(np.float32) * 2]


def apply_fn(params, x):
    return x @ params["w"]


def predictions_of(members=MEMBERS, kind="classes", x=X):
    logits = np.array([x.astype(np.float64) @ member["w"] for member in members])
    logs = special.log_softmax(logits, -1) if kind == "classes" else special.log_expit(logits)
    return Predictions(logs, kind=kind)


def close(found, wanted, atol=1e-6):
    np.testing.assert_allclose(np.asarray(found), wanted, atol=atol, rtol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "activation"),
    [("loop", "softmax"), ("stacked", "sigmoid"), ("map", "identity"), ("loop", "callable")],
)
def test_log_probabilities_are_the_logarithm_of_the_mean(strategy, activation):
    logits = np.array([X.astype(np.float64) @ member["w"] for member in MEMBERS])
    logs = special.log_expit(logits) if activation == "sigmoid" else special.log_softmax(logits, -1)
    wanted = special.logsumexp(logs, axis=0) - np.log(4)
    run = (lambda params, x: jax.nn.softmax(apply_fn(params, x))) if activation == "identity" else apply_fn
    given = jax.nn.softmax if activation == "callable" else activation
    ensemble = SnapshotEnsemble(MEMBERS, run, activation=given, strategy=strategy)
    close(ensemble(X, log=True), wanted)
    close(ensemble.predict([(X[:5], None), (X[5:], None)], log=True), wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_underflows_as_a_probability_is_exact_as_a_logarithm(strategy):
    members = [jnp.array([[0.0, -2000.0]])] * 2
    ensemble = SnapshotEnsemble(members, lambda logits, x: logits + 0 * x, strategy=strategy)
    assert ensemble(np.zeros((1, 1), np.float32), log=True).tolist() == [[0.0, -2000.0]]


def test_classes_that_are_masked_leave_the_gradient_finite():
    mask = jnp.array([False, True, False, False])
    ensemble = SnapshotEnsemble(MEMBERS, lambda params, x: jnp.where(mask, -jnp.inf, apply_fn(params, x)))
    found = ensemble(X, log=True)
    assert (found[:, 1] == -jnp.inf).all()
    assert jnp.isfinite(jax.grad(lambda x: ensemble(x, log=True)[:, 0].sum())(X)).all()


def test_log_never_reaches_the_function():
    def strict(params, x, **options):
        assert not options
        return apply_fn(params, x)

    SnapshotEnsemble(MEMBERS, strict)(X, log=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_compiled_and_vectorised_as_a_plain_call_is(strategy):
    ensemble, wanted = (
        SnapshotEnsemble(MEMBERS, apply_fn, recipe=RECIPE, strategy=strategy),
        RECIPE.apply(predictions_of()),
    )
    close(jax.jit(lambda x: ensemble(x, log=True))(X), wanted)
    close(jax.vmap(lambda x: ensemble(x, log=True))(X[None])[0], wanted)


@pytest.mark.parametrize(
    ("strategy", "activation", "temperature"),
    [("loop", "softmax", 1.0), ("stacked", "softmax", 2.5), ("map", "sigmoid", 1.0), ("loop", "sigmoid", 2.5)],
)
def test_a_recipe_from_disk_gives_what_it_gives_of_predictions(tmp_path, strategy, activation, temperature):
    with SnapshotStore(tmp_path / "run", "w") as store:
        for index, member in enumerate(MEMBERS, 1):
            store.save(member, index=index, step=index, cycle=index - 1, lr=0.1, framework="jax")
        names = tuple(member.sha256 for member in store.members)
    store.file(2).unlink()  # it has no weight, and is not read
    recipe = Recipe(tuple(WEIGHTS), temperature=temperature, members=names)
    recipe.save(tmp_path / "recipe.json")
    wanted = recipe.apply(predictions_of(kind="classes" if activation == "softmax" else "labels"))
    options = {"activation": activation, "strategy": strategy, "recipe": tmp_path / "recipe.json"}
    ensemble = SnapshotEnsemble.load(tmp_path / "run", apply_fn, like=MEMBERS[0], **options)
    assert (len(ensemble), ensemble.recipe.weights) == (3, (0.5, 0.2, 0.3))
    close(ensemble(X, log=True), wanted)
    close(ensemble(X), np.exp(wanted))
    with pytest.raises(DataError, match="last and members must be left out where there is a recipe"):
        SnapshotEnsemble.load(tmp_path / "run", apply_fn, like=MEMBERS[0], last=2, recipe=recipe)


def test_without_a_recipe_nothing_changes_bit_for_bit():
    wanted = jax.jit(lambda x: jnp.stack([jax.nn.softmax(apply_fn(member, x)) for member in MEMBERS]).mean(0))(X)
    np.testing.assert_array_equal(SnapshotEnsemble(MEMBERS, apply_fn)(X), wanted)


def test_members_one_by_one_are_their_own_whatever_the_recipe():
    ensemble, wanted = SnapshotEnsemble(MEMBERS, apply_fn, recipe=RECIPE), predictions_of()
    close(ensemble.members(X), np.exp(wanted[:]))
    for member, expected in zip(ensemble, wanted, strict=True):
        assert member.recipe is None
        close(member(X, log=True), expected, atol=1e-5)


def test_pickles_and_tuning_keep_the_recipe():
    ensemble = SnapshotEnsemble(MEMBERS, apply_fn, recipe=RECIPE)
    wanted = ensemble(X)
    again = pickle.loads(pickle.dumps(ensemble))
    assert again.recipe == RECIPE
    np.testing.assert_array_equal(again(X), wanted)
    report = ensemble.tune(X, rounds=1)
    assert max(report[name].deviation for name in STRATEGIES) <= 1e-6
    close(ensemble(X), wanted)


@pytest.mark.parametrize("examples", [1, 8, 100])
def test_a_cascade_gives_what_it_gives_of_predictions_in_five_shapes_at_most(examples):
    x = np.random.default_rng(1).normal(size=(examples, 3)).astype(np.float32)
    shapes = []

    def counting(params, x, scale):
        shapes.append(x.shape)
        return apply_fn(params, x) * scale

    wanted, members_used = run_cascade(predictions_of(x=x), RECIPE)
    ensemble = SnapshotEnsemble(MEMBERS, counting, recipe=RECIPE)
    for _ in range(3):
        found, used = ensemble.cascade(jnp.asarray(x), np.float32(1), log=True, return_used=True)
        close(found, wanted)
        np.testing.assert_array_equal(used, members_used)
    assert isinstance(found, jax.Array)
    assert len(shapes) == len({*shapes}) <= 5  # traced once for each
    close(ensemble.cascade(x, 1.0), np.exp(wanted))


def test_batches_of_sizes_that_were_seen_compile_nothing_anew():
    """Neither the model nor what takes examples out, activates and puts together: a loader's batches and its last."""
    batches = [np.random.default_rng(size).normal(size=(size, 3)).astype(np.float32) for size in (48, 48, 17)]
    ensemble, compiled = SnapshotEnsemble(MEMBERS, apply_fn, recipe=RECIPE), []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        counts = []
        for _ in range(2):
            used = [ensemble.cascade(jnp.asarray(x), return_used=True)[1] for x in batches]
            counts.append(len(compiled))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert max(map(max, used)) > 1  # further stages were reached
    assert counts[0] > 0
    assert counts[1] == counts[0]


def test_an_example_that_needs_one_member_never_reaches_the_second():
    asked = []

    def counting(params, x):
        jax.debug.callback(lambda first: asked.append(float(first)), params["w"][0, 0])
        return apply_fn(params, x)

    recipe = Recipe((1, 1), cascade=Cascade("probability", 0.9, (1.0, 1.0)))
    members = [{"w": np.array([[0.0, 1.0]], np.float32)}, {"w": np.array([[9.0, 0.0]], np.float32)}]
    used = SnapshotEnsemble(members, counting, recipe=recipe).cascade(np.ones((4, 1), np.float32), return_used=True)[1]
    jax.effects_barrier()
    assert used.tolist() == [1] * 4
    assert asked == [9.0]


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
        SnapshotEnsemble(MEMBERS, apply_fn, **options).cascade(X)


def test_a_cascade_of_probabilities_or_inside_jit_is_refused():
    with pytest.raises(DataError, match="already are probabilities"):
        SnapshotEnsemble(MEMBERS, lambda *given: jax.nn.softmax(apply_fn(*given)), recipe=RECIPE).cascade(X)
    with pytest.raises(DataError, match=r"inside jax\.jit there are none: call it outside"):
        jax.jit(SnapshotEnsemble(MEMBERS, apply_fn, recipe=RECIPE).cascade)(X)
    with pytest.raises(DataError, match="the recipe is for 4 members, got 2"):
        SnapshotEnsemble(MEMBERS[:2], apply_fn, recipe=RECIPE)
