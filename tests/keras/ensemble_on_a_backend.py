"""Load a run into an ensemble on a backend: `python ensemble_on_a_backend.py jax|torch DIRECTORY`.

DIRECTORY holds `run`, and `wanted.npz` with a batch and each member's probabilities. It prints what held.
"""

import os
import sys
from pathlib import Path

backend, directory = sys.argv[1], Path(sys.argv[2])
os.environ["KERAS_BACKEND"] = backend

import keras  # noqa: E402 - the backend is chosen before
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from keras import layers, ops  # noqa: E402

from snapcore import DataError  # noqa: E402
from snapcore.store import SnapshotStore, map_tensors  # noqa: E402
from snapcore_keras import SnapshotEnsemble  # noqa: E402
from snapcore_keras.state import Copy, named_weights  # noqa: E402

given = np.load(directory / "wanted.npz")
x, wanted = given["x"], given["probabilities"]


def close(found, expected):
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, atol=1e-6)


def architecture():
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(5), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(4)]
    )


def jitted(ensemble):
    import jax

    return jax.jit(ensemble)


def by_every_strategy():
    model = architecture()
    for strategy in ("loop", "stacked"):
        ensemble = SnapshotEnsemble.load(directory / "run", model, strategy=strategy)
        if backend == "jax":  # where there is no value to look at
            close(jitted(ensemble)(x), wanted.mean(0))
        close(ensemble(x), wanted.mean(0))
        close(ensemble.members(x), wanted)
        print(strategy)
    close(ensemble.predict(x, batch_size=4), wanted.mean(0))
    print("predict")
    ensemble.functional().save(directory / "one.keras")
    close(keras.models.load_model(directory / "one.keras")(x), wanted.mean(0))
    print("saved")
    report = ensemble.tune(x, rounds=1)
    assert set(report) == {"loop", "stacked"}
    assert report["stacked"].deviation <= 1e-6
    print("tuned")


class Probable(keras.Model):
    """Gives probabilities in a way that nothing tells."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(4)

    def call(self, inputs):
        return ops.softmax(self.out(inputs))


class Longest(keras.Model):
    """Of no length in particular."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(4)

    def call(self, inputs):
        return self.out(ops.max(inputs, 1))


def of_any_length():
    model = Longest()
    model(np.zeros((1, 2, 3), np.float32))
    ensemble = SnapshotEnsemble([model.get_weights()], model)
    for length in (2, 7):
        batch = np.sin(np.arange(5 * length * 3, dtype=np.float32)).reshape(5, length, 3)
        close(ensemble.predict(batch, batch_size=3), ops.convert_to_numpy(ensemble(batch)))
    print("lengths")


