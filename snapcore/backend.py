"""What a framework must be able to do, and how one is found by name.

A backend is a handful of pure verbs over a state of its own. Every verb returns the state to use from then on, which
is right for frameworks that change tensors in place and for those that cannot. An adapter does not inherit from
`Backend`; the type checker compares the two.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from math import log, pi
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from snapcore.errors import BackendNotFoundError, DataError
from snapcore.protocol import OptimizerState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from snapcore.store import Tensors

State = TypeVar("State")
Report = Callable[[int, float], None]

GROUP = "snapcore.backends"
_EXTRAS = ("torch", "jax", "keras", "tensorflow")  # the extras of this distribution that bring a backend


class Pending(Protocol):
    """A copy of the weights on its way to the host; later updates cannot change it."""

    def resolve(self) -> "Tensors":
        """Return the copy as named host arrays; called once, from the writer's thread."""
        ...


class Data(Protocol):
    """Training data as a backend reads it; `snapcore.data.TrainingData` is one."""

    @property
    def x(self) -> "NDArray[Any]":
        """Inputs, [examples, …]."""
        ...

    @property
    def y(self) -> "NDArray[Any]":
        """Targets: integers [examples, …] for classes, [examples, …, n_classes] or [examples] for the other kinds."""
        ...

    @property
    def n_classes(self) -> int:
        """How many classes there are; for the other kinds, how many labels or values a position has."""
        ...

    @property
    def loss(self) -> str:
        """What to train with: a name in `snapcore.data.LOSSES`."""
        ...

    @property
    def ignore(self) -> int | None:
        """The class number of what counts neither in the loss nor in its mean; None if all do."""
        ...

    @property
    def n_outputs(self) -> int:
        """How many numbers the model gives per position, on the last axis of its outputs."""
        ...

    def indices(self, start: int, stop: int) -> "NDArray[np.int64]":
        """Return the examples of updates `start … stop − 1`, [stop − start, batch]."""
        ...


class Backend(Protocol[State]):
    """The verbs of a framework."""

    @property
    def name(self) -> str:
        """The name under which it is registered, and which its members record."""
        ...

    def about(self) -> str:
        """Return a few words to print: the framework's version, and the device it would use."""
        ...

    @property
    def init(self) -> Callable[..., State]:
        """Return the state before the first update: `init(model, data, program, *, seed, member=1, **options)`.

        The model is built with `data.n_outputs`, and trained with the loss that the data name. Member k's fresh weights
        come from (seed, k) alone. Options are the backend's own.
        """
        ...

    def train(self, state: State, start: int, stop: int, *, report: Report) -> State:
        """Do updates `start … stop − 1` natively at the program's rates.

        `report(step, loss)` is called for every update, `step` counting it, in bulk now and then.
        """
        ...

    def capture(self, state: State) -> Pending:
        """Return a copy of weights and buffers that later updates cannot change."""
        ...

    def restore(self, state: State, tensors: "Tensors | None", *, optimizer: OptimizerState) -> State:
        """Return the state with these weights (None: as they are), the optimizer's moments kept or reset."""
        ...

    def dump(self, state: State) -> "tuple[Pending | Tensors, dict[str, Any]]":
        """Return a copy of all that an exact resume needs, as named tensors and plain JSON.

        The weights are among the tensors, each as `weights/` and the name that `capture` gives it.
        """
        ...

    def load(self, state: State, tensors: "Pending | Tensors", values: dict[str, Any]) -> State:
        """Return the state that `dump` copied."""
        ...

    def logits(self, state: State, x: "NDArray[Any]") -> "NDArray[np.float32]":
        """Return the model's outputs in evaluation mode, [examples, …, n_outputs]; the state is left alone."""
        ...

    def refresh(self, state: State, x: "NDArray[Any]") -> State:
        """Return the state with batch statistics re-estimated on inputs `x`, [examples, …], as training sees them.

        They are the mean of equal batches' own, whatever they were before; all else is as it was, random states too. A
        model without any is left alone. It is for weights that were not trained themselves, such as a mean of members'.
        """
        ...


