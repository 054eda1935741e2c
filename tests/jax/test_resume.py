"""Killed after any update and started again, a run gives bit for bit the members of one that was never stopped."""

import importlib.util
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from snapcore import DataError, ProtocolError, StoreError
from snapcore.store import SnapshotStore
from snapcore_jax.run import SnapshotRun
from snapcore_jax.schedule import snapshot_schedule

from ..forked import Forked

SCRIPT = Path(__file__).with_name("killed_loop.py")
spec = importlib.util.spec_from_file_location("killed_loop", SCRIPT)
killed_loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(killed_loop)
CYCLES, train = killed_loop.CYCLES, killed_loop.train
RATE = snapshot_schedule(CYCLES)


class Killed(Exception):  # noqa: N818  it is no error
    """Stands for the end of the process: nothing that the run does after an exception makes it resumable."""


def contents(directory):
    store = SnapshotStore(directory)
    assert store.stopped == "finished"
    return {
        member.step: {name: array.tobytes() for name, array in store.load(member.index).items()}
        for member in store.members
    }


def killed_at(number):
    def end(call):
        if call == number:
            raise Killed

    return end


OPTIMIZERS = {
    "adam": (optax.adam(RATE), 12),
    "adam without a schedule": (optax.adam(0.05), 12),
    "accumulating": (optax.MultiSteps(optax.adam(RATE), 3).gradient_transformation(), 36),
    "injected": (optax.inject_hyperparams(optax.sgd)(learning_rate=RATE, momentum=0.9), 12),
}