class Unstackable(keras.Model):
    """Asks for a value amid its call."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(4)

    def call(self, inputs):
        outputs = self.out(inputs)
        return outputs * float(ops.max(ops.abs(outputs)))


class Failing(Longest):
    """Refuses batches of two examples."""

    def call(self, inputs):
        if len(inputs) == 2:
            raise ValueError("two are too few")
        return super().call(inputs)


def errors_are_distinct():
    model = Unstackable()
    model(x)
    ensemble = SnapshotEnsemble([model.get_weights()], model, strategy="stacked")
    with pytest.raises(DataError, match=r"(?s)cannot be run stacked.*use strategy='loop'"):
        ensemble(x)
    model, batch = Failing(), np.ones((3, 2, 3), np.float32)
    model(batch)
    ensemble = SnapshotEnsemble([model.get_weights()], model, strategy="stacked")
    ensemble(batch)
    with pytest.raises(ValueError, match="two are too few") as caught:
        ensemble(batch[:2])
    assert not isinstance(caught.value, DataError)
    print("errors")


def refuse_probabilities():
    model = Probable()
    model(x)
    for strategy in ("loop", "stacked"):
        if backend == "jax":
            with pytest.raises(DataError, match="already are probabilities"):
                jitted(SnapshotEnsemble([model.get_weights()], model, strategy=strategy))(x)
        with pytest.raises(DataError, match="already are probabilities"):
            SnapshotEnsemble([model.get_weights()], model, strategy=strategy).functional(x)
        with pytest.raises(DataError, match="already are probabilities"):
            SnapshotEnsemble([model.get_weights()], model, strategy=strategy)(x)
    print("refused")


class Asking(keras.callbacks.Callback):
    """Asks an ensemble of the model that is being trained, amid an epoch."""

    def __init__(self, ensemble):
        super().__init__()
        self.ensemble, self.found = ensemble, []

    def on_train_batch_end(self, batch, logs=None):
        self.found.append(ops.convert_to_numpy(self.ensemble(x)))


def amid_training():
    model = architecture()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    asking = Asking(SnapshotEnsemble.load(directory / "run", model))
    model.fit(x, np.arange(len(x)) % 4, batch_size=3, verbose=0, callbacks=[asking])
    assert len(asking.found) == 2
    for found in asking.found:
        close(found, wanted.mean(0))
    print("amid")


def bfloat16_bit_for_bit():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, dtype="bfloat16")])
    with SnapshotStore(directory / "half", "w") as store:
        written = Copy(named_weights(model)).resolve()
        store.save(written, index=1, step=1, cycle=0, lr=0.1, framework="keras")
    ensemble = SnapshotEnsemble.load(directory / "half", model)
    held = Copy(named_weights(ensemble.functional())).resolve()
    read = map_tensors(SnapshotStore(directory / "half").file(1))
    assert {array.dtype.name for array in read.values()} == {"bfloat16"}
    assert [array.tobytes() for array in held.values()] == [array.tobytes() for array in read.values()]
    assert keras.backend.standardize_dtype(ensemble(x).dtype) == "float32"
    print("bfloat16")


def what_follows_from_weights():
    """`Normalization` computes it as it is loaded; here by every strategy."""
    layer = layers.Normalization()
    model = keras.Sequential([keras.Input((3,)), layer, layers.Dense(4)])
    given, expected = [], []
    for data in (x, 3 * x + 7):
        layer.adapt(data)
        given.append(model.get_weights())
        expected.append(ops.convert_to_numpy(ops.softmax(model(x))))
    before = ops.convert_to_numpy(model(x))
    fresh = keras.Sequential([keras.Input((3,)), layers.Normalization(), layers.Dense(4)])
    for architecture, strategy in ((model, "loop"), (model, "stacked"), (fresh, "loop"), (fresh, "stacked")):
        ensemble = SnapshotEnsemble(given, architecture, strategy=strategy)
        close(ensemble.members(x), expected)
        close(ensemble.predict(x), np.mean(expected, 0))
        if backend == "jax":
            close(jitted(ensemble)(x), np.mean(expected, 0))
    ensemble.functional().save(directory / "normalized.keras")
    close(keras.models.load_model(directory / "normalized.keras")(x), np.mean(expected, 0))
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), before)
    print("follows")


class Elsewhere(Longest):
    """Runs other weights than those it says it has."""

    live = np.sin(np.arange(12, dtype=np.float32)).reshape(3, 4)

    def call(self, inputs):
        return ops.matmul(ops.max(inputs, 1), ops.convert_to_tensor(self.live))


def refuse_other_weights():
    model, batch = Elsewhere(), np.ones((3, 2, 3), np.float32)
    model.out.build((None, 3))
    model(batch)
    given = [[array + number for array in model.get_weights()] for number in range(2)]
    for strategy in ("loop", "stacked"):
        with pytest.raises(DataError, match="weights differ, yet their outputs are bit-equal"):
            SnapshotEnsemble(given, model, strategy=strategy)(batch)
    if backend == "torch":
        refuse_what_is_of_pytorch()
    print("elsewhere")


def refuse_what_is_of_pytorch():
    import torch

    from snapcore_torch import SnapshotEnsemble as OfPyTorch

    wrapped = keras.layers.TorchModuleWrapper(torch.nn.Linear(3, 2), output_shape=(None, 2))
    within = keras.Sequential([keras.Input((3,)), keras.Sequential([keras.Input((3,)), wrapped]), layers.Dense(2)])
    for model in (keras.Sequential([keras.Input((3,)), wrapped]), within):
        with pytest.raises(
            DataError, match="is a TorchModuleWrapper, which runs weights of its own: assign each member"
        ):
            SnapshotEnsemble([model.get_weights()], model)
    with SnapshotStore(directory / "of torch", "w") as store:
        arrays = {name: np.asarray(value) for name, value in architecture().state_dict().items()}
        store.save(arrays, index=1, step=1, cycle=0, lr=0.1, framework="torch")
    for given in (architecture(), architecture, lambda: torch.nn.Sequential(architecture())):
        with pytest.raises(DataError, match="copies itself under other names: load the run with snapcore_keras"):
            OfPyTorch.load(directory / "of torch", given)


def alone_and_again():
    import pickle

    ensemble = SnapshotEnsemble.load(directory / "run", architecture(), members=[3, 1])
    for member, expected in zip(ensemble, wanted[[2, 0]], strict=True):
        close(member(x), expected)
        close(member.predict([(x[:4], None), (x[4:], None)]), expected)
    again = pickle.loads(pickle.dumps(ensemble))
    close(again(x), wanted[[2, 0]].mean(0))
    print("again")


assert keras.backend.backend() == backend
by_every_strategy()
of_any_length()
errors_are_distinct()
refuse_probabilities()
amid_training()
bfloat16_bit_for_bit()
what_follows_from_weights()
refuse_other_weights()
alone_and_again()
