"""What a loader of batches remembers and draws from, so that it can be made part of the position in the data."""

import math
import random
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, GeneratorType, ModuleType
from typing import Any, Generic, TypeVar

import numpy as np

from snapcore import DataError, ProtocolError

Batch = TypeVar("Batch")

_STRANGERS = ("snapcore", "jax", "flax", "optax", "equinox", "numpy", "tensorflow", "keras")
"""Libraries whose objects hold no order of batches: what is inside them is not looked at."""
_DEPTH, _MOST, _LONGEST = 8, 1000, 16
"""How deep, at how many objects, and at lists how long to look."""

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
        seen: set[int] = set()
        found = [(loader, 0)]
        for value, depth in found:  # which grows; breadth first, so that the order is the same in every process
            if id(value) in seen or len(seen) == _MOST:
                continue
            seen.add(id(value))
            if _is_generator(value):
                self._generators.append(value)
            elif _is_dataset(value):
                self._datasets.append(value)
            elif depth < _DEPTH:
                if _is_holder(value):
                    self._holders.append(vars(value))
                found += [(part, depth + 1) for part in _parts(value)]
        if resumable:
            for dataset in self._datasets:
                _refuse_unseeded(dataset)
        self._begun = self._numbers()
        self.drawn = [_drawn.get(dataset, 0) for dataset in self._datasets]
        """How often each data set had been walked when this run began."""

    def state(self) -> dict[str, Any]:
        """Return the states of generators, and the numbers that have changed, as plain JSON."""
        generators = [_generator_state(each) for each in self._generators]
        numbers = [
            {name: own[name] for name in own if own[name] != old.get(name)}
            for own, old in zip(self._numbers(), self._begun, strict=True)
        ]
        return {"generators": generators, "numbers": numbers}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Set them to what `state` returned.

        Raises:
            DataError: it was another kind of loader.
        """
        saved, now = len(state["generators"]), len(self._generators)
        if saved != now or len(state["numbers"]) != len(self._holders):
            raise DataError(
                f"the loader is another than when the run was saved ({saved} random generators then, {now} now): build "
                "it as it was, or choose another directory"
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
                iter(dataset)
                _drawn[dataset] = _drawn.get(dataset, 0) + 1
            if _drawn.get(dataset, 0) > before + epochs:
                raise ProtocolError(
                    "the tf.data.Dataset has been walked before in this process, and its shuffles cannot go back: "
                    "make it anew"
                )

    def walked(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Return the loader, such that walks through its data sets are counted."""
        return _Counted(loader, self._datasets) if self._datasets else loader

    def _numbers(self) -> list[dict[str, Any]]:
        kinds = (int, float, bool)
        return [
            {name: value for name, value in held.items() if type(value) in kinds and math.isfinite(value)}
            for held in self._holders
        ]


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


def _parts(value: Any) -> list[Any]:
    """Return what an object refers to, where an order of batches may come from."""
    if isinstance(value, list | tuple):
        return list(value) if len(value) <= _LONGEST else []
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, GeneratorType) and value.gi_frame is not None:
        frame = value.gi_frame
        return [*frame.f_locals.values(), *_drawn_from(value.gi_code.co_names, frame.f_globals)]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [*cells, *_drawn_from(value.__code__.co_names, value.__globals__)]
    return [*vars(value).values(), getattr(type(value), "__iter__", None)] if _is_holder(value) else []


def _drawn_from(names: Iterable[str], known: Mapping[str, Any]) -> list[Any]:
    used = [known[name] for name in names if name in known]
    return [each for each in used if _is_generator(each) or _is_dataset(each)]


def _is_holder(value: Any) -> bool:
    """Tell an object with attributes of its own, of a class that may be a loader's."""
    kinds = (type, ModuleType, FunctionType)
    if isinstance(value, kinds) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    module = type(value).__module__
    library = module.partition(".")[0]  # all of it: tensorflow_datasets is none of TensorFlow's
    return library not in _STRANGERS and (library != "torch" or module.startswith("torch.utils.data"))


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
