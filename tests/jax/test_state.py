"""Arrays by name: what a tree's are called, how they are copied, and how they come back."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec

from snapcore import DataError
from snapcore_jax.state import Copy, dump_training, load_training, named_leaves, with_leaves


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.layers[0].kernel
        self.activation = nnx.relu


NET_WEIGHTS = [f"layers/{index}/{name}" for index in (0, 1) for name in ("bias", "kernel")]
NET_WEIGHTS += [f"norm/{name}" for name in ("bias", "mean", "scale", "var")]
NET_KEYS = ["dropout/rngs/count", "dropout/rngs/key"]


class Equi(eqx.Module):
    layer: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    norm: eqx.nn.BatchNorm
    activation: object


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "key"], meta_fields=["name"])
@dataclass
class Layer:
    weight: jax.Array
    key: jax.Array
    name: str = "layer"


@nnx.jit
def net():
    return Net(nnx.Rngs(3))


def equi():
    def make():
        layer = eqx.nn.Linear(2, 3, key=jax.random.key(1))
        return Equi(layer, eqx.nn.Dropout(0.3), eqx.nn.BatchNorm(3, "batch", mode="batch"), jax.nn.relu)

    return eqx.nn.make_with_state(make)()


def mixed():
    return {
        "layer": Layer(jnp.ones((2, 2), jnp.bfloat16), jax.random.key(5)),
        "host": (np.arange(3), np.float64(0.25)),
        "numbers": [3, 0.5, True, 1 - 2j],
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
    }


def train_state():
    variables = linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 2)))
    return {"step": 0, **variables, "optimizer": optax.adam(1e-3).init(variables)}


def optimizer_of_net():
    return nnx.Optimizer(net(), optax.adam(1e-3), wrt=nnx.Param)


TREES = {
    "nnx module": net,
    "nnx state": lambda: nnx.state(net()),
    "nnx pure dictionary": lambda: nnx.to_pure_dict(nnx.state(net())),
    "nnx optimizer": optimizer_of_net,
    "linen": train_state,
    "equinox": equi,
    "equinox moments": lambda: optax.adam(1e-3).init(eqx.filter(equi()[0], eqx.is_array)),
    "mixed": mixed,
    "array": lambda: jnp.arange(3.0),
    "nothing": lambda: (),
}


def host(tree):
    return Copy(named_leaves(tree)).resolve()


def changed(tensors):
    return {name: (array == 0).astype(array.dtype) for name, array in tensors.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
        assert array.dtype == other[name].dtype, name


@pytest.mark.parametrize("kind", TREES)
def test_what_was_copied_can_be_put_back_into_any_tree(kind):
    tree = TREES[kind]()
    before = host(tree)
    new = with_leaves(tree, changed(before))
    same(host(new), changed(before))
    same(host(tree), before)
    assert type(new) is type(tree)
    assert [type(leaf) for leaf in named_leaves(new).values()] == [type(leaf) for leaf in named_leaves(tree).values()]


@pytest.mark.parametrize("kind", ["nnx module", "nnx state", "nnx pure dictionary"])
def test_a_module_its_state_and_the_dictionary_of_that_have_the_same_names(kind):
    tree = TREES[kind]()
    assert sorted(named_leaves(tree)) == sorted(NET_WEIGHTS + NET_KEYS)
    assert sorted(named_leaves({"model": tree})) == sorted(f"model/{name}" for name in NET_WEIGHTS + NET_KEYS)


@pytest.mark.parametrize("kind", ["nnx module", "nnx state"])
def test_random_keys_of_nnx_can_be_left_out_and_then_stay_what_they_were(kind):
    tree = TREES[kind]()
    assert sorted(named_leaves(tree, random=False)) == sorted(NET_WEIGHTS)
    weights = {name: array for name, array in host(tree).items() if name in NET_WEIGHTS}
    new = host(with_leaves(tree, changed(weights), random=False))
    same(new, {**changed(weights), **{name: host(tree)[name] for name in NET_KEYS}})


def test_typed_random_keys_are_known_wherever_they_are():
    assert set(named_leaves(mixed())) - set(named_leaves(mixed(), random=False)) == {"layer/key", "keys"}


def test_a_variable_that_two_modules_share_is_there_once_and_shared_again():
    new = with_leaves(net(), changed(host(net())))
    assert new.tied is new.layers[0].kernel


def test_of_an_equinox_module_arrays_alone_are_named_and_all_else_stays():
    model, state = equi()
    assert list(named_leaves(model)) == ["layer/weight", "layer/bias", "norm/weight", "norm/bias"]
    assert set(named_leaves((model, state))) > {"0/layer/weight", "1/0"}
    evaluating = eqx.nn.inference_mode(model)
    new = with_leaves(evaluating, changed(host(model)))
    assert (new.dropout.inference, new.dropout.p, new.activation) == (True, 0.3, jax.nn.relu)


def test_dtypes_are_those_of_the_tree_and_not_of_what_is_put_back():
    tree = {"narrow": jnp.zeros(2, jnp.bfloat16), "host": np.zeros(2, np.int16), "number": 1}
    new = with_leaves(tree, {"narrow": np.ones(2), "host": np.ones(2), "number": np.int64(7)})
    assert [new["narrow"].dtype, new["host"].dtype, type(new["number"])] == [jnp.bfloat16, np.int16, int]


def test_bfloat16_is_that_of_ml_dtypes_on_the_host_and_a_key_is_its_data():
    tensors = host(mixed())
    assert tensors["layer/weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensors["layer/key"], jax.random.key_data(jax.random.key(5)))
    assert jax.random.key_impl(with_leaves(mixed(), tensors)["keys"]) == jax.random.key_impl(mixed()["keys"])


def test_a_tree_of_shapes_alone_can_be_filled():
    shapes = jax.eval_shape(lambda: {"weight": jnp.ones(3), "key": jax.random.key(0)})
    new = with_leaves(shapes, {"weight": np.arange(3.0), "key": np.array([1, 2], np.uint32)})
    np.testing.assert_array_equal(new["weight"], [0, 1, 2])
    assert jnp.issubdtype(new["key"].dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("axes", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_arrays_come_back_to_where_they_lay(axes):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(axes,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    tree = {"committed": jax.device_put(jnp.ones(2), sharding), "anywhere": jnp.ones(2)}
    new = with_leaves(tree, changed(host(tree)))
    assert new["committed"].sharding == sharding
    assert (new["committed"].committed, new["anywhere"].committed) == (True, False)


def test_a_copy_is_made_at_once_and_the_originals_may_be_given_away():
    update = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    tree = {"a": jnp.arange(100_000.0), "b": jnp.ones(3, jnp.bfloat16)}
    pending = Copy(named_leaves(tree))
    new = update(tree)
    assert all(array.is_deleted() for array in tree.values())
    same(pending.resolve(), {"a": np.arange(100_000, dtype=np.float32), "b": np.ones(3, ml_dtypes.bfloat16)})
    assert float(new["a"][1]) == 2


def test_host_arrays_are_copied_at_once_too_and_results_own_their_memory():
    array = np.zeros(3)
    pending = Copy({"host": array, "device": jnp.ones(3), "number": 2})
    array[:] = 7
    resolved = pending.resolve()
    assert resolved["host"].tolist() == [0, 0, 0]
    assert all(array.flags.owndata for array in resolved.values())


def test_what_is_put_back_is_not_the_callers_memory():
    array = np.zeros(1 << 16, np.float32)
    new = with_leaves({"a": jnp.ones(1 << 16), "b": np.ones(1 << 16)}, {"a": array, "b": array})
    array[:] = 7
    assert not np.any(new["a"])
    assert not np.any(new["b"])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [jnp.ones(1), "text"]}, r"'a/1' of the tree is str: keep only what is trained or counted"),
        ({"a": object()}, "'a' of the tree is object"),
        (eqx.tree_at(lambda m: m.activation, equi()[0], object()), "'activation' of the tree is object: make it a st"),
        ({"a/b": 1, "a": {"b": 2}}, "two arrays are called 'a/b'"),
    ],
)
def test_what_cannot_be_named_is_refused_by_its_path(tree, message):
    with pytest.raises(DataError, match=message):
        named_leaves(tree)


def test_what_does_not_fit_is_refused_by_name_and_shape():
    tree = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(2)}}
    with pytest.raises(
        DataError, match=r"the member does not fit .* 'b/c' \(2,\) is missing; 'a' is \(3, 2\).* \(2, 3"
    ):
        with_leaves(tree, {"a": np.ones((3, 2))})
    with pytest.raises(
        DataError, match=r"^a file does not fit the model \(1 differences\): 'd' \(\) is not in the mod"
    ):
        with_leaves({}, {"d": np.float32(1)}, "a file")


def test_all_that_training_needs_is_dumped_with_the_weights_first_and_loaded_again():
    model, optimizer = net(), optimizer_of_net()
    tensors = dump_training(model, (optimizer, jax.random.key(3))).resolve()
    assert [name for name in tensors if name.startswith("weights/")] == [
        f"weights/{name}" for name in named_leaves(model, random=False)
    ]
    assert all(name.startswith(("weights/", "rest/")) for name in tensors)
    other = Net(nnx.Rngs(9)), (optimizer_of_net(), jax.random.key(4))
    loaded = load_training(*other, tensors)
    same(host(loaded[0]), host(model))
    same(host(loaded[1]), host((optimizer, jax.random.key(3))))
    with pytest.raises(DataError, match="the resume point does not fit"):
        load_training(*other, {name: tensors[name] for name in tensors if "count" not in name})


@pytest.mark.parametrize("library", ["jax", "optax"])
def test_without_its_libraries_the_adapter_says_what_to_install(library):
    code = f"import sys; sys.modules[{library!r}] = None; import snapcore_jax"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ModuleNotFoundError: snapcore_jax needs JAX and optax: pip install 'snapcore[jax]'"
