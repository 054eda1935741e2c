"""Several members, one module: the mean of their probabilities."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from snapcore import DataError
from snapcore.ensemble import (
    ALREADY_PROBABILITIES,
    ROUNDS,
    TOLERANCE,
    Directory,
    TuningReport,
    are_probabilities,
    check_activation,
    check_members,
    check_strategy,
    deviation,
    member_files,
    refuse_like,
    refuse_one_output,
    tune,
)
from snapcore_torch.state import check_module_fit, named_tensors, plain_name, to_numpy, unwrapped
from snapcore_torch.strategies import STRATEGIES, Stacked

Activation = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Activation] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "identity": nn.Identity(),
}

_HALF = (torch.float16, torch.bfloat16)  # averaged in float32
_ROUNDING = 1e-3
"""What two orders of the same sums may differ by; a strategy that goes wrong is off by much more."""


class SnapshotEnsemble(nn.Module):
    """Average the members' probabilities: h(x) = 1/m · Σ softmax of each of the last m members.

    A module in evaluation mode; batch normalisation uses each member's own statistics. Members are loaded with
    `SnapshotEnsemble.load`, which neither changes nor keeps the model it is given.

    Calling it gives mean probabilities, shape [batch, …, classes]; `members(…)` gives each member's, with the
    member axis first. `tune(…)` measures the strategies on a batch and keeps the fastest.

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
        ...             run.step()
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
        output: Callable[[Any], Tensor] | None = None,
        strategy: str = "loop",
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(members).requires_grad_(False)
        check_members(self.models)
        check_activation(activation)
        check_strategy(strategy, STRATEGIES)
        self._activation = _ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self._output = output
        self._unchecked = activation == "softmax"
        self._stacked: Stacked | None = None
        self._strategy = strategy
        self._unproven = True
        super().train(False)

    @classmethod
    def load(
        cls,
        directories: Directory | Iterable[Directory],
        model: nn.Module,
        *,
        like: None = None,
        last: int | None = None,
        activation: str | Activation = "softmax",
        output: Callable[[Any], Tensor] | None = None,
        strategy: str = "loop",
    ) -> Self:
        """Load the members of one run, or of several, into copies of `model`.

        Arguments:
            directories: a run directory, or several; every file is checked against its digest.
            model: the architecture, on the device to use. On the CPU the members' weights stay mapped to their
                files. The model itself is neither changed nor kept.
            like: left out; it is for adapters that take a function instead of a model.
            last: how many members of each run, counted from its end; default all. Unfinished ones are left out.
            activation: from outputs to probabilities: `"softmax"` over the last axis, `"sigmoid"`, `"identity"`
                or a callable.
            output: picks the tensor when the model returns something else, such as `lambda o: o.logits`.
            strategy: `"loop"`, one member after the other; or `"stacked"`, all in one vectorised call, which needs
                the weights a second time, cannot run everything, and is checked against the loop on the first batch.

        Raises:
            StoreError: a directory holds no run, or fewer than `last` members.
            CorruptSnapshotError: a file is not what was written.
            DataError: a member's names and shapes are not the model's, or an argument is unknown.
        """
        check_strategy(strategy, STRATEGIES)
        refuse_like(like)
        files = member_files(directories, framework="torch", last=last)
        return cls(_modules(model, files), activation=activation, output=output, strategy=strategy)

    @property
    def strategy(self) -> str:
        """How the members are run."""
        return self._strategy

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the members' mean probabilities.

        Raises:
            DataError: softmax cannot be right, since the first batch's outputs already are probabilities, or there is
                one output; or the strategy cannot run the model.
        """
        if self._strategy == "stacked":
            return self._run_stacked(args, kwargs).mean(0)
        return self._mean(args, kwargs)

    def members(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return each member's probabilities, shape [members, batch, …]."""
        if self._strategy == "stacked":
            return self._run_stacked(args, kwargs)
        return torch.stack(list(self._each(args, kwargs)))

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
            result = self._stack(args, kwargs).mean(0) if strategy == "stacked" else self._mean(args, kwargs)
            if result.is_cuda:
                torch.cuda.synchronize(result.device)
            return result

        with torch.no_grad():
            report = tune(run, STRATEGIES, to_host=to_numpy, tolerance=tolerance, rounds=rounds)
        self._strategy, self._unproven = report.chosen, False
        if report.chosen != "stacked":
            self._stacked = None
        return report

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in evaluation mode: members are not trained on."""
        return self

    def _mean(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        each = self._each(args, kwargs)
        total = next(each)
        for probabilities in each:
            total = total + probabilities  # not in place: the first may be the caller's own tensor
        return total / len(self.models)

    def _each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        for model in self.models:
            outputs = model(*args, **kwargs)
            if self._unchecked:
                _refuse_probabilities(self._picked(outputs))
                self._unchecked = False
            yield self._probabilities(outputs)

    def _picked(self, outputs: Any) -> Tensor:
        return outputs if self._output is None else self._output(outputs)

    def _probabilities(self, outputs: Any) -> Tensor:
        outputs = self._picked(outputs)
        return self._activation(outputs.float() if outputs.dtype in _HALF else outputs)

    def _run_stacked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        found = self._stack(args, kwargs)
        if self._unproven:
            with torch.no_grad():
                wanted = torch.stack(list(self._each(args, kwargs)))
            off = deviation(to_numpy(found), to_numpy(wanted))
            types = {tensor.dtype for tensor in self.models.parameters() if tensor.is_floating_point()}
            if not off <= max([_ROUNDING, *(8 * torch.finfo(dtype).eps for dtype in types)]):
                raise DataError(
                    f"stacked members give something else than the loop, by {off:.2g} of the largest value: weights "
                    "lie outside parameters and buffers, or in several precisions; use strategy='loop'"
                )
            self._unproven = False
        return found

    def _stack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._stacked is None:
            self._stacked = Stacked(self.models)  # type: ignore[arg-type]  # a ModuleList is a sequence, undeclared
        return self._stacked(self._probabilities, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._stacked = None  # the members move or change their type
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._stacked = None  # the members get other weights
        super()._load_from_state_dict(*args, **kwargs)


def _modules(model: nn.Module, files: Iterable[Path]) -> Iterator[nn.Module]:
    original = unwrapped(model)
    device = next((tensor.device for tensor in named_tensors(original).values()), torch.device("cpu"))
    for file in files:
        tensors = load_file(file, device=str(device))
        check_module_fit(original, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, str(file))
        yield _with_weights(original, tensors)


def _with_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy all of `model` but its weights, and put `tensors` in their place, wherever the model refers to them."""
    own = model.state_dict(keep_vars=True)
    new: dict[int, Any] = {}
    state = {name: new.setdefault(id(tensor), _like(tensor, tensors[plain_name(name)])) for name, tensor in own.items()}
    member = copy.deepcopy(model, dict(new))
    member.load_state_dict(state, assign=True)  # for what the module makes up as it is asked for its state
    return member


def _like(tensor: Tensor, loaded: Tensor) -> Tensor:
    return nn.Parameter(loaded, requires_grad=False) if isinstance(tensor, nn.Parameter) else loaded


def _refuse_probabilities(outputs: Tensor) -> None:
    refuse_one_output(outputs.shape)
    # Not on the host: inside torch.func a tensor cannot be brought there, but one bool can.
    if outputs.is_floating_point() and are_probabilities(outputs.detach().float(), half=outputs.dtype in _HALF):
        raise DataError(ALREADY_PROBABILITIES)
