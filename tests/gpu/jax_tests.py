"""What JAX's adapter must keep on a GPU: copies of what is given away, random keys, memory."""

import functools
import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import NotRun, Setting, Suite, check, check_equal_bits
from flax import nnx
from jax import lax
from jax_common import DEVICE, Cnn, Mlp, about, bits, dense, dense_update, donating, noise, outputs

from snapcore import CosineCycles, StepDecay, program
from snapcore.data import TrainingData
from snapcore.run import execute
from snapcore.store import SnapshotStore
from snapcore_jax import SnapshotEnsemble, SnapshotRun, snapshot_schedule
from snapcore_jax.backend import JaxBackend

suite = Suite(about())

CYCLES = CosineCycles(lr=0.05, steps=48, cycles=3)


def member_bits(directory: Path) -> list[dict[str, bytes]]:
    """Return every member's bytes, as they lie on disk."""
    store = SnapshotStore(directory)
    return [bits(store.load(member.index)) for member in store.members]


def check_members(directory: Path, wanted: list[dict[str, bytes]]) -> None:
    """Compare the members on disk with trees' bytes."""
    members = member_bits(directory)
    check(len(members) == len(wanted), f"{len(members)} members, wanted {len(wanted)}")
    for number, (member, tree) in enumerate(zip(members, wanted, strict=True), 1):
        check_equal_bits(member, tree, f"member {number}")


def momentum(schedule: Any) -> optax.GradientTransformation:
    return optax.sgd(snapshot_schedule(schedule), momentum=0.9)


@suite.test("at most two copies lie on the device, however many snapshots are taken")
def memory_is_bounded(setting: Setting) -> None:
    """Measured first: a peak of the device's memory is the process's, and cannot be reset."""
    width = setting.pick(full=2048, small=512, tiny=128)
    x, y = noise(64, width), noise(64, width)
    optimizer = optax.sgd(0.05, momentum=0.9)
    update = donating(dense_update(optimizer))

    def most(snapshots: int) -> int:
        params = dense(width, 4)
        state, sizes = optimizer.init(params), []
        schedule = StepDecay(lr=0.05, steps=12, snapshots=snapshots or 1)
        run = SnapshotRun(setting.folder / str(snapshots), schedule, rate=0.05) if snapshots else None
        if run:
            params, state = run.start(params, state)
        for _ in range(12):
            params, state = update(params, state, x, y)
            if run:
                params, state = run.step(params, state)
            sizes.append(live_bytes())
        if run:
            run.close()
        return max(sizes)

    copied = 2 * sum(array.nbytes for array in dense(width, 4).values())  # with the moments, for the resume point
    gc.collect()
    plain, peak = most(0), peak_of_device()
    few, many = most(3), most(12)
    setting.found |= {"copy": copied, "live": {"no run": plain, "3 snapshots": few, "12 snapshots": many}}
    for snapshots, found in ((3, few), (12, many)):
        more = (found - plain) / copied
        check(more < 2.05, f"{snapshots} snapshots held {more:.2f} copies more than no run")
    if peak is not None:
        more = ((peak_of_device() or 0) - peak) / copied
        setting.found["copies in the device's peak"] = more
        check(more < 2.1, f"the device's peak is {more:.2f} copies above that of no run")


def live_bytes() -> int:
    """Return what all arrays take together; several may look at one buffer."""
    arrays = [array for array in jax.live_arrays() if not array.is_deleted()]
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in arrays}.values())


def peak_of_device() -> int | None:
    """Return the most bytes that have been in use, where the device counts them."""
    return (DEVICE.memory_stats() or {}).get("peak_bytes_in_use")


@suite.test("members are the weights at their update, though these are given away to the next")
def donated(setting: Setting) -> None:
    width = setting.pick(full=2048, small=256, tiny=32)
    for dtype in (jnp.float32, jnp.bfloat16):
        schedule = StepDecay(lr=0.05, steps=24, snapshots=8)
        x, y = noise(256, width, dtype=dtype), noise(256, width, seed=1, dtype=dtype)
        optimizer = momentum(schedule)
        update = donating(dense_update(optimizer))
        params, wanted = dense(width, 4, dtype), []
        state = optimizer.init(params)
        for step in range(1, 25):
            params, state = update(params, state, x, y)
            if step in schedule.snapshot_steps:
                wanted.append(bits(params))
        params = dense(width, 4, dtype)
        directory = setting.folder / np.dtype(dtype).name
        with SnapshotRun(directory, schedule) as run:
            params, state = run.start(params, optimizer.init(params))
            while not run.finished:  # nothing here waits for the device
                params, state = run.step(*update(params, state, x, y))
        check_members(directory, wanted)