def resolved(tensors: "Pending | Tensors") -> "Tensors":
    """Return named host arrays: those that a pending copy resolves to, or the ones given."""
    return tensors if isinstance(tensors, Mapping) else tensors.resolve()


def targets(data: Data) -> "NDArray[Any]":
    """Return what the data's loss compares outputs with: class numbers as they are, all else as float32.

    Values come as [examples, …, n_classes], also where `y` is [examples]: with outputs [batch, 1] that would give
    differences [batch, batch].
    """
    if data.loss == "cross-entropy":
        return data.y
    return data.y.astype("float32", copy=False).reshape(len(data.y), *(data.y.shape[1:] or (1,)))


def negative_log_density(outputs: Any, y: Any, exp: Callable[[Any], Any]) -> Any:
    """Return −ln N(y; m, e^s) = (s + (y − m)² e^−s + ln 2π) / 2 of each value, in nats, in a framework's own arrays.

    Arguments:
        outputs: the means m, then the ln variances s, [..., 2 · values].
        y: the targets, [..., values].
        exp: the framework's.

    Example:
        >>> import numpy as np
        >>> found = negative_log_density(np.array([[3.0, np.log(4.0)]]), np.array([[1.0]]), np.exp)
        >>> bool(np.isclose(found, -np.log(np.exp(-1 / 2) / np.sqrt(2 * np.pi * 4))).all())
        True
    """
    values = outputs.shape[-1] // 2
    mean, log_variance = outputs[..., :values], outputs[..., values:]
    return (log_variance + (y - mean) ** 2 * exp(-log_variance) + log(2 * pi)) / 2


def check_outputs(data: Data, shape_of: "Callable[[NDArray[Any]], Sequence[int | None]]") -> None:
    """Check that a model's outputs have a position for each of the data's, and that channels come last.

    Arguments:
        data: where they are class numbers of whole examples, the loss itself refuses what does not fit.
        shape_of: returns the shape of the outputs for inputs x, [batch, …]; None where a length is open.

    Raises:
        DataError: the outputs are no [batch, …, n_outputs].
    """
    is_classes = data.loss == "cross-entropy"
    if is_classes and data.y.ndim == 1:
        return
    wanted = (*(data.y.shape[1:] if is_classes else data.y.shape[1:-1]), data.n_outputs)
    found = tuple(shape_of(data.x[:2]))[1:]
    if len(found) == len(wanted) and all(size in (None, due) for size, due in zip(found, wanted, strict=True)):
        return
    cure = "build it with the number of outputs that it is given"
    if len(wanted) > 1 and found == (wanted[-1], *wanted[:-1]):
        axes = ", ".join(map(str, (0, *range(2, len(wanted) + 1), 1)))
        cure = f"move its axis 1 to the end, as permute({axes}) does"
    raise DataError(
        f"the model must return {_shape(wanted)} for loss={data.loss!r} and y of shape {data.y.shape}, got "
        f"{_shape(found)}: {cure}"
    )


def _shape(sizes: "tuple[int | None, ...]") -> str:
    return f"[{', '.join(map(str, ('batch', *sizes)))}]"


def available_backends() -> dict[str, EntryPoint]:
    """Return the entry points of all backends that are registered, by name; none is imported."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load_backend(name: str) -> Backend[Any]:
    """Return the backend called `name`, importing its framework.

    Raises:
        BackendNotFoundError: none is registered, or its framework is missing; the message says what to install.
    """
    found = available_backends()
    if name not in found:
        known = ", ".join(sorted({*found, *_EXTRAS}))
        raise BackendNotFoundError(f"no backend is called {name!r}; known: {known}. {_cure(name)}")
    try:
        return found[name].load()()  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise BackendNotFoundError(f"the backend {name!r} cannot be imported: {error}. {_cure(name)}") from error


def _cure(name: str) -> str:
    if name in _EXTRAS:
        return f"Install it with: pip install 'snapcore[{name}]'"
    return f"A package brings one with an entry point in the group {GROUP!r}"
