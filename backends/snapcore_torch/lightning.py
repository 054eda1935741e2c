"""Snapshots from PyTorch Lightning's Trainer: one callback.

Who owns what: Lightning's checkpoint holds weights, optimizer and loops, and in the callback's own state a `Position`;
the run directory holds the members. Lightning restores what it saved, and the run goes on at that place: members
taken after the checkpoint are forgotten and taken again. Nothing is written twice.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from snapcore import Program, ProtocolError, Schedule, SnapcoreError
from snapcore.protocol import as_program
from snapcore.run import Position, check_length
from snapcore_torch.run import FreshWeights, SnapshotRun
from snapcore_torch.schedule import SnapshotLR

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # Lightning goes by two names with a class of callbacks each. A trainer wants its own, and importing takes
    # seconds: those that the program has imported, else all that are installed.
    def _bases():
        names = ("lightning.pytorch", "pytorch_lightning")
        found = [sys.modules[name] for name in names if sys.modules.get(name)] or [*_installed(names)]
        if not found:
            raise ModuleNotFoundError(
                "snapcore_torch.lightning needs PyTorch Lightning: pip install 'snapcore[lightning]'", name="lightning"
            )
        return tuple(module.Callback for module in found)

    def _installed(names):
        for name in names:
            try:
                yield importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name not in ("lightning", name):
                    raise

    Callback = type("Callback", _bases(), {})

_SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class SnapshotCallback(Callback):
    """Take snapshots while Lightning's Trainer trains, and set the rate of every optimizer step.

    Snapshots are taken at the program's steps of `trainer.global_step`, the last one when training ends on it; the
    names inside are those of the LightningModule's `state_dict`. Return the optimizer alone from
    `configure_optimizers`: no scheduler is needed. Schedulers of other optimizers are left alone. A `fast_dev_run`
    takes no snapshots.

    After a kill, call `trainer.fit` with `ckpt_path` as ever: the run goes on at that checkpoint. Weights, optimizer
    and loops are Lightning's to restore. The order of the data is exact where Lightning's is: from checkpoints at the
    end of an epoch, if the Trainer has `max_epochs` and a sampler shuffles by `set_epoch`; or with a loader that has
    state. (Given `max_steps` alone, Lightning 2.6 leaves the epoch after such a checkpoint after one batch.)

    Arguments:
        directory: the run's own; created.
        cycles_or_program: a schedule, or a program from `snapcore.program`; its steps are the Trainer's `max_steps`.
        resume: False moves an older run aside when training begins at step 0, so that it suits a script that starts
            itself again; True refuses. A checkpoint's run goes on in any case.
        optimizer: which of the module's optimizers to follow, from 0, if there are several; its own updates count.
        init: for programs with `fresh` restarts: gives a module or a state dict for a member number.
        reference_lr: the rate that the schedule stands for; by default found in the optimizer.

    Raises:
        ProtocolError: when training starts: there are several optimizers and none was chosen, the optimizer has
            another scheduler, the Trainer is to do more updates than the program, the model is sharded, or the
            checkpoint was saved without this callback.
        StoreError: the directory holds a finished run or another training's, or cannot be written.

    Example:
        >>> from snapcore import CosineCycles
        >>> from snapcore_torch.lightning import SnapshotCallback
        >>> cycles = CosineCycles(lr=0.1, steps=1200, cycles=6)
        >>> callback = SnapshotCallback("runs/lightning", cycles)
        >>> trainer = Trainer(max_steps=cycles.steps, callbacks=[callback])    # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | Path,
        cycles_or_program: Schedule | Program,
        *,
        resume: bool = True,
        optimizer: int | None = None,
        init: FreshWeights | None = None,
        reference_lr: float | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.program = as_program(cycles_or_program)
        self._chosen = optimizer
        self._options: dict[str, Any] = {"resume": resume, "init": init, "reference_lr": reference_lr}
        self._run: SnapshotRun | None = None
        self._place: Position | None = None
        self._seen = 0

    @property
    def state_key(self) -> str:
        """The name of the callback's state in a checkpoint, one for each optimizer followed."""
        return self._generate_state_key(optimizer=self._chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return the place, once the members before it are on disk; nothing outside of training."""
        if self._run is not None:
            self._place = self._run.position()
        return {} if self._place is None else self._place.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the place that `state_dict` returned."""
        self._place = Position.from_dict(state_dict)

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:  # noqa: ARG002
        """Forget the place of an earlier fit; a checkpoint is read after this."""
        self._place = None

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Open the run where the Trainer is, and set the first rate."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        optimizer = self._optimizer(trainer)
        self._check(trainer, optimizer, pl_module.automatic_optimization)
        self._seen = trainer.global_step
        at = self._place or Position()
        self._run = SnapshotRun(self.directory, self.program, pl_module, optimizer, at=at, **self._options)

    def on_train_batch_end(self, trainer: "Trainer", *_: Any, **__: Any) -> None:
        """Take what is due, and set the next rate; end training with the program."""
        if self._run is None:
            return
        now = trainer.global_step
        # With several optimizers the global step counts them all.
        self._run.step(None if len(trainer.optimizers) > 1 else now - self._seen)
        self._seen = now
        trainer.should_stop |= self._run.finished

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:  # noqa: ARG002
        """Wait for the files, and raise what writing them raised."""
        if self._run is not None:
            self.state_dict()
            run, self._run = self._run, None
            run.close()

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:  # noqa: ARG002
        """Release the directory; the members so far are kept."""
        if self._run is not None:
            try:
                if not isinstance(exception, SnapcoreError):  # a checkpoint may be saved now
                    self.state_dict()
            finally:
                run, self._run = self._run, None
                run.__exit__(type(exception), exception, exception.__traceback__)

    def _optimizer(self, trainer: "Trainer") -> Optimizer:
        found = trainer.optimizers
        if self._chosen is None and len(found) != 1:
            raise ProtocolError(f"one optimizer is followed, the module has {len(found)}: pass optimizer=, from 0")
        if not 0 <= (self._chosen or 0) < len(found):
            raise ProtocolError(f"optimizer must be in 0..{len(found) - 1}, the module's own; got {self._chosen}")
        return found[self._chosen or 0]

    def _check(self, trainer: "Trainer", optimizer: Optimizer, automatic: bool) -> None:
        strategy = type(trainer.strategy).__name__
        if strategy in _SHARDED:
            raise ProtocolError(f"{strategy} shards the weights, and a snapshot needs them whole: use strategy='ddp'")
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer and not self._agrees(config):
                raise ProtocolError(
                    f"the optimizer has a scheduler too, {type(config.scheduler).__name__} every {config.frequency} "
                    f"{config.interval}, and both would set its rate: return the optimizer alone from "
                    "configure_optimizers, or with {'scheduler': SnapshotLR(optimizer, cycles), 'interval': 'step'}"
                )
        if trainer.global_step and self._place is None:
            raise ProtocolError(
                f"training goes on after step {trainer.global_step} of a checkpoint that was saved without this "
                "callback: train from the beginning"
            )
        planned = trainer.estimated_stepping_batches if automatic else -1
        check_length(self.program, planned if planned >= 0 else float("inf"), "max_steps")

    def _agrees(self, config: Any) -> bool:
        ours = isinstance(config.scheduler, SnapshotLR) and config.scheduler.schedule == self.program.schedule
        return ours and (config.interval, config.frequency) == ("step", 1)
