"""What a loader of batches remembers and draws from, so that it can be made part of the position in the data."""

import random
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, GeneratorType, ModuleType
from typing import Any, Generic, TypeVar

import numpy as np

from snapcore import DataError, ProtocolError

Batch = TypeVar("Batch")

_STRANGERS = ("snapcore", "jax", "flax", "optax", "equinox", "numpy", "tensorflow", "keras")
"""Libraries whose objects hold no order of batches: what is inside them is not looked at."""
_DEPTH = 5

_drawn: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
"""How often this process has walked a `tf.data.Dataset`: each time it draws the seed of its next shuffle."""


class Memory:
    """What changes in a loader, its data set and its samplers while it is walked: in attributes or used by `__iter__`.

    These are random generators (NumPy's, Python's, PyTorch's), numbers such as an epoch that the loader counts itself,
    and the seeds of a `tf.data.Dataset`. PyTorch's global random state is among them where PyTorch has been imported.

    Arguments:
        loader: about to be walked.
        resumable: whether its order is to be drawn again.

    Raises:
        ProtocolError: a data set is shuffled without a seed, so that its order cannot be drawn again.
    """

    def __init__(self, loader: object, *, resumable: bool = True) -> None:
        self.loader = loader
        self._holders: list[dict[str, Any]] = []
        self._generators: list[Any] = []
        self._datasets: list[Any] = []
        self._seen: set[int] = set()
        self._look(loader, _DEPTH)
        if resumable:
            for dataset in self._datasets:
                _refuse_unseeded(dataset)
        self._begun = self._numbers()
        self.drawn = [_drawn.get(dataset, 0) for dataset in self._datasets]
        """How often each data set had been walked when this run began."""

    def state(self) -> dict[str, Any]:
        """Return the states of generators, and the numbers that have changed, as plain JSON."""
        generators = [_generator_state(each) for each in self._generators]
        numbers = [{name: own[name] for name in own if own[name] != old.get(name)} for own, old in self._pairs()]
        return {"generators": generators, "numbers": numbers}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Set them to what `state` returned.

        Raises:
            DataError: it was another kind of loader.
        """
        if (len(self._generators), len(self._holders)) != (len(state["generators"]), len(state["numbers"])):
            raise DataError(
                f"the loader had {len(state['generators'])} random generators when it was saved, got "
                f"{len(self._generators)}: build it as it was then"
            )
        for generator, each in zip(self._generators, state["generators"], strict=True):
            _set_generator_state(generator, each)
        for holder, begun, changed in zip(self._holders, self._begun, state["numbers"], strict=True):
            holder.update({**begun, **changed})

    def draw_again(self, drawn: list[int], epochs: int) -> None:
        """Have data sets draw the seeds of the epochs that have passed.

        Arguments:
            drawn: the saved run's own `drawn`.
            epochs: walked since.

        Raises:
            ProtocolError: one has drawn more by now.
        """
        if len(drawn) != len(self._datasets):
            raise DataError(
                f"the loader had {len(drawn)} tf.data.Datasets when it was saved, got {len(self._datasets)}"
            )
        self.drawn = drawn
        for dataset, before in zip(self._datasets, drawn, strict=True):
            for _ in range(before + epochs - _drawn.get(dataset, 0)):
                _walk(dataset)
            if _drawn.get(dataset, 0) > before + epochs:
                raise ProtocolError(
                    "the tf.data.Dataset has been walked before in this process, and its shuffles cannot go back: "
                    "make it anew"
                )

    def walked(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Return the loader, such that walks through its data sets are counted."""
        return _Counted(loader, self._datasets) if self._datasets else loader

    def _look(self, value: Any, depth: int) -> None:  # noqa: C901, PLR0912
        if _is_generator(value):
            if not any(value is each for each in self._generators):
                self._generators.append(value)
        elif _is_dataset(value):
            if not any(value is each for each in self._datasets):
                self._datasets.append(value)
        elif depth == 0 or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, list | tuple) and len(value) <= 16:
            for each in value:
                self._look(each, depth)
        elif isinstance(value, GeneratorType) and value.gi_frame is not None:
            self._look_at_names(value.gi_code.co_names, value.gi_frame.f_globals, depth)
            for each in list(value.gi_frame.f_locals.values()):
                self._look(each, depth - 1)
        elif isinstance(value, FunctionType):
            self._look_at_names(value.__code__.co_names, value.__globals__, depth)
            for cell in value.__closure__ or ():
                self._look(cell.cell_contents, depth - 1)
        elif hasattr(value, "__dict__") and not isinstance(value, type | ModuleType) and not _is_strange(value):
            held = vars(value)
            if isinstance(held, dict):
                self._holders.append(held)
                for each in list(held.values()):
                    self._look(each, depth - 1)
                self._look(getattr(type(value), "__iter__", None), depth - 1)

    def _look_at_names(self, names: Iterable[str], known: Mapping[str, Any], depth: int) -> None:
        for name in names:
            if _is_generator(known.get(name)) or _is_dataset(known.get(name)):
                self._look(known[name], depth)

    def _numbers(self) -> list[dict[str, Any]]:
        kinds = (int, float, bool)
        return [{name: value for name, value in held.items() if type(value) in kinds} for held in self._holders]

    def _pairs(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        return zip(self._numbers(), self._begun, strict=True)


class _Counted(Generic[Batch]):
    """A loader of which every walk counts as one of its data sets, too."""

    def __init__(self, loader: Iterable[Batch], datasets: list[Any]) -> None:
        self.loader, self._datasets = loader, datasets  # `loader`: where its `set_epoch` is looked for

    def __iter__(self) -> Iterator[Batch]:
        for dataset in self._datasets:
            _drawn[dataset] = _drawn.get(dataset, 0) + 1
        return iter(self.loader)


def torch_state() -> str | None:
    """Return PyTorch's global random state, which a `DataLoader` draws from; None where PyTorch is not imported."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_rng_state().numpy().tobytes().hex()


def set_torch_state(state: str | None) -> None:
    """Set it to what `torch_state` returned."""
    torch = sys.modules.get("torch")
    if torch is not None and state is not None:
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))


def _walk(dataset: Any) -> None:
    iter(dataset)
    _drawn[dataset] = _drawn.get(dataset, 0) + 1


def _refuse_unseeded(dataset: Any) -> None:
    tf = sys.modules["tensorflow"]
    seeds = [getattr(dataset, name, None) for name in ("_seed", "_seed2")]
    if None not in seeds and not any(bool(tf.get_static_value(seed)) for seed in seeds):
        raise ProtocolError(
            "the tf.data.Dataset is shuffled without a seed, so a resumed run could not draw its order again: call "
            "shuffle(…, seed=0), or tf.random.set_seed before it"
        )
    for inner in dataset._inputs():
        _refuse_unseeded(inner)


def _is_dataset(value: Any) -> bool:
    tf = sys.modules.get("tensorflow")
    return tf is not None and isinstance(value, tf.data.Dataset)


def _is_strange(value: Any) -> bool:
    module = type(value).__module__
    return module.startswith(_STRANGERS) or (module.startswith("torch") and not module.startswith("torch.utils.data"))


def _is_generator(value: Any) -> bool:
    torch = sys.modules.get("torch")
    kinds = (np.random.Generator, np.random.RandomState, random.Random)
    return isinstance(value, kinds) or (torch is not None and isinstance(value, torch.Generator))


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return [version, list(words), gauss]
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return generator.get_state().numpy().tobytes().hex()


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _as(generator.bit_generator.state, state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_as(generator.get_state(legacy=False), state))
    else:
        torch = sys.modules["torch"]
        generator.set_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else state


def _as(kind: Any, state: Any) -> Any:
    """Return a plain state with arrays where `kind` has them."""
    if isinstance(kind, dict):
        return {name: _as(kind[name], value) for name, value in state.items()}
    return np.array(state, kind.dtype) if isinstance(kind, np.ndarray) else state
