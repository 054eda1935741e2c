"""The paper's optimizer for Keras: L2 inside the gradient, and momentum by either of two rules."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import keras
from keras import ops

from snapcore import DataError

Velocity = Literal["updates", "gradients"]
Optimizer = Callable[[Any], keras.optimizers.Optimizer]
"""Makes an optimizer at a learning rate, a number or a schedule."""


@keras.saving.register_keras_serializable(package="snapcore")
class Sgd(keras.optimizers.SGD):  # type: ignore[misc]
    """Stochastic gradient descent with momentum m and L2 within the gradient, g = ∇ + l2 · w, on all parameters.

    While the rate a moves, two rules that the field calls by one name differ:

    | velocity | v | w, in Nesterov's form | as in |
    |---|---|---|---|
    | `"updates"` | m · v − a · g | w + m · v − a · g | Keras; Sutskever et al. |
    | `"gradients"` | m · v + g | w − a · (g + m · v) | PyTorch, optax, the paper's own code |

    In the first, the velocity still moves at the rate of the updates before.

    Arguments:
        learning_rate: a float or a schedule.
        momentum: m, 0 … 1.
        nesterov: whether in Nesterov's form.
        l2: what of each parameter is added to its gradient, 0 or more. (Keras' own `weight_decay` is another thing:
            it is not part of the gradient.)
        velocity: what the velocity is a sum of.
        **options: go to `keras.optimizers.SGD`.

    Raises:
        DataError: no such velocity.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013, section 2;
    Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, section 4.
    """

    def __init__(
        self,
        learning_rate: Any = 0.1,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        l2: float = 1e-4,
        velocity: Velocity = "updates",
        **options: Any,
    ) -> None:
        if velocity not in get_args(Velocity):
            raise DataError(f"velocity must be one of {sorted(get_args(Velocity))}, got {velocity!r}")
        super().__init__(learning_rate, momentum=float(momentum), nesterov=nesterov, **options)
        self.l2, self.velocity = float(l2), velocity

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Move one parameter."""
        gradient = ops.cast(gradient, variable.dtype) + ops.cast(self.l2, variable.dtype) * variable
        if self.velocity == "updates" or not self.momentum:
            super().update_step(gradient, variable, learning_rate)
            return
        momentum = ops.cast(self.momentum, variable.dtype)
        velocity = momentum * self.momentums[self._get_variable_index(variable)] + gradient
        self.assign(self.momentums[self._get_variable_index(variable)], velocity)
        step = gradient + momentum * velocity if self.nesterov else velocity
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * step)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments as plain JSON."""
        return {**super().get_config(), "l2": self.l2, "velocity": self.velocity}


def make_optimizer(
    chosen: Optimizer | str, rate: Any, *, momentum: float, weight_decay: float, velocity: Velocity
) -> keras.optimizers.Optimizer:
    """Return the optimizer that is named, or made by a function, at a learning rate.

    Raises:
        DataError: no such name.
    """
    if not isinstance(chosen, str):
        return chosen(rate)
    if chosen == "sgd":
        return Sgd(rate, momentum=momentum, l2=weight_decay, velocity=velocity)
    if chosen == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=weight_decay, epsilon=1e-8)  # as in PyTorch and optax
    raise DataError(f"optimizer must be 'sgd', 'adamw' or a function of the rate, got {chosen!r}")
