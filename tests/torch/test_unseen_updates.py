"""Updates that PyTorch's hooks do not report, or report twice: each counts once, or the run says so at once."""

import re

import pytest
import torch
from torch import nn

from snapcore import CosineCycles, ProtocolError
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotRun

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)


class Clipped(torch.optim.SGD):
    """Does something and leaves the rest to its base, whose hooks run too."""

    def step(self, closure=None):
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        return super().step(closure)


class Logged(Clipped):
    """A level more, and it may fail in the middle."""

    fails = False

    def step(self, closure=None):
        loss = super().step(closure)
        if self.fails:
            raise MemoryError
        return loss


class SAM(torch.optim.Optimizer):
    """Two halves of an update; `step` does both."""

    def __init__(self, params, **options):
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["e"] = p.grad * group["rho"] / (p.grad.norm() + 1e-12)
                p.add_(self.state[p]["e"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["e"])
        self.base_optimizer.step()

    def step(self, closure):
        closure()
        self.first_step()
        self.zero_grad()
        closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """Slow weights that follow fast ones; as many are written, it does not call the constructor of its base."""

    def __init__(self, base):
        self._base_optimizer, self.defaults, self.state = base, base.defaults, base.state
        self.param_groups, self.steps = base.param_groups, 0
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self._base_optimizer.step(closure)
        self.steps += 1
        if self.steps % 6 == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for slow, p in zip(self.slow, fast, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)

    def zero_grad(self, set_to_none=True):
        self._base_optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return {"base": self._base_optimizer.state_dict(), "slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state):
        self._base_optimizer.load_state_dict(state["base"])
        self.param_groups, self.slow, self.steps = self._base_optimizer.param_groups, state["slow"], state["steps"]


class Both(torch.optim.Optimizer):
    """One optimizer for matrices, another for the rest."""

    def __init__(self, params, **options):
        params = list(params)
        self.parts = [
            torch.optim.SGD([p for p in params if p.ndim > 1], **options),
            torch.optim.Adam([p for p in params if p.ndim < 2], **options),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], options)

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def steps(directory):
    return [taken.step for taken in SnapshotStore(directory).members]


def loss_of(model):
    return model(torch.randn(6, 3)).square().mean()


def plainly(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def in_halves(model, optimizer):
    for half in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        loss_of(model).backward()
        half()


def by_closure(model, optimizer):
    def closure():
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.zero_grad()
    optimizer.step(closure)


COUNTED = {
    "super().step()": (lambda p: Clipped(p, lr=0.1), plainly),
    "super().super().step()": (lambda p: Logged(p, lr=0.1), plainly),
    "SAM in two halves": (lambda p: SAM(p, lr=0.1), in_halves),
    "SAM in one step": (lambda p: SAM(p, lr=0.1), by_closure),
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.1), by_closure),
    "Lookahead": (lambda p: Lookahead(torch.optim.SGD(p, lr=0.1)), plainly),
    "Lookahead of SAM": (lambda p: Lookahead(Clipped(p, lr=0.1)), plainly),
    "two in one": (lambda p: Both(p, lr=0.1), plainly),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_each_update_counts_once_at_the_schedules_rate(tmp_path, kind):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # whatever was made before in the process
    make, update = COUNTED[kind]
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for done in range(1, 13):
            assert [group["lr"] for group in optimizer.param_groups] == [CYCLES(done - 1)] * len(optimizer.param_groups)
            update(model, optimizer)
            run.step()
            assert run.updates == done
    assert steps(tmp_path) == [4, 8, 12]


@pytest.mark.parametrize("kind", ["super().super().step()", "SAM in two halves", "Lookahead", "two in one"])
def test_accumulated_gradients_make_one_update_there_too(tmp_path, kind):
    make, update = COUNTED[kind]
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for micro_batch in range(1, 37):
            if micro_batch % 3:
                loss_of(model).backward()
            else:
                update(model, optimizer)
            run.step()
            assert run.updates == micro_batch // 3


@pytest.mark.parametrize("kind", ["SAM in two halves", "Lookahead", "two in one"])
def test_what_an_optimizer_inside_remembers_is_resumed_too(tmp_path, kind):
    """SAM's own `state_dict` lacks the momentum of the optimizer that it holds."""
    make = {
        "SAM in two halves": lambda p: SAM(p, lr=0.1, momentum=0.9),
        "Lookahead": lambda p: Lookahead(torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        "two in one": lambda p: Both(p, lr=0.1),
    }[kind]

    def train(directory, until):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        optimizer = make(model.parameters())
        with SnapshotRun(directory, CYCLES, model, optimizer) as run:
            while run.updates < until:
                COUNTED[kind][1](model, optimizer)
                run.step()
        return model.weight.tolist()

    whole = train(tmp_path / "whole", 12)
    train(tmp_path / "parts", 7)
    assert train(tmp_path / "parts", 12) == whole
    assert steps(tmp_path / "parts") == [4, 8, 12]


@pytest.mark.parametrize("recorded", [True, False], ids=["and a run.step()", "alone"])
def test_a_step_that_failed_is_no_update_and_the_next_one_counts(tmp_path, recorded):
    model = nn.Linear(3, 2)
    optimizer = Logged(model.parameters(), lr=0.1)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        plainly(model, optimizer)
        run.step()
        optimizer.fails = True
        with pytest.raises(MemoryError):
            plainly(model, optimizer)
        optimizer.fails = False
        if recorded:
            run.step(updates=0)
        plainly(model, optimizer)
        run.step()
        assert run.updates == 2


def by_hand(model, optimizer):
    loss_of(model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad * optimizer.param_groups[0]["lr"])
            p.grad = None


def through_data(model, optimizer):
    loss_of(model).backward()
    for p in model.parameters():
        p.data.sub_(p.grad * optimizer.param_groups[0]["lr"])
        p.grad = None


def data_replaced(model, optimizer):
    loss_of(model).backward()
    for p in model.parameters():
        p.data = p.data - p.grad * optimizer.param_groups[0]["lr"]
        p.grad = None


def by_another(model, optimizer):
    plainly(model, torch.optim.Adam(model.parameters(), lr=0.1))


UNSEEN = [by_hand, through_data, data_replaced, by_another]


@pytest.mark.parametrize("unseen", UNSEEN)
def test_an_update_that_is_not_the_optimizers_is_refused_at_the_first_call(tmp_path, unseen):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = SnapshotRun(tmp_path, CYCLES, model, optimizer)
    unseen(model, optimizer)
    with pytest.raises(ProtocolError, match=r"not by step\(\) of the SGD.*call run.step\(updates=1\)") as caught:
        run.step()
    assert len(str(caught.value).split()) <= 35
    run.close()


@pytest.mark.parametrize("unseen", UNSEEN)
def test_the_advice_can_be_followed(tmp_path, unseen):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for _ in range(12):
            unseen(model, optimizer)
            run.step(updates=1)
    assert steps(tmp_path) == [4, 8, 12]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("unseen", UNSEEN)
def test_an_optimizer_that_is_no_longer_used_is_noticed(tmp_path, unseen, accumulate):
    """As after unfreezing, with a new optimizer; at the latest when more calls have passed than one update took."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for micro_batch in range(1, 2 * accumulate + 1):
            loss_of(model).backward()
            if micro_batch % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            run.step()

        def unseen_updates():
            for _ in range(accumulate + 2):
                unseen(model, optimizer)
                run.step()

        with pytest.raises(ProtocolError, match="not by step"):
            unseen_updates()
        assert run.updates == 2


def test_weights_that_the_forward_pass_normalises_are_no_update(tmp_path):
    model = nn.Sequential(nn.Embedding(7, 3, max_norm=0.1), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for micro_batch in range(1, 9):
            model(torch.arange(7)).sum().backward()
            if micro_batch % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
            run.step()
        assert run.updates == 2


def test_weights_loaded_between_opening_a_run_and_its_first_batch_are_no_update(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        model.load_state_dict(nn.Linear(3, 2).state_dict())
        for number, x in enumerate(run.batches(torch.randn(10, 6, 3)), 1):
            model(x).square().mean().backward()
            if number % 2 == 0:
                optimizer.step()
            run.step()
    assert steps(tmp_path) == [4, 8, 12]


def test_weights_clipped_after_an_update_that_the_scaler_skipped_are_no_update(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer, scaler=scaler) as run:
        for attempt in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model) * (torch.inf if attempt % 3 == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.1, 0.1)
            run.step()
        assert run.updates == 4


def test_an_optimizer_that_holds_another_with_groups_of_its_own_is_refused(tmp_path):
    class Own(torch.optim.SGD):
        def __init__(self, params, **options):
            params = list(params)
            super().__init__(params, **options)
            self.base = torch.optim.SGD(params, **options)

    model = nn.Linear(3, 2)
    message = "Own holds a SGD with parameter groups of its own, whose rate nobody would set: pass that one"
    with pytest.raises(ProtocolError, match=re.escape(message)):
        SnapshotRun(tmp_path / "run", CYCLES, model, Own(model.parameters(), lr=0.1))
    assert not (tmp_path / "run").exists()