@suite.test("a scan of several updates is counted by the optimizer's own count")
def scanned(setting: Setting) -> None:
    optimizer = momentum(CYCLES)
    update = dense_update(optimizer)

    def four(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        return lax.fori_loop(0, 4, lambda _, carry: update(*carry, x, y), (params, state))

    several = donating(four)
    params, x, y = dense(32, 2), noise(16, 32), noise(16, 32, seed=1)
    with SnapshotRun(setting.folder / "run", CYCLES) as run:
        params, state = run.start(params, optimizer.init(params))
        wanted = []
        for step in range(4, 49, 4):
            params, state = several(params, state, x, y)
            if step in CYCLES.snapshot_steps:
                wanted.append(bits(params))
            params, state = run.step(params, state)
        check(run.finished, f"the run counts {run.updates} updates of 48")
    check_members(setting.folder / "run", wanted)


def walk(directory: Path, update: Any, *, leave: int = 0, fail: int = 0, seed: int = 0) -> dict[str, bytes]:
    """Train with random keys on batches; leave the run after an update, or fail in the next."""
    batches = [(noise(16, 32, seed=n), noise(16, 32, seed=n + 5)) for n in range(5)]
    params, key = dense(32, 2), jax.random.key(seed)
    with SnapshotRun(directory, CYCLES, resume_every=3) as run:
        params, (state, key) = run.start(params, (momentum(CYCLES).init(params), key))
        for x, y in run.batches(batches):
            params, state, key = update(params, state, key, x, y)
            params, (state, key) = run.step(params, (state, key))
            if run.updates == leave:
                break
            if run.updates == fail:
                raise InterruptedError
    return bits({**params, "key": jax.random.key_data(key)})


@suite.test("random keys and the position in the data resume bit for bit")
def keys_resume(setting: Setting) -> None:
    update = dense_update(momentum(CYCLES))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def dropping(params: Any, state: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        key, own = jax.random.split(key)
        return *update(params, state, x * jax.random.bernoulli(own, 0.9, x.shape), y), key

    directory = setting.folder / "resumed"
    whole = walk(setting.folder / "whole", dropping)
    walk(directory, dropping, leave=7)
    try:
        walk(directory, dropping, fail=20, seed=1)
    except InterruptedError:
        resumed = walk(directory, dropping, seed=2)
    check_members(directory, member_bits(setting.folder / "whole"))
    check_equal_bits(resumed, whole, "the state at the end")


def images(examples: int = 256) -> TrainingData:
    """Return images of noise, each brighter or darker by its class."""
    random = np.random.default_rng(0)
    y = random.integers(0, 10, examples)
    x = random.standard_normal((examples, 3, 8, 8), np.float32) + (y[:, None, None, None] - 4.5) / 4
    return TrainingData(x.astype(np.float32), y, n_classes=10, batch_size=32)


dropping_mlp = functools.partial(Mlp, dropout=0.1)
dropping_cnn = functools.partial(Cnn, dropout=0.1, width=8)


@suite.test("the managed loop resumes bit for bit, in every precision")
def managed_resumes(setting: Setting) -> None:
    method = program("snapshot", lr=0.05, steps=120, cycles=3)
    model = setting.pick(full=dropping_cnn, small=dropping_mlp, tiny=dropping_mlp)  # XLA compiles one slowly for a CPU

    def run(directory: Path, precision: str, *, fail: float = math.inf) -> None:
        def report(step: int, loss: float) -> None:
            if step == fail:
                raise InterruptedError

        execute(
            method,
            JaxBackend(),
            model=model,
            data=images(),
            directory=directory,
            report=report,
            resume_every=25,
            precision=precision,
        )

    both = ("float32", "bfloat16")
    for precision in setting.pick(full=both, small=both, tiny=both[:1]):
        run(setting.folder / precision / "whole", precision)
        resumed = setting.folder / precision / "resumed"
        try:
            run(resumed, precision, fail=90)
        except InterruptedError:
            run(resumed, precision)
        check_members(resumed, member_bits(setting.folder / precision / "whole"))


@suite.test("every strategy gives the mean that float64 gives on the host")
def strategies(setting: Setting) -> None:
    members = [{name: array * (1 + n / 10) for name, array in dense(32, 2).items()} for n in range(6)]
    x = noise(16, 32)
    wanted = np.mean([softmax(by_hand(member, np.asarray(x, float))) for member in members], axis=0)
    for name, ensemble in ensembles(members, x):
        off = float(np.abs(np.asarray(ensemble(x)) - wanted).max())
        setting.found[f"largest difference, {name}"] = off
        check(off < 1e-5, f"{name}: probabilities differ by {off:.2g}")


def ensembles(members: list[Any], x: jax.Array) -> Iterator[tuple[str, SnapshotEnsemble]]:
    for strategy in ("loop", "stacked", "map"):
        yield strategy, SnapshotEnsemble(members, outputs, strategy=strategy)
    tuned = SnapshotEnsemble(members, outputs)
    tuned.tune(x)
    yield "tuned", tuned


def by_hand(params: Any, x: np.ndarray) -> np.ndarray:
    for n in range(2):
        x = np.maximum(x @ np.asarray(params[f"w{n:02}"], float) + np.asarray(params[f"b{n:02}"], float), 0)
    return x


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@suite.test("members of Flax modules are loaded onto the device, and predict what the trained model does")
def loaded(setting: Setting) -> None:
    backend, data = JaxBackend(), images()
    method = program("snapshot", lr=0.05, steps=40, cycles=2)
    state = execute(method, backend, model=Mlp, data=data, directory=setting.folder / "run")
    model = nnx.eval_shape(lambda: Mlp((3, 8, 8), 10, nnx.Rngs(0)))
    model.eval()
    graph = nnx.graphdef(model)
    ensemble = SnapshotEnsemble.load(
        setting.folder / "run", lambda weights, x: nnx.merge(graph, weights)(x), like=nnx.state(model), last=1
    )
    off = float(np.abs(np.asarray(ensemble(jnp.array(data.x))) - softmax(backend.logits(state, data.x))).max())
    setting.found["largest difference"] = off
    check(off < 1e-3, f"probabilities differ by {off:.2g}")


@suite.test("the conformance suite holds on the device", needs_gpu=True, share=4)
def conformance(setting: Setting) -> None:
    try:
        import pytest
    except ModuleNotFoundError as error:
        raise NotRun("pytest is not installed") from error
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "default", "-k", "TestJaxBackend"]
    code = pytest.main([*options, "tests/conformance/test_jax.py"])
    check(code == 0, f"pytest ended with {code!r}; its output is in the log")
