"""The rules that every backend must keep, as tests to inherit.

A third party inherits `BackendConformance`, says how to make its backend, and pytest does the rest:

    from snapcore.testing import BackendConformance

    class TestMyBackend(BackendConformance):
        def backend(self):
            return MyBackend()
"""

import functools
import json
from typing import Any

import numpy as np

from snapcore.backend import Backend, resolved
from snapcore.data import LOSSES, TrainingData
from snapcore.errors import DataError
from snapcore.protocol import Program
from snapcore.schedule import CosineCycles, StepDecay
from snapcore.testing.arrays import Arrays, assert_equal, frozen
from snapcore.testing.losses import expected_loss

_STEPS = 12


class BackendConformance:
    """Inherit, override `backend`, and let pytest collect the rules.

    Attributes:
        model: what the backend's `init` takes; nothing random in its training. It should have buffers that training
            moves (batch statistics), if the framework knows such.
        random_model: the same with dropout or the like, so that random states count.
        plain_model: for rule 17, one that computes the same in training and in evaluation.
        tolerance: of rule 17, how far a loss may be from NumPy's, as a share of it.
        options: for `init`, everywhere.
        without_momentum: for `init`, where rules 6 and 17 need plain gradient descent.
    """

    model: Any = "mlp"
    random_model: Any = "mlp"
    plain_model: Any = "mlp"
    tolerance: float = 1e-4
    options: dict[str, Any] = {}  # noqa: RUF012 - overridden, never changed
    without_momentum: dict[str, Any] = {"momentum": 0.0}  # noqa: RUF012

    def backend(self) -> Backend[Any]:
        """Return the backend under test."""
        raise NotImplementedError

    def data(self) -> TrainingData:
        """Return a small classification task; override it if the model needs another shape."""
        return _task()

    def task(self, loss: str) -> TrainingData:
        """Return the same inputs with what another loss needs; of the classes, one is ignored."""
        x, y = self.data().x, np.resize([0, 2, 1, 3, 2], len(self.data().x))
        targets: dict[str, tuple[Any, int]] = {
            "cross-entropy": (y, 4),
            "binary-cross-entropy": (np.stack([y % 2, y // 2], -1), 2),
            "squared-error": (2.0 * y, 1),
            "gaussian-nll": (np.stack([y - 1.0, -0.5 * y, y * y / 4], -1), 3),
        }
        ignore = 3 if loss == "cross-entropy" else None
        return TrainingData(x, *targets[loss], batch_size=16, seed=5, loss=loss, ignore=ignore)

    def test_rule_01_the_same_seed_and_member_give_the_same_weights(self) -> None:
        """Rule 1."""
        assert_equal(self._weights(self._init(seed=3, member=2)), self._weights(self._init(seed=3, member=2)))

    def test_rule_02_another_seed_or_member_gives_other_weights(self) -> None:
        """Rule 2."""
        weights = self._weights(self._init(seed=3, member=1))
        for other in (self._init(seed=4, member=1), self._init(seed=3, member=2)):
            others = self._weights(other)
            assert any(not np.array_equal(weights[name], others[name]) for name in weights)

    def test_rule_03_a_capture_survives_later_updates(self) -> None:
        """Rule 3."""
        backend, state = self.backend(), self._trained(4)
        before = frozen(resolved(backend.capture(state)))
        pending = backend.capture(state)
        self._train(state, 4, 8)
        assert_equal(frozen(resolved(pending)), before)

    def test_rule_04_a_capture_holds_all_that_the_forward_pass_needs(self) -> None:
        """Rule 4: parameters and buffers alike, so that another state gives the same logits, bit for bit."""
        backend, state = self.backend(), self._trained(5)
        other = backend.restore(self._init(seed=9), resolved(backend.capture(state)), optimizer="keep")
        x = self.data().x
        np.testing.assert_array_equal(backend.logits(other, x), backend.logits(state, x))

    def test_rule_05_restoring_is_exact(self) -> None:
        """Rule 5: what was restored is captured again, bit for bit."""
        backend = self.backend()
        tensors = frozen(resolved(backend.capture(self._trained(5))))
        state = backend.restore(self._init(seed=9), tensors, optimizer="keep")
        assert_equal(self._weights(state), tensors)

    def test_rule_06_the_rate_of_the_schedule_is_the_rate_used(self) -> None:
        """Rule 6: the first update is proportional to schedule(0), and a rate of almost 0 moves nothing."""
        moved = [self._first_update(lr) for lr in (0.01, 0.02)]
        for name, change in moved[0].items():
            np.testing.assert_allclose(moved[1][name], 2 * change, rtol=1e-3, atol=1e-6)
        assert any(np.abs(change).max() > 1e-5 for change in moved[0].values())
        stopping = StepDecay(0.05, _STEPS, milestones=(2 / _STEPS,), factor=1e-12)
        two, more = (self._parameters_after(stopping, steps) for steps in (2, 6))
        for name, values in two.items():
            np.testing.assert_allclose(more[name], values, atol=1e-7)

    def test_rule_07_training_in_two_parts_is_training_at_once(self) -> None:
        """Rule 7."""
        parts = self._train(self._trained(5), 5, _STEPS)
        assert_equal(self._weights(parts), self._weights(self._trained(_STEPS)))

    def test_rule_08_every_update_is_reported_once_and_in_order(self) -> None:
        """Rule 8: report(step, loss), step counting the update just done."""
        reports: list[tuple[int, float]] = []
        backend, state = self.backend(), self._trained(3)
        backend.train(state, 3, 9, report=lambda step, loss: reports.append((step, loss)))
        assert [step for step, _ in reports] == [4, 5, 6, 7, 8, 9]
        assert all(type(loss) is float and np.isfinite(loss) for _, loss in reports)

    def test_rule_09_reset_clears_the_moments_and_not_the_count(self) -> None:
        """Rule 9: training continues as with a new optimizer, at the rates of the steps that follow."""
        backend, state = self.backend(), self._trained(6)
        new = backend.restore(self._init(), frozen(resolved(backend.capture(state))), optimizer="keep")
        reset = backend.restore(state, None, optimizer="reset")
        assert_equal(self._parameters(self._train(reset, 6, 9)), self._parameters(self._train(new, 6, 9)))
        stopped = self._init(schedule=StepDecay(0.05, _STEPS, milestones=(0.5,), factor=1e-12))
        stopped = backend.restore(self._train(stopped, 0, 6), None, optimizer="reset")
        before = self._parameters(stopped)
        after = self._parameters(self._train(stopped, 6, 8))
        for name, values in before.items():
            np.testing.assert_allclose(after[name], values, atol=1e-7)

    def test_rule_10_keep_leaves_the_moments_alone(self) -> None:
        """Rule 10: restoring what is there already, moments kept, changes nothing that follows."""
        backend, state = self.backend(), self._trained(6)
        state = backend.restore(state, frozen(resolved(backend.capture(state))), optimizer="keep")
        assert_equal(self._weights(self._train(state, 6, 9)), self._weights(self._undisturbed()))

    def test_rule_11_logits_leave_the_state_alone(self) -> None:
        """Rule 11: evaluation mode, the same answer twice, and training continues as if nobody had looked."""
        backend, state = self.backend(), self._trained(6, model=self.random_model)
        data = self.data()
        first, second = backend.logits(state, data.x), backend.logits(state, data.x)
        np.testing.assert_array_equal(first, second)
        assert first.shape == (len(data.x), data.n_classes)
        assert first.dtype == np.float32
        state = self._train(state, 6, 9)
        assert_equal(self._weights(state), self._weights(self._undisturbed(model=self.random_model)))

    def test_rule_12_a_dump_loaded_into_another_state_resumes_exactly(self) -> None:
        """Rule 12: weights, moments and random states; bit for bit, through host arrays and JSON."""
        backend, state = self.backend(), self._trained(6, model=self.random_model)
        tensors, values = backend.dump(state)
        tensors, values = frozen(resolved(tensors)), json.loads(json.dumps(values))
        expected = self._weights(self._train(state, 6, 9))
        other = backend.load(self._init(seed=9, model=self.random_model), tensors, values)
        assert_equal(self._weights(self._train(other, 6, 9)), expected)

    def test_rule_13_capturing_and_dumping_do_not_change_what_follows(self) -> None:
        """Rule 13."""
        backend, state = self.backend(), self._trained(6, model=self.random_model)
        pending = [backend.capture(state), backend.dump(state)[0]]
        state = self._train(state, 6, 9)
        for each in pending:
            resolved(each)
        assert_equal(self._weights(state), self._weights(self._undisturbed(model=self.random_model)))

    def test_rule_14_a_dump_names_its_weights_as_a_capture_does(self) -> None:
        """Rule 14: `weights/<name>` for every name of a capture, with the same values; host arrays all."""
        backend, state = self.backend(), self._trained(2)
        weights, dumped = resolved(backend.capture(state)), resolved(backend.dump(state)[0])
        assert all(isinstance(array, np.ndarray) for array in (*weights.values(), *dumped.values()))
        prefix = "weights/"
        assert_equal({name.removeprefix(prefix): dumped[name] for name in dumped if name.startswith(prefix)}, weights)

    def test_rule_15_tensors_of_another_model_are_refused_by_name(self) -> None:
        """Rule 15: a missing name and another shape raise `DataError`, and the state is as it was."""
        backend, state = self.backend(), self._trained(2)
        before = self._weights(state)
        name = next(name for name, array in before.items() if array.ndim)
        missing = {other: array for other, array in before.items() if other != name}
        for tensors in (missing, {**before, name: np.repeat(before[name], 2, axis=0)}):
            assert name in _refusal(backend, state, tensors), f"tensors that do not fit in {name!r} were taken"
        assert_equal(self._weights(state), before)

    def test_rule_16_statistics_are_re_estimated_from_weights_and_inputs_alone(self) -> None:
        """Rule 16: whatever they were before; parameters, moments and random states are left alone."""
        backend, x = self.backend(), self.data().x
        weights, earlier = self._weights(self._trained(6)), self._weights(self._trained(2))
        found = self._weights(backend.refresh(self._trained(6), x))
        statistics = {name for name, array in found.items() if not np.array_equal(array, weights[name])}
        still = self._init(schedule=StepDecay(1e-12, _STEPS, milestones=()))
        before, moved = self._weights(still), self._weights(self._train(still, 0, 2))
        for name in set(weights) - statistics:
            np.testing.assert_allclose(moved[name], before[name], atol=1e-7, err_msg=f"{name} was not re-estimated")
        mixed = {**weights, **{name: earlier[name] for name in statistics}}
        one, other = (backend.restore(self._init(seed=9), each, optimizer="keep") for each in (weights, mixed))
        assert_equal(self._weights(backend.refresh(other, x)), self._weights(backend.refresh(one, x)))
        after = self._weights(self._train(backend.refresh(self._trained(6, model=self.random_model), x), 6, 9))
        expected = self._weights(self._undisturbed(model=self.random_model))
        kept = expected.keys() - statistics  # what is trained does not depend on them
        assert_equal({name: after[name] for name in kept}, {name: expected[name] for name in kept})

    def test_rule_17_each_loss_is_trained_with_and_resumed_exactly(self) -> None:
        """Rule 17: what is reported is the loss that the data name, of the model as it was, and training lowers it."""
        for loss in LOSSES:
            self._train_with(self.task(loss))

    def _train_with(self, data: TrainingData) -> None:
        backend, reports = self.backend(), [0.0]
        asked = {"model": self.plain_model, "data": data, **self.without_momentum}  # rule 12 looks at moments
        state = self._init(**asked)
        begun = expected_loss(data, backend.logits(state, data.x), np.arange(len(data.x)))
        for step, rows in enumerate(data.indices(0, 6)):
            expected = expected_loss(data, backend.logits(state, data.x[rows]), rows)
            state = backend.train(state, step, step + 1, report=lambda _, loss: reports.append(loss))
            np.testing.assert_allclose(reports[-1], expected, self.tolerance, self.tolerance, err_msg=data.loss)
        reached = expected_loss(data, backend.logits(state, data.x), np.arange(len(data.x)))
        assert reached < begun, f"{data.loss} went from {begun} to {reached}"
        dumped, values = backend.dump(state)
        dumped, values = frozen(resolved(dumped)), json.loads(json.dumps(values))
        other = backend.load(self._init(seed=9, **asked), dumped, values)
        assert_equal(self._weights(self._train(other, 6, 9)), self._weights(self._train(state, 6, 9)))

    def _init(self, *, seed: int = 3, member: int = 1, schedule: Any = None, **options: Any) -> Any:
        program = Program("test", schedule or CosineCycles(0.05, _STEPS, 1, remainder="even"))
        model, data = options.pop("model", self.model), options.pop("data", None) or self.data()
        return self.backend().init(model, data, program, seed=seed, member=member, **self.options, **options)

    def _train(self, state: Any, start: int, stop: int) -> Any:
        return self.backend().train(state, start, stop, report=_ignore)

    def _trained(self, steps: int, **options: Any) -> Any:
        return self._train(self._init(**options), 0, steps)

    def _undisturbed(self, **options: Any) -> Any:
        return self._train(self._trained(6, **options), 6, 9)

    def _weights(self, state: Any) -> Arrays:
        return frozen(resolved(self.backend().capture(state)))

    def _parameters(self, state: Any) -> Arrays:
        """The weights that the rate moves: those that an update at almost no rate leaves where they are."""
        schedule = StepDecay(1e-12, _STEPS, milestones=())
        still = self._init(schedule=schedule)
        before = self._weights(still)
        after = self._weights(self._train(still, 0, 1))
        return {
            name: array for name, array in self._weights(state).items() if np.array_equal(before[name], after[name])
        }

    def _first_update(self, lr: float) -> Arrays:
        schedule = StepDecay(lr, _STEPS, milestones=())
        before = self._parameters(self._init(schedule=schedule, **self.without_momentum))
        state = self._train(self._init(schedule=schedule, **self.without_momentum), 0, 1)
        return {name: array - before[name] for name, array in self._parameters(state).items()}

    def _parameters_after(self, schedule: Any, steps: int) -> Arrays:
        state = self._train(self._init(schedule=schedule, **self.without_momentum), 0, steps)
        return self._parameters(state)


@functools.cache
def _task() -> TrainingData:
    random = np.random.default_rng(0)
    y = np.arange(96) % 4
    x = (
        random.normal(size=(96, 1, 8, 8)).astype(np.float32)
        + np.eye(4, 64, dtype=np.float32)[y].reshape(96, 1, 8, 8) * 3
    )
    return TrainingData(x, y.astype(np.int64), 4, batch_size=16, seed=5)


def _ignore(step: int, loss: float) -> None:
    """Report to nobody."""


def _refusal(backend: Backend[Any], state: Any, tensors: Arrays) -> str:
    try:
        backend.restore(state, tensors, optimizer="keep")
    except DataError as error:
        return str(error)
    return ""
