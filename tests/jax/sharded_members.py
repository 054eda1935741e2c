"""Run members spread over four devices of the host, and compare: started by its test with XLA_FLAGS set."""

import jax
import jax.numpy as jnp
import numpy as np

from snapcore.ensemble import Recipe
from snapcore_jax import SnapshotEnsemble


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def members(count):
    keys = jax.random.split(jax.random.key(0), count)
    return [{"w": jax.random.normal(key, (3, 8)), "v": jax.random.normal(key, (8, 4))} for key in keys]


x = np.linspace(-2, 2, 15, dtype=np.float32).reshape(5, 3)
for count, used in ((4, 4), (6, 3), (2, 2), (5, 3), (7, 4)):
    loop = SnapshotEnsemble(members(count), apply_fn)
    sharded = SnapshotEnsemble(members(count), apply_fn, strategy="sharded")
    np.testing.assert_allclose(sharded(x), loop(x), atol=1e-6)
    np.testing.assert_allclose(sharded.members(jnp.array(x)), loop.members(x), atol=1e-6)
    assert len(sharded._run._weights[0].sharding.device_set) == used
    recipe = Recipe(tuple(range(1, count + 1)), temperature=2.0)
    weighted = [SnapshotEnsemble(members(count), apply_fn, strategy=by, recipe=recipe) for by in ("loop", "sharded")]
    np.testing.assert_allclose(weighted[1](x, log=True), weighted[0](x, log=True), atol=1e-6)
    assert (sharded(x) + loop(x)).shape == (5, 4)  # it is where the loop's is
    report = loop.tune(x, rounds=2)
    assert report["sharded"].refused is None, report
print(len(jax.devices()), "devices")
