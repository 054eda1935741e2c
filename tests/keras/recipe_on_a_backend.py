"""Apply a recipe on the backend that KERAS_BACKEND names, by every strategy, and print those that agree with SciPy."""

import keras
import numpy as np
from keras import layers, ops
from scipy import special

from snapcore.ensemble import Cascade, Predictions, Recipe, run_cascade
from snapcore_keras import SnapshotEnsemble

x = np.linspace(-2, 2, 24, dtype=np.float32).reshape(8, 3)
kernels = np.random.default_rng(5).normal(size=(3, 3, 4)).astype(np.float32) * 2
recipe = Recipe((1, 2, 3), temperature=2.5, cascade=Cascade("probability", 0.7, (1.3, 1.2, 1.0)))
predictions = Predictions(special.log_softmax([x.astype(np.float64) @ kernel for kernel in kernels], -1))
model = keras.Sequential([keras.Input((3,)), layers.Dense(4, use_bias=False)])


def close(found, wanted):
    np.testing.assert_allclose(ops.convert_to_numpy(found), wanted, atol=1e-6, rtol=1e-6)


for strategy in ("loop", "stacked"):
    ensemble = SnapshotEnsemble([[kernel] for kernel in kernels], model, strategy=strategy, recipe=recipe)
    close(ensemble(x, log=True), recipe.apply(predictions))
    close(ensemble(x), np.exp(recipe.apply(predictions)))
    close(ensemble.predict(x, log=True), recipe.apply(predictions))
    found, used = ensemble.cascade(x, log=True, return_used=True)
    close(found, run_cascade(predictions, recipe)[0])
    np.testing.assert_array_equal(used, run_cascade(predictions, recipe)[1])
    plain = SnapshotEnsemble([[kernel] for kernel in kernels], model, strategy=strategy)
    close(plain(x, log=True), special.logsumexp(predictions[:], axis=0) - np.log(3))
    print(strategy)
