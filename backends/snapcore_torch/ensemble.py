"""Several members, one module: the mean of their probabilities."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, tee
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from snapcore import DataError
from snapcore.ensemble import (
    ALREADY_PROBABILITIES,
    ROUNDS,
    TOLERANCE,
    Directory,
    Output,
    Pooling,
    Recipe,
    TuningReport,
    are_probabilities,
    check_activation,
    check_members,
    check_strategy,
    checked_recipe,
    deviation,
    pick,
    predict,
    recipe_files,
    refuse_equal_members,
    refuse_like,
    softmax_axis,
    tune,
)
from snapcore_torch.graphs import Graphs
from snapcore_torch.members import CURE, Build, load_members
from snapcore_torch.state import to_numpy
from snapcore_torch.strategies import STRATEGIES, Stacked
from snapcore_torch.trees import mapped

Activation = Callable[[Tensor], Tensor]

_HALF = (torch.float16, torch.bfloat16)  # averaged in float32
_ROUNDING = 1e-3
"""What two orders of the same sums may differ by; a strategy that goes wrong is off by much more."""


class _Operations:
    """Those that members are pooled with; a class, so that an ensemble which refers to it pickles."""

    softmax = staticmethod(torch.softmax)
    log_softmax = staticmethod(torch.log_softmax)
    sigmoid = staticmethod(torch.sigmoid)
    log_sigmoid = staticmethod(logsigmoid)
    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    expm1 = staticmethod(torch.expm1)
    where = staticmethod(torch.where)
    maximum = staticmethod(torch.clamp_min)
    minimum = staticmethod(torch.clamp_max)
    mean = staticmethod(torch.mean)
    stack = staticmethod(torch.stack)
    stop_gradient = staticmethod(torch.detach)


class SnapshotEnsemble(nn.Module):
    """Average the members' probabilities: h(x) = 1/m · Σ softmax of each of the last m members.

    A module in evaluation mode; batch normalisation uses each member's own statistics. Members are loaded with
    `SnapshotEnsemble.load`, which neither changes nor keeps the model it is given.

    Calling it gives mean probabilities, in the shape of the model's outputs, or with `log=True` their logarithms;
    `members(…)` gives each member's, with the member axis first; `predict(…)` gives the mean for all of a loader;
    `cascade(…)` asks each member only for the examples that need it. It has a length, and yields each member as an
    ensemble of one. `tune(…)` measures the strategies on a batch and keeps the fastest.

    With a recipe the mean is weighted, and what is pooled is brought to the recipe's temperature T: softmax(ln h / T)
    over the classes, or sigmoid(logit h / T) for each label.

    Arguments:
        members: modules of the same inputs and outputs. `SnapshotEnsemble.load` reads them from runs.
        activation: see `load`, as the others.
        axis: of the classes.
        output: picks the tensor.
        strategy: how the members are run.
        allow_equal: whether members whose weights differ may give equal outputs.
        recipe: the members' weights, as many as there are members, and the temperature.

    Example:
        >>> import tempfile, torch
        >>> from snapcore import CosineCycles
        >>> from snapcore_torch import SnapshotRun
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SnapshotRun(folder, CosineCycles(lr=0.1, steps=64, cycles=4), model, optimizer) as run:
        ...         for x in run.batches([torch.randn(8, 4)]):
        ...             optimizer.zero_grad(); model(x).square().mean().backward(); optimizer.step()
        ...             taken = run.step()
        ...     ensemble = SnapshotEnsemble.load(folder, model, last=3)
        >>> ensemble(torch.randn(5, 4)).shape, ensemble.members(torch.randn(5, 4)).shape
        (torch.Size([5, 3]), torch.Size([3, 5, 3]))

    Source: Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, section 3.
    """

    def __init__(
        self,
        members: Iterable[nn.Module],
        *,
        activation: str | Activation = "softmax",
        axis: int | None = None,
        output: Output | None = None,
        strategy: str = "loop",
        allow_equal: bool = False,
        recipe: Recipe | Directory | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        check_strategy(strategy, STRATEGIES)
        self.models = nn.ModuleList(members).requires_grad_(False)
        check_members(self.models)
        self._devices: list[torch.device] | None = None
        found = checked_recipe(recipe, len(self.models))
        self._pooling = Pooling(_Operations(), activation, axis, classes_last=False, recipe=found)
        self._output = output
        self._allow_equal, self._unchecked, self._undecided = allow_equal, activation == "softmax", not allow_equal
        self._stacked: Stacked | None = None
        self._graphs = Graphs()
        self._strategy = strategy
        self._unproven = True
        super().train(False)

    @classmethod
    def load(
        cls,
        directories: Directory | Iterable[Directory],
        model: nn.Module | Build,
        *,
        like: None = None,
        last: int | None = None,
        members: Iterable[int] | None = None,
        activation: str | Activation = "softmax",
        axis: int | None = None,
        output: Output | None = None,
        strategy: str = "loop",
        mapped: bool = False,
        allow_equal: bool = False,
        recipe: Recipe | Directory | None = None,
    ) -> Self:
        """Load the members of one run, or of several, into modules of their own.

        Arguments:
            directories: a run directory, or several; every file is checked against its digest.
            model: the architecture, on the device and in the dtype to use, and neither changed nor kept: each member
                is a copy of it. Or a function without arguments that builds it, called once for each member.
            like: left out; it is for adapters that take a function instead of a model.
            last: how many members of each run, counted from its end; default all. Unfinished ones are left out.
            members: instead, the indices of each run's members to take, such as `[1, 3]`.
            activation: from outputs to probabilities: `"softmax"`, `"sigmoid"`, `"identity"` or a callable. Or
                `"gaussian"`, for outputs [..., 2 · values], means and then ln variances: a call gives the mixture's
                mean and variance, [..., values, 2], or [..., 2] of one value.
            axis: of the classes, for softmax. It may be left out for outputs [batch, classes] alone: in PyTorch
                images have them in axis 1, and text in axis -1.
            output: picks the tensor when the model returns something else: a key or attribute such as `"logits"`, a
                position such as `0`, or a function.
            strategy: `"loop"`, one member after the other; `"stacked"`, all in one vectorised call, which needs the
                weights a second time, cannot run everything, and is checked against the loop on the first batch; or
                `"graph"`, the loop recorded as a CUDA graph for each shape of inputs, and replayed.
            mapped: whether weights on the CPU stay in their files, in the files' dtypes, instead of being copied: for
                models that are too large for that. What changes a file in place then changes the ensemble.
            allow_equal: whether members whose weights differ may give equal outputs for the first batch.
            recipe: or the path of its file: says which members are used, with which weights, at which temperature, and
                when a cascade stops. `last` and `members` are left out then; members without a weight are not loaded.
                Weights and temperature are all that a call needs; `activation="identity"` takes a temperature for one
                of classes.

        Raises:
            StoreError: a directory holds no run, or not the members asked for; or there is no such recipe.
            CorruptSnapshotError: a file is not what was written.
            DataError: a member's names and shapes are not the model's, the model cannot be copied so that it runs the
                members' weights, the recipe is for other members, or an argument is unknown.
        """
        check_strategy(strategy, STRATEGIES)
        refuse_like(like)
        files, used = recipe_files(directories, recipe, framework="torch", last=last, members=members)
        return cls(
            load_members(model, files, mapped=mapped),
            activation=activation,
            axis=axis,
            output=output,
            strategy=strategy,
            allow_equal=allow_equal,
            recipe=used,
        )

    @property
    def strategy(self) -> str:
        """How the members are run."""
        return self._strategy

    @property
    def recipe(self) -> Recipe | None:
        """How members are weighted, for these members alone; None where they are equal."""
        return self._pooling.recipe

    def __len__(self) -> int:
        """Return how many members there are."""
        return len(self.models)

    def __iter__(self) -> Iterator[Self]:
        """Yield each member as an ensemble of one, which gives its probabilities and shares its weights."""
        for model in self.models:
            one = type(self)([model], activation=self._pooling.activation, axis=self._pooling.axis, output=self._output)
            yield one if self._devices is None else one.spread([_device_of(model)])

    def forward(self, *args: Any, log: bool = False, **kwargs: Any) -> Tensor:
        """Return the members' mean probabilities, weighted and tempered by the recipe if there is one.

        Arguments:
            *args: go to each model.
            log: return log-probabilities, exact where probabilities underflow.
            **kwargs: go to each model.

        Raises:
            DataError: the first batch's outputs already are probabilities, or all members give the same; `axis` or
                `output` is needed; or the strategy cannot run the model.
        """
        if self._strategy == "stacked":
            stack = self._run_stacked(args, kwargs, logs=self._pooling.in_logs(log))
            pooled: Tensor = self._pooling.pooled_stack(stack, log=log)
            return pooled
        if self._strategy == "graph" and not torch.compiler.is_compiling():
            return self._run_graph(args, kwargs, log=log)
        return self._loop(args, kwargs, log=log)

    def members(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return each member's own probabilities, shape [members, batch, …], without weights and temperature."""
        if self._strategy == "stacked":
            return self._run_stacked(args, kwargs)
        return torch.stack(list(self._each(args, kwargs)))

    def predict(self, batches: Iterable[Any] | Tensor | NDArray[Any], *, log: bool = False) -> NDArray[Any]:
        """Return what a call gives for all batches of a loader, as one NumPy array, without gradients.

        Arguments:
            batches: inputs x, or tuples or lists that begin with them, such as a `DataLoader`'s (x, y): what follows
                is not used. They are moved to the members' device. An array is one batch.
            log: return log-probabilities.

        Raises:
            DataError: there is no batch, or as for a call.
        """
        device = _device_of(self)

        def run(x: Any) -> NDArray[Any]:
            with torch.no_grad():
                return to_numpy(self(_moved(x, device, arrays=True), log=log))

        return predict(run, [batches] if isinstance(batches, Tensor | np.ndarray) else batches)

    def cascade(self, *args: Any, log: bool = False, return_used: bool = False, **kwargs: Any) -> Any:
        """Return mean probabilities by the recipe's cascade: each member runs on the examples that are left.

        Members are asked from the last to the first, and an example that is sure enough is asked no further; see
        `snapcore.ensemble.fit_cascade`. In float32, without gradients. That members differ is not checked, since that
        would ask them all.

        Arguments:
            *args: go to each model. Of all tensors the first axis is the batch, also within lists, tuples and dicts.
            log: return log-probabilities.
            return_used: return also how many members each example used, a NumPy array of integers [batch].
            **kwargs: go to each model, as `args`.

        Raises:
            DataError: the recipe has no cascade, outputs are not [batch, classes] under softmax, tensors are of several
                lengths, or as for a call.
        """
        tensors: list[Tensor] = []
        mapped((args, kwargs), tensors.append)

        def ask(index: int, rows: NDArray[np.int64]) -> NDArray[Any]:
            def take(tensor: Tensor) -> Tensor:
                return tensor[torch.from_numpy(rows).to(tensor.device)] if tensor.ndim else tensor

            some = mapped((args, kwargs), take)
            if self._devices is not None:
                some = _moved(some, self._devices[index])
            outputs = self._outputs(index, *some)
            self._check_probabilities(outputs)
            return to_numpy(self._activated(outputs, logs=True))

        with torch.no_grad():
            found, used = self._pooling.cascade(ask, [tuple(tensor.shape) for tensor in tensors], log=log)
        result = torch.from_numpy(found).to(tensors[0].device)
        return (result, used) if return_used else result

    def tune(self, *args: Any, tolerance: float = TOLERANCE, rounds: int = ROUNDS, **kwargs: Any) -> TuningReport:
        """Measure every strategy on a batch, keep the fastest that gives what the loop gives, and return the report.

        Arguments:
            *args: the batch, as for a call; measure what you will use, also its size.
            tolerance: the largest deviation from the loop, max |p − q| / max |q|, with which a strategy may be kept.
            rounds: the most samples of each, taken in turns: about 10 ms of calls, or one that lasts longer. After 5
                rounds slow strategies are passed over, and 2 s end it.
            **kwargs: as for a call.
        """

        def run(strategy: str) -> Tensor:
            if strategy == "stacked":
                stack = self._stack(args, kwargs, logs=self._pooling.in_logs(log=False))
                result: Tensor = self._pooling.pooled_stack(stack)
            elif strategy == "graph":
                result = self._replay(args, kwargs)
            else:
                result = self._loop(args, kwargs)
            if result.is_cuda:
                torch.cuda.synchronize(result.device)
            return result

        with torch.no_grad():
            report = tune(run, STRATEGIES, to_host=to_numpy, tolerance=tolerance, rounds=rounds)
        self._strategy, self._unproven = report.chosen, False
        if report.chosen != "stacked":
            self._stacked = None
        if report.chosen != "graph":
            self._graphs.clear()
        return report

    def spread(self, devices: Iterable[str | int | torch.device]) -> Self:
        """Move the members to several devices, in turn, and return the ensemble; `to(device)` brings them together.

        By `strategy="loop"` all members are begun before one is waited for. Results are pooled on the first device, in
        the members' order.

        Arguments:
            devices: such as `["cuda:0", "cuda:1"]`.

        Raises:
            DataError: there are none.
        """
        places = [torch.device(device) for device in devices]
        if not places:
            raise DataError("devices must name at least one, such as ['cuda:0', 'cuda:1'], got none: use to(device)")
        self._forget()
        self._devices = [places[position % len(places)] for position in range(len(self))]
        for model, device in zip(self.models, self._devices, strict=True):
            model.to(device)
        return self

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in evaluation mode: members are not trained on."""
        return self

    def _loop(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, log: bool = False) -> Tensor:
        pooled: Tensor = self._pooling.pooled(self._each(args, kwargs, logs=self._pooling.in_logs(log)), log=log)
        return pooled

    def _each(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, logs: bool = False) -> Iterator[Tensor]:
        each: Iterator[Tensor]
        if self._devices is None:
            each = (self._outputs(index, args, kwargs) for index in range(len(self)))
        else:  # all are begun before the first result is waited for
            given = {device: _moved((args, kwargs), device) for device in dict.fromkeys(self._devices)}
            begun = [self._outputs(index, *given[device]) for index, device in enumerate(self._devices)]
            each = (outputs.to(self._devices[0]) for outputs in begun)
        tracing = torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[attr-defined, no-untyped-call]
        if (self._unchecked or self._undecided) and not tracing:
            ahead, each = tee(each)
            self._check(ahead)
        return map(partial(self._activated, logs=logs), each)

    def _check(self, each: Iterator[Tensor]) -> None:
        first = next(each).detach()
        self._check_probabilities(first)
        if self._undecided:
            cure = f"{CURE}; or allow_equal=True"
            self._undecided = not refuse_equal_members(chain([first], each), self._weights, cure)

    def _check_probabilities(self, first: Tensor) -> None:
        # Not on the host: inside torch.func a tensor cannot be brought there, but one bool can.
        if self._unchecked and first.is_floating_point():
            axis = softmax_axis(first.shape, self._pooling.axis, classes_last=False)
            if are_probabilities(first.float(), axis, half=first.dtype in _HALF):
                raise DataError(ALREADY_PROBABILITIES)
        self._unchecked = self._unchecked and not first.numel()

    def _weights(self) -> list[list[Tensor]]:
        each = [list(chain(model.parameters(), model.buffers())) for model in self.models]
        return each if self._devices is None else _moved(each, self._devices[0])

    def _outputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        found: Tensor = pick(self.models[index](*args, **kwargs), self._output, torch.is_tensor)
        return found

    def _activated(self, outputs: Tensor, *, logs: bool = False) -> Tensor:
        outputs = outputs.float() if outputs.dtype in _HALF else outputs
        activated: Tensor = self._pooling.activated(outputs, logs=logs)
        return activated

    def _run_stacked(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, logs: bool = False) -> Tensor:
        found = self._stack(args, kwargs, logs=logs)
        if self._unproven:
            with torch.no_grad():
                wanted = torch.stack(list(self._each(args, kwargs, logs=logs)))
            self._check_same(
                found, wanted, logs, "weights lie outside parameters and buffers, or in several precisions"
            )
        return found

    def _run_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, log: bool) -> Tensor:
        self._graphs.check(args, kwargs)
        if self._unchecked or self._undecided:  # what the first batch decides is read on the host
            return self._loop(args, kwargs, log=log)
        found = self._replay(args, kwargs, log=log)
        if self._unproven:
            with torch.no_grad():
                wanted = self._loop(args, kwargs, log=log)
            self._check_same(found, wanted, log, "the model is random, or counts its calls")
        return found

    def _replay(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, log: bool = False) -> Tensor:
        if len(set(self._devices or [])) > 1:
            raise DataError(
                "strategy 'graph' needs its members on one device, but they are spread: use to(device) first"
            )

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return self._loop(args, kwargs, log=log)

        return self._graphs(run, args, kwargs, log=log)

    def _check_same(self, found: Tensor, wanted: Tensor, logs: bool, why: str) -> None:
        """Refuse what a strategy gives for the first batch if the loop gives something else."""
        # As probabilities, whose largest is never −inf.
        host = [to_numpy(each.exp() if logs else each) for each in (found, wanted)]
        off = deviation(*host)
        types = {tensor.dtype for tensor in self.models.parameters() if tensor.is_floating_point()}
        if not off <= max([_ROUNDING, *(8 * torch.finfo(dtype).eps for dtype in types)]):
            members = {"stacked": "stacked members give", "graph": "a replayed graph gives"}[self._strategy]
            raise DataError(
                f"{members} something else than the loop, by {off:.2g} of the largest value: {why}; use strategy='loop'"
            )
        self._unproven = False

    def _stack(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, logs: bool = False) -> Tensor:
        if self._stacked is None:
            self._stacked = Stacked(self.models)  # type: ignore[arg-type]  # a ModuleList is a sequence, undeclared

        def each(returned: Any) -> Tensor:
            return self._activated(pick(returned, self._output, torch.is_tensor), logs=logs)

        return self._stacked(each, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._forget()  # the members move or change their type
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        places = [_device_of(model) for model in self.models]
        self._devices = places if len(set(places)) > 1 else None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()  # the members get other weights
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        self._stacked = None
        self._graphs.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the weights once, not stacked too."""
        return {**self.__dict__, "_stacked": None}


def _moved(x: Any, device: torch.device, *, arrays: bool = False) -> Any:
    return mapped(x, lambda tensor: tensor.to(device), arrays=arrays)


def _device_of(module: nn.Module) -> torch.device:
    held = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if held is None else held.device
