"""Weights by position and shape, and all that training needs to resume."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers

from snapcore import DataError
from snapcore.store import SnapshotStore, map_tensors
from snapcore_keras.models import MODELS
from snapcore_keras.state import Copy, dump_training, load_training, load_weights, named_weights, reset_moments


def small(dtype=None):
    dense = layers.Dense(3, dtype=dtype)
    return keras.Sequential([keras.Input((4,)), dense, layers.BatchNormalization(), layers.Dropout(0.5)])


def weights_of(model):
    return Copy(named_weights(model)).resolve()


def test_names_are_position_and_path_and_do_not_depend_on_keras_counters():
    names = [list(named_weights(small())) for _ in range(2)]
    assert names[0] == names[1]
    assert names[0] == [
        "000/dense/kernel",
        "001/dense/bias",
        "002/batch_normalization/gamma",
        "003/batch_normalization/beta",
        "004/batch_normalization/moving_mean",
        "005/batch_normalization/moving_variance",
    ]


def test_a_copy_is_not_changed_by_what_comes_after():
    model = small()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    copy, before = Copy(named_weights(model)), [np.array(each) for each in model.get_weights()]
    for _ in range(3):
        model.train_on_batch(np.ones((8, 4), np.float32), np.zeros((8, 3), np.float32))
    for found, wanted in zip(copy.resolve().values(), before, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_position_and_shape_decide_whatever_the_path_says():
    one, other = small(), small()
    renamed = {f"{name[:3]}/another/path": array for name, array in weights_of(one).items()}
    load_weights(other, renamed, "the member")
    for wanted, found in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_weights_of_another_model_are_refused_and_nothing_is_changed():
    model = small()
    before = model.get_weights()
    tensors = weights_of(model)
    wrong = {
        "missing": {name: array for name, array in tensors.items() if name != "001/dense/bias"},
        "is (5,), the model's is (3,)": {**tensors, "001/dense/bias": np.zeros(5)},
        "'dense.weight' (3,) is not in the model": {**tensors, "dense.weight": np.zeros(3)},
    }
    for message, given in wrong.items():
        with pytest.raises(DataError) as caught:
            load_weights(model, given, "the member")
        assert message in str(caught.value)
    for found, wanted in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_model_without_weights_is_refused_with_the_cure():
    with pytest.raises(DataError, match="has no weights yet: build it first, by calling it on a batch"):
        named_weights(keras.Sequential([layers.Dense(2)]))


def test_bfloat16_weights_come_back_bit_for_bit(tmp_path):
    model, other = small("bfloat16"), small("bfloat16")
    tensors = weights_of(model)
    assert tensors["000/dense/kernel"].dtype == ml_dtypes.bfloat16
    with SnapshotStore(tmp_path / "run", "w") as store:
        store.save(tensors, index=1, step=1, cycle=0, lr=0.1, framework="keras")
    loaded = map_tensors(tmp_path / "run" / "snapshot-001.safetensors")
    load_weights(other, loaded, "the member")
    for name, array in weights_of(other).items():
        assert array.dtype == tensors[name].dtype
        assert array.tobytes() == tensors[name].tobytes()


def trained(model, updates):
    rng = np.random.default_rng(1)
    for _ in range(updates):
        model.train_on_batch(rng.normal(size=(8, 4)).astype(np.float32), np.ones((8, 3), np.float32))


def compiled(optimizer):
    model = small()
    model.compile(optimizer(0.05), "mse")
    return model


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam, keras.optimizers.Nadam, keras.optimizers.RMSprop])
def test_a_dump_has_all_that_continues_random_layers_too(optimizer):
    one, other = compiled(optimizer), compiled(optimizer)
    trained(one, 5)
    dumped = dump_training(one, one.optimizer).resolve()
    other.optimizer.build(other.trainable_variables)
    load_training(other, other.optimizer, dumped)
    for model in (one, other):
        trained(model, 3)
    for wanted, found in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam, keras.optimizers.Nadam, keras.optimizers.Adagrad])
def test_moments_are_reset_to_a_new_optimizers_and_the_count_is_kept(optimizer):
    """Not to zero: Nadam begins with a one, Adagrad with its `initial_accumulator_value`."""
    model = compiled(optimizer)
    fresh = optimizer(0.05)
    fresh.build(model.trainable_variables)
    trained(model, 5)
    reset_moments(model.optimizer)
    assert int(model.optimizer.iterations.numpy()) == 5
    for own, new in zip(model.optimizer.variables, fresh.variables, strict=True):
        if own.name not in ("iteration", "learning_rate"):
            np.testing.assert_array_equal(own.numpy(), new.numpy(), err_msg=own.path)


@pytest.mark.parametrize(("model", "count"), [("mlp", 6), ("cnn", 19)])
def test_the_built_in_models_have_the_shapes_of_every_framework(model, count):
    built = MODELS[model]((1, 8, 8), 10)
    assert len(built.weights) == count
    assert built(np.zeros((2, 1, 8, 8), np.float32)).shape == (2, 10)


def test_the_cnn_refuses_what_is_no_image_and_what_is_too_small():
    for shape in ((64,), (1, 7, 8)):
        with pytest.raises(DataError, match="each side 8 or more"):
            MODELS["cnn"](shape, 10)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_built_in_models_begin_within_one_over_the_root_of_the_fan_in(model):
    for weight in MODELS[model]((1, 8, 8), 10).weights:
        values = np.asarray(weight)
        if values.ndim > 1:
            bound = 1 / np.sqrt(np.prod(values.shape[:-1]))
            assert 0.9 * bound < np.abs(values).max() <= bound
