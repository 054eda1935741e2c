"""A Keras model's weights by name, and all that training needs to resume.

Names of layers come from counters that the whole process shares, so a name here is the weight's index in
`model.weights` and then, for people, its path: `000/dense/kernel`. On loading, index and shape decide.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from snapcore import DataError
from snapcore.run import WEIGHTS
from snapcore.store import Tensors, check_fit
from snapcore_keras.schedule import counted, innermost

_OPTIMIZER = "rest/optimizer/"
_OTHERS = "rest/optimizers/"
"""Then the attribute: of a model with more than one, such as a GAN."""
_RANDOM = "rest/random/"
_COUNTS = ("iteration", "learning_rate")
"""What of an optimizer is no moment: never reset."""
_SETTINGS = frozenset(
    (
        *("momentum", "nesterov", "rho", "centered", "beta_1", "beta_2", "epsilon", "amsgrad", "weight_decay"),
        *("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum", "gradient_accumulation_steps"),
    )
)


class Copy:
    """A copy of named variables on their own device, on its way to the host."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._tensors = {name: (ops.copy(variable), _dtype(variable)) for name, variable in variables.items()}

    def resolve(self) -> dict[str, NDArray[Any]]:
        """Return the copy as host arrays that own their memory; bfloat16 as ml_dtypes' own."""
        return {name: np.array(ops.convert_to_numpy(value), dtype) for name, (value, dtype) in self._tensors.items()}


def named_weights(model: Any) -> dict[str, Any]:
    """Return parameters and batch statistics by name, not copied.

    Raises:
        DataError: the model has no weights yet.
    """
    if not model.weights:
        raise DataError(f"{model.name} has no weights yet: build it first, by calling it on a batch")
    return _named("", model.weights, model.name)


def load_weights(model: Any, tensors: Tensors, what: str) -> None:
    """Give the model other weights, by index and shape.

    Raises:
        DataError: they are not this model's; it is left as it was.
    """
    _assign(named_weights(model), tensors, what)


def fitted(variables: Mapping[str, Any], tensors: Tensors, what: str) -> list[NDArray[Any]]:
    """Return the tensors in the order of the variables, by index and shape.

    Raises:
        DataError: they are not what the variables hold.
    """
    own = {_index(name): name for name in variables}
    given = {own.get(_index(name), name): array for name, array in tensors.items()}
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    check_fit({name: array.shape for name, array in given.items()}, shapes, what)
    return [given[name] for name in variables]


def dump_training(model: Any, optimizer: Any) -> Copy:
    """Return a copy of weights, optimizers, and the states of random and of stateful recurrent layers."""
    # A model's own optimizer that its `train_step` never uses is as new: in another process it may not be built.
    used = [name for name, each in _other_optimizers(model, optimizer).items() if each.built and counted(each)]
    return Copy(_training(model, optimizer, used))


def load_training(model: Any, optimizer: Any, tensors: Tensors, what: str = "the resume point") -> None:
    """Resume from what `dump_training` copied.

    Raises:
        DataError: it is not of this model and optimizer, or another optimizer of the model is not built; all are left
            as they were.
    """
    used = sorted({name.split("/")[2] for name in tensors if name.startswith(_OTHERS)})
    others = _other_optimizers(model, optimizer)
    for name in used:
        if name not in others or not others[name].built:
            raise DataError(f"{what} holds the model's {name} too, which is not built: call {name}.build(…) first")
    _assign(_training(model, optimizer, used), tensors, what)


def settings(optimizer: Any) -> dict[str, Any]:
    """Return what of an optimizer's settings is a plain value: its class, momentum and the like, but no rate."""
    inner = innermost(optimizer)
    # Not `get_config`: to describe a schedule, Keras imports TensorFlow.
    plain = {name: value for name, value in vars(inner).items() if type(value) in (bool, int, float, type(None))}
    return {"optimizer": type(inner).__name__, **{name: plain[name] for name in sorted(plain) if name in _SETTINGS}}


