"""Snapshots from the Trainer of transformers: one callback.

Who owns what: the Trainer's checkpoint holds weights, optimizer, random states and the position in the data, and in
`trainer_state.json` a `Position`; the run directory holds the members. The Trainer restores what it saved, and the run
resumes at that position: members taken after the checkpoint are dropped and taken again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

try:
    from transformers import SchedulerType, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "snapcore_torch.transformers needs transformers: pip install 'snapcore[transformers]'", name="transformers"
    ) from error

from snapcore import Program, ProtocolError, Schedule, Snapshot, program_from_dict
from snapcore.protocol import as_program
from snapcore.run import Position, check_length
from snapcore_torch.run import FreshWeights, SnapshotRun
from snapcore_torch.schedule import SnapshotLR

# A Trainer that ends in an exception, such as a Ctrl-C in a notebook, calls no callback for it: the next one to train
# in that directory closes the run that was left open.
_OPEN: dict[Path, SnapshotRun] = {}


class SnapshotCallback(TrainerCallback, ExportableState):
    """Take snapshots while transformers' Trainer trains, and set the rate of every update.

    Snapshots are taken at the program's steps of `state.global_step`, the last one when training ends on it; the names
    inside are those of the model's `state_dict`. The Trainer always has a scheduler: pass
    `lr_scheduler_type="constant"`, which the callback overrides, or `optimizers=(optimizer, SnapshotLR(optimizer,
    cycles))`, with which the rate is right in the Trainer's logs too.

    After a kill, call `trainer.train(resume_from_checkpoint=…)` as ever: the run resumes at that checkpoint.

    Arguments:
        directory: the run's own; created.
        cycles_or_program: a schedule, or a program from `snapcore.program` (also as its `to_dict()`); its steps are the
            Trainer's `max_steps`.
        resume: False moves an older run aside when training starts at step 0, which suits a script that is simply
            started again; True refuses. A checkpoint's run is resumed in any case.
        init: for programs with `fresh` restarts: gives a module or a state dict for a member number. The Trainer's
            `restore_callback_states_from_checkpoint` would lose it and the functions below; leave that off.
        reference_lr: the rate that the schedule stands for; by default the optimizer's.
        on_member: called with each `Snapshot` as it is taken.
        metrics: called with each `Snapshot`; the numbers that it returns by name are recorded with the member.

    Raises:
        ProtocolError: when training starts: the Trainer has another scheduler, is to do more updates than the program,
            shards the model, or resumes from a checkpoint that was saved without this callback.
        StoreError: the directory holds a finished run or another training's, or cannot be written.

    Example:
        >>> from snapcore import CosineCycles
        >>> from snapcore_torch.transformers import SnapshotCallback
        >>> cycles = CosineCycles(lr=1e-3, steps=1200, cycles=6)
        >>> arguments = TrainingArguments("out", max_steps=1200, lr_scheduler_type="constant")    # doctest: +SKIP
        >>> callback = SnapshotCallback("runs/transformers", cycles)
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])    # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | Path,
        cycles_or_program: Schedule | Program | Mapping[str, Any],
        *,
        resume: bool = True,
        init: FreshWeights | None = None,
        reference_lr: float | None = None,
        on_member: Callable[[Snapshot], object] | None = None,
        metrics: Callable[[Snapshot], Mapping[str, float] | None] | None = None,
    ) -> None:
        given = cycles_or_program
        self.directory = Path(directory).absolute()  # as it was meant here, wherever training starts
        self.program = program_from_dict(given) if isinstance(given, Mapping) else as_program(given)
        self._options: dict[str, Any] = {
            "resume": resume,
            "init": init,
            "reference_lr": reference_lr,
            "on_member": on_member,
            "metrics": metrics,
        }
        self._run: SnapshotRun | None = None
        self.position = Position().to_dict()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer keeps in a checkpoint, once the members before it are on disk."""
        if self._run is not None:
            self.position = self._run.position().to_dict()
        kept = {name: self._options[name] for name in ("resume", "reference_lr")}
        arguments = {"directory": str(self.directory), "cycles_or_program": self.program.to_dict(), **kept}
        return {"args": arguments, "attributes": {"position": self.position}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the run where the Trainer is, and set the first rate."""
        self._close()
        self._check(args, state, kwargs["lr_scheduler"])
        if (left_open := _OPEN.pop(self.directory, None)) is not None:
            left_open.close()
        at = self._position_in(state) if state.global_step else Position()
        self._run = SnapshotRun(
            self.directory, self.program, kwargs["model"], kwargs["optimizer"], at=at, **self._options
        )
        _OPEN[self.directory] = self._run
        if self._run.finished:  # the Trainer may still do an update, which is none of the program's
            self.on_train_end()
            control.should_training_stop = True

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Take what is due, and set the next rate, which the Trainer's scheduler has just changed."""
        if self._run is not None:
            self._run.step(state.global_step - self._run.updates)
            control.should_training_stop |= self._run.finished

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Wait for the files, and raise what writing them raised."""
        self.state()
        self._close()

    def _close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            _OPEN.pop(self.directory, None)
            run.close()

    def _position_in(self, state: TrainerState) -> Position:
        kept: Any = state.stateful_callbacks  # a dict, whatever its annotation says
        saved = kept.get(type(self).__name__)
        if not isinstance(saved, dict):
            raise ProtocolError(
                f"training resumes after step {state.global_step} of a checkpoint that was saved without this callback "
                "(or with several): train from the beginning, with one"
            )
        return Position.from_dict(saved["attributes"]["position"])

    def _check(self, args: TrainingArguments, state: TrainerState, scheduler: Any) -> None:
        if args.deepspeed or args.fsdp:
            raise ProtocolError("DeepSpeed and FSDP shard the weights, and a snapshot needs them whole: use neither")
        inner = getattr(scheduler, "scheduler", scheduler)
        kind = SchedulerType(args.lr_scheduler_type).value
        constant = kind == "constant" and isinstance(inner, LambdaLR)
        if not constant and not (isinstance(inner, SnapshotLR) and inner.schedule == self.program.schedule):
            raise ProtocolError(
                f"the Trainer has a scheduler of its own, {type(inner).__name__} ({kind}), and both "
                "would set the rate: pass TrainingArguments(lr_scheduler_type='constant'), or "
                "Trainer(optimizers=(optimizer, SnapshotLR(optimizer, cycles)))"
            )
        check_length(self.program, state.max_steps, "max_steps")