@pytest.mark.exhaustive(keep=2)
@pytest.mark.parametrize(
    ("name", "numbers", "every"),
    [
        ("adam", range(1, 12), None),
        ("adam", range(1, 12), 3),
        ("adam without a schedule", (1, 4, 7, 11), 1),
        ("accumulating", (1, 7, 13, 23, 35), 2),
        ("injected", (3, 8, 10), 1),
    ],
)
def test_killed_after_any_call_and_started_again_the_members_are_the_same_bits(tmp_path, name, numbers, every):
    """Nobody else can resume a run exactly: the users who ask are advised to start again."""
    tx, calls = OPTIMIZERS[name]
    update = killed_loop.make_update(tx)
    np.random.seed(0)
    assert train(tmp_path / "whole", tx, update) == calls
    for number in numbers:
        directory = tmp_path / str(number)
        np.random.seed(0)
        with pytest.raises(Killed):
            train(directory, tx, update, after_call=killed_at(number), resume_every=every)
        np.random.seed(number if (directory / "resume").exists() else 0)  # as another process would
        train(directory, tx, update, resume_every=every)
        assert contents(directory) == contents(tmp_path / "whole"), number


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_process_that_is_really_killed_resumes_in_another(tmp_path, name):
    def start(directory, *arguments):
        log = tmp_path / f"{directory} {len(arguments)}"
        return Forked(SCRIPT, tmp_path / directory, *arguments, log=log, strict=True, OMP_NUM_THREADS="1")

    ended = start("run", "10", name)
    assert ended.wait() == (-signal.SIGKILL if name == "SIGKILL" else 143), ended.errors
    done = start("run")
    assert done.wait() == 0, done.errors
    killed_loop.main(tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_an_nnx_model_with_dropout_and_batch_statistics_resumes_exactly(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.out = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.dropout(self.norm(self.linear(x))))

    @nnx.jit
    def update(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.square(model(x)).mean())(model)
        optimizer.update(model, grads)

    def loop(directory, last=12):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)
        with SnapshotRun(directory, CYCLES) as run:
            model, optimizer = run.start(model, optimizer)
            for x in run.batches([jnp.linspace(-1, 1, 12).reshape(4, 3) * scale for scale in (1, 2, 3, 4, 5)]):
                update(model, optimizer, x)
                model, optimizer = run.step(model, optimizer)
                if run.updates == last:
                    break

    loop(tmp_path / "whole")
    loop(tmp_path / "run", 6)
    loop(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def leave(directory, tx=OPTIMIZERS["adam"][0]):
    """Leave a run after its first member."""
    update = killed_loop.make_update(tx)
    with pytest.raises(Killed):
        train(directory, tx, update, after_call=killed_at(5))


def test_an_unfinished_run_is_not_begun_anew_by_a_loop_that_does_not_start(tmp_path):
    leave(tmp_path / "run")
    params, rest = killed_loop.begin(OPTIMIZERS["adam"][0])
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        with pytest.raises(ProtocolError, match=r"holds an unfinished run: begin with variables, rest = run\.start"):
            run.step(params, rest)
        assert run.updates == 0
    assert [member.step for member in SnapshotStore(tmp_path / "run").members] == [4]


def test_another_optimizer_or_model_than_before_is_refused_by_name(tmp_path):
    leave(tmp_path / "run")
    params, rest = killed_loop.begin(optax.sgd(RATE))
    refused = r"a run trained by ScaleByAdamState ScaleByScheduleState, got ScaleByScheduleState: give that optimizer"
    with SnapshotRun(tmp_path / "run", CYCLES) as run, pytest.raises(StoreError, match=refused):
        run.start(params, rest)
    params, (_, key) = killed_loop.begin(OPTIMIZERS["adam"][0])
    of_one_alone = OPTIMIZERS["adam"][0].init({"b": params["b"]})
    refused = r"the resume point does not fit the model .*'0/0/mu/w' \(3, 2\) is not in the model"
    with SnapshotRun(tmp_path / "run", CYCLES) as run, pytest.raises(DataError, match=refused):
        run.start(params, (of_one_alone, key))
    params, rest = killed_loop.begin(OPTIMIZERS["adam"][0])
    refused = r"the resume point does not fit the model .*'w' \(3, 2\) is not in the model"
    with SnapshotRun(tmp_path / "run", CYCLES) as run, pytest.raises(DataError, match=refused):
        run.start({"b": params["b"]}, (of_one_alone, key))
    with SnapshotRun(tmp_path / "run", CYCLES) as run, pytest.raises(ProtocolError, match="do not belong together"):
        run.start({"b": params["b"]}, rest)
    with SnapshotRun(tmp_path / "run", CYCLES) as run, pytest.raises(DataError, match="the resume point"):
        run.start(params)


def test_what_was_saved_comes_back_with_its_dtypes_and_keys(tmp_path):
    kinds = {
        "half": jnp.ones(3, jnp.bfloat16) / 3,
        "count": jnp.array(7, jnp.int32),
        "old key": jax.random.PRNGKey(3),
        "key": jax.random.key(4),
        "rbg": jax.random.split(jax.random.key(5, impl="rbg")),
        "number": 3,
        "nothing": None,
        "host": np.arange(4.0),
    }
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        run.step(jnp.ones(2), kinds)
    other = {
        **{name: jnp.zeros_like(kinds[name]) for name in ("half", "count", "old key")},
        **{"key": jax.random.key(0), "rbg": jax.random.split(jax.random.key(0, impl="rbg"))},
        **{"number": 0, "nothing": None, "host": np.zeros(4)},
    }
    with SnapshotRun(tmp_path / "run", CYCLES) as run:
        variables, found = run.start(jnp.zeros(2), other)
    assert (variables.tolist(), found.keys(), found["number"], found["nothing"]) == ([1, 1], kinds.keys(), 3, None)
    for name in ("half", "count", "old key", "host"):
        assert found[name].dtype == kinds[name].dtype
        np.testing.assert_array_equal(found[name], kinds[name])
    for name in ("key", "rbg"):
        assert found[name].dtype == kinds[name].dtype
        np.testing.assert_array_equal(jax.random.key_data(found[name]), jax.random.key_data(kinds[name]))