def fingerprint(weights: Iterable[Any]) -> tuple[bytes, ...]:
    """Return a few bytes of each weight, which differ once it was changed."""
    sums = (ops.convert_to_numpy(ops.sum(ops.cast(weight, "float32"))) for weight in weights)
    return tuple(np.asarray(each).tobytes() for each in sums)


def reset_moments(optimizer: Any) -> None:
    """Give the optimizer the moments of a new one; its count of updates stays."""
    inner = innermost(optimizer)
    fresh = type(inner).from_config(inner.get_config())
    fresh.build(inner._trainable_variables)  # of a GAN, these are not all of the model's
    for own, new in zip(inner.variables, fresh.variables, strict=True):
        if own.name not in _COUNTS:
            own.assign(new.value)


def is_built(model: Any) -> bool:
    """Return whether a model has all of its weights, as far as its layers know."""
    return bool(model.weights) and all(layer.built for layer in model.layers)


def random_state() -> dict[str, Any] | None:
    """Return the states of PyTorch's generators as plain JSON; None on other backends, which have none.

    Random layers keep a state among the model's variables, but those without a seed draw from these on PyTorch.
    """
    if keras.backend.backend() != "torch":
        return None
    torch = sys.modules["torch"]
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"cpu": _hex(torch.get_rng_state()), "cuda": [_hex(state) for state in gpus]}


def set_random_state(state: Mapping[str, Any] | None) -> None:
    """Set what `random_state` returned; nothing if the run was, or is now, on another backend."""
    if state is None or keras.backend.backend() != "torch":
        return
    torch = sys.modules["torch"]
    torch.set_rng_state(_bytes(state["cpu"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_bytes(each) for each in state["cuda"]])


def _training(model: Any, optimizer: Any, others: Iterable[str]) -> dict[str, Any]:
    weights = {id(variable) for variable in model.weights}
    # What recurrent layers keep from batch to batch is not among a model's variables.
    recurrent = [layer for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    states = [each for layer in recurrent for each in keras.tree.flatten(layer.states)]
    rest = [
        each for each in [*model.variables, *states] if isinstance(each, keras.Variable) and id(each) not in weights
    ]
    known = _other_optimizers(model, optimizer)
    moments = (_named(f"{_OTHERS}{name}/", known[name].variables) for name in others)
    return {
        **{WEIGHTS + name: variable for name, variable in named_weights(model).items()},
        **_named(_OPTIMIZER, optimizer.variables),
        **{name: variable for each in moments for name, variable in each.items()},
        **_named(_RANDOM, rest, model.name),
    }


def _other_optimizers(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return the other optimizers that a model has as attributes."""
    found = ((name, each) for name, each in sorted(vars(model).items()) if isinstance(each, keras.optimizers.Optimizer))
    return {name: each for name, each in found if innermost(each) is not innermost(optimizer)}


def _named(prefix: str, variables: Iterable[Any], owner: str = "") -> dict[str, Any]:
    return {f"{prefix}{index:03d}/{_path(each, owner)}": each for index, each in enumerate(variables)}


def _path(variable: Any, owner: str) -> str:
    path = variable.path.removeprefix(owner + "/")
    return re.sub(r"_\d+(?=/|$)", "", path)


def _assign(variables: Mapping[str, Any], tensors: Tensors, what: str) -> None:
    for variable, array in zip(variables.values(), fitted(variables, tensors, what), strict=True):
        variable.assign(array)


def _index(name: str) -> str:
    """Return what of a name decides: up to the number."""
    found = re.match(r"(?:\w+/)*?\d+(?=/)", name)
    return found.group() if found else name


def _hex(state: Any) -> str:
    return bytes(state.numpy()).hex()


def _bytes(text: str) -> Any:
    return sys.modules["torch"].frombuffer(bytearray.fromhex(text), dtype=sys.modules["torch"].uint8)


def _dtype(variable: Any) -> Any:
    return np.dtype(keras.backend.standardize_dtype(variable.dtype))
