"""Several members, one module: the mean of their probabilities."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from snapcore import DataError, StoreError
from snapcore.store import SnapshotStore
from snapcore_torch.state import check_module_fit, named_tensors, plain_name, unwrapped

Activation = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Activation] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "identity": nn.Identity(),
}

_HALF = (torch.float16, torch.bfloat16)  # averaged in float32


class SnapshotEnsemble(nn.Module):
    """Average the members' probabilities: h(x) = 1/m · Σ softmax of each of the last m members.

    A module in evaluation mode; batch normalisation uses each member's own statistics. Members are loaded with
    `SnapshotEnsemble.load`, which neither changes nor keeps the model it is given.

    Calling it gives mean probabilities, shape [batch, …, classes]; `members(…)` gives each member's, with the
    member axis first.

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
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(members).requires_grad_(False)
        if not self.models:
            raise StoreError("an ensemble needs at least one finished member, got none")
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            raise DataError(f"activation must be one of {sorted(_ACTIVATIONS)} or a callable, got {activation!r}")
        self._activation = _ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self._output = output
        self._unchecked = activation == "softmax"
        super().train(False)

    @classmethod
    def load(
        cls,
        directories: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        model: nn.Module,
        *,
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
            last: how many members of each run, counted from its end; default all. Unfinished ones are left out.
            activation: from outputs to probabilities: `"softmax"` over the last axis, `"sigmoid"`, `"identity"`
                or a callable.
            output: picks the tensor when the model returns something else, such as `lambda o: o.logits`.
            strategy: `"loop"`, one member after the other.

        Raises:
            StoreError: a directory holds no run, or fewer than `last` members.
            CorruptSnapshotError: a file is not what was written.
            DataError: a member's names and shapes are not the model's, or an argument is unknown.
        """
        if strategy != "loop":
            raise DataError(f"strategy must be 'loop', got {strategy!r}")
        paths = [directories] if isinstance(directories, str | os.PathLike) else list(directories)
        files = [file for path in paths for file in _member_files(Path(path), last)]
        return cls(_modules(model, files), activation=activation, output=output)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the members' mean probabilities."""
        each = self._each(*args, **kwargs)
        total = next(each)
        for probabilities in each:
            total = total + probabilities  # not in place: the first may be the caller's own tensor
        return total / len(self.models)

    def members(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return each member's probabilities, shape [members, batch, …]."""
        return torch.stack(list(self._each(*args, **kwargs)))

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in evaluation mode: members are not trained on."""
        return self

    def _each(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        for model in self.models:
            outputs = model(*args, **kwargs)
            if self._output is not None:
                outputs = self._output(outputs)
            if self._unchecked:
                _refuse_probabilities(outputs)
                self._unchecked = False
            yield self._activation(outputs.float() if outputs.dtype in _HALF else outputs)


def _member_files(path: Path, last: int | None) -> list[Path]:
    store = SnapshotStore(path)
    finished = [member for member in store.members if not member.unfinished]
    for member in finished:
        if member.framework != "torch":
            raise DataError(f"member {member.index} of {path} was written by {member.framework}, not by torch")
    if not finished:
        raise StoreError(f"{path} holds no finished member: train until the first cycle ends")
    count = len(finished) if last is None else last
    if not 1 <= count <= len(finished):
        raise StoreError(f"last must be in 1..{len(finished)}, the finished members of {path}; got {last}")
    return [store.file(member.index) for member in finished[-count:]]


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
    if outputs.numel() == 0 or not outputs.is_floating_point():
        return
    sums = outputs.detach().double().sum(-1)
    if bool(((outputs >= 0).all()) & ((sums - 1).abs() < 1e-3).all()):
        raise DataError(
            "the model's outputs already are probabilities (none below 0, rows that sum to 1), and softmax of them "
            "would be wrong: pass activation='identity'"
        )
