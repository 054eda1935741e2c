"""What counts as an update, whatever stands between the loop and the optimizer."""

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from snapcore import CosineCycles, CycleWarning, ProtocolError
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotLR, SnapshotRun

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "fused adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
}


def values(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def member(directory, index):
    return {name: array.tolist() for name, array in SnapshotStore(directory).load(index).items()}


def steps(directory):
    return [taken.step for taken in SnapshotStore(directory).members]


def loss_of(model):
    return model(torch.randn(6, 3)).square().mean()


def update(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


class Watched:
    """Real updates, found without the optimizer's help: the times that the weights moved, and what they were then."""

    def __init__(self, model):
        self.model, self.moments = model, [values(model)]

    def look(self):
        if values(self.model) != self.moments[-1]:
            self.moments.append(values(self.model))

    @property
    def updates(self):
        return len(self.moments) - 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("unscaled", [False, True])
def test_updates_skipped_for_infinite_gradients_do_not_count(tmp_path, optimizer, unscaled):
    """A fused optimizer is called even then, and fires its hooks; a gradient unscaled by hand takes another path."""
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    scaler, watched = torch.amp.GradScaler("cpu", init_scale=1024.0), Watched(model)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer, scaler=scaler) as run:
        for attempt in range(40):
            optimizer.zero_grad()
            scaler.scale(loss_of(model) * (torch.inf if attempt % 3 == 1 else 1)).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            assert optimizer.param_groups[0]["lr"] == CYCLES(watched.updates)
            scaler.step(optimizer)
            scaler.update()
            watched.look()
            run.step()
            assert run.updates == watched.updates
            if run.finished:
                break
    assert attempt == 17  # 12 updates, and 6 of 18 attempts skipped
    assert [member(tmp_path, k) for k in (1, 2, 3)] == [watched.moments[due] for due in (4, 8, 12)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("calls", ["at every micro-batch", "at every update"])
def test_accumulated_gradients_make_one_update(tmp_path, optimizer, calls):
    model = nn.Linear(3, 2)
    optimizer, watched = OPTIMIZERS[optimizer](model.parameters()), Watched(model)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for micro_batch in range(1, 37):
            (loss_of(model) / 3).backward()
            if micro_batch % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
                watched.look()
            if micro_batch % 3 == 0 or calls == "at every micro-batch":
                run.step()
    assert (run.updates, run.finished) == (12, True)
    assert [member(tmp_path, k) for k in (1, 2, 3)] == [watched.moments[due] for due in (4, 8, 12)]


def test_accumulation_and_a_loss_scaler_together_count_real_updates(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS["fused sgd"](model.parameters())
    scaler, watched = torch.amp.GradScaler("cpu", init_scale=1024.0), Watched(model)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer, scaler=scaler) as run:
        for micro_batch in range(1, 31):
            scaler.scale(loss_of(model) * (torch.inf if micro_batch == 7 else 1)).backward()  # spoils 7 and 8
            if micro_batch % 2 == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                watched.look()
            run.step()
            if run.finished:
                break
    assert (micro_batch, watched.updates) == (26, 12)
    assert steps(tmp_path) == [4, 8, 12]


def test_the_loss_scale_is_part_of_a_resume_point(tmp_path):
    def scale_after(updates, init_scale):
        model = nn.Linear(3, 2)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
        with SnapshotRun(tmp_path, CYCLES, model, optimizer, scaler=scaler) as run:
            while run.updates < updates:
                optimizer.zero_grad()
                scaler.scale(loss_of(model)).backward()
                scaler.step(optimizer)
                scaler.update()
                run.step()
        return scaler.get_scale()

    assert scale_after(5, init_scale=4.0) == 16.0
    assert scale_after(6, init_scale=1.0) == 32.0


def test_updates_said_outright_replace_those_counted(tmp_path):
    """Three in a captured graph, of which the optimizer itself saw one."""
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for done in range(4, 13, 4):
            update(model, optimizer)
            run.step(updates=4)
            run.step(updates=0)
            assert run.updates == done
    assert steps(tmp_path) == [4, 8, 12]


@pytest.mark.parametrize("several", [list, tuple, lambda both: dict(enumerate(both))])
def test_several_optimizers_are_refused_with_advice(tmp_path, several):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    both = several([OPTIMIZERS["sgd"](part.parameters()) for part in model])
    with pytest.raises(
        ProtocolError, match=r"one torch.optim.Optimizer is counted.*a parameter group for each.*state="
    ):
        SnapshotRun(tmp_path / "run", CYCLES, model, both)
    assert not (tmp_path / "run").exists()


def test_a_second_optimizer_beside_the_run_is_not_counted_and_resumes_through_state(tmp_path):
    """The advice, followed."""

    def train(updates):
        torch.manual_seed(updates)
        first, second = nn.Linear(3, 3), nn.Linear(3, 2)
        one, other = OPTIMIZERS["sgd"](first.parameters()), OPTIMIZERS["adam"](second.parameters())
        with SnapshotRun(tmp_path, CYCLES, nn.Sequential(first, second), one, state={"other": other}) as run:
            while run.updates < updates:
                for optimizer in (one, other, other):
                    update(nn.Sequential(first, second), optimizer)
                run.step()
        return other.state_dict()["state"][0]["step"].item()

    assert train(5) == 10
    assert train(12) == 24
    assert steps(tmp_path) == [4, 8, 12]


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float rate", "tensor rate"])
def test_an_optimizer_step_inside_a_compiled_function_counts_without_compiling_again(tmp_path, rate, every):
    torch._dynamo.reset()
    compiler, model = CompileCounter(), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    schedule, frames = CosineCycles(0.1, 48, 2), []

    @torch.compile(backend=compiler)
    def step():
        optimizer.step()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # of its own tracing
        with SnapshotRun(tmp_path, schedule, model, optimizer) as run:
            for done in range(1, 25):
                optimizer.zero_grad()
                loss_of(model).backward()
                step()
                if done % every == 0:
                    run.step()
                    assert run.updates == done
                frames.append(compiler.frame_count)
    assert steps(tmp_path) == [24]
    assert frames[4:] == frames[4:5] * 20


def test_a_call_once_per_epoch_is_warned_of_and_its_member_recorded_late(tmp_path):
    """With 5 updates to the epoch: what the usual per-epoch schedulers do without a word."""
    model = nn.Linear(3, 2)
    optimizer, watched = OPTIMIZERS["sgd"](model.parameters()), Watched(model)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for late in (1, 2):
            for _ in range(5):
                update(model, optimizer)
                watched.look()
            with pytest.warns(CycleWarning, match=f"is taken {late} updates late"):
                run.step()
    members = SnapshotStore(tmp_path).members
    assert [(taken.step, taken.due, taken.lr) for taken in members] == [(5, 4, CYCLES(4)), (10, 8, CYCLES(9))]
    assert [member(tmp_path, 1), member(tmp_path, 2)] == [watched.moments[5], watched.moments[10]]


def test_parameters_added_to_the_optimizer_follow_from_the_next_update_on(tmp_path):
    """A scheduler of PyTorch ends in a zip() error, or leaves the new group's rate where it was."""
    body, head = nn.Linear(3, 3), nn.Linear(3, 2)
    model = nn.Sequential(body, head)
    optimizer, rates = OPTIMIZERS["sgd"](head.parameters()), []
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        optimizer.register_step_pre_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
        for done in range(6):
            if done == 2:
                optimizer.add_param_group({"params": body.parameters(), "lr": 0.01})
            update(model, optimizer)
            run.step()
    assert rates[:2] == [[CYCLES(0)], [CYCLES(1)]]
    assert [rate for pair in rates[2:] for rate in pair] == pytest.approx(
        [rate for step in range(2, 6) for rate in (CYCLES(step), CYCLES(step) / 10)]
    )
    assert steps(tmp_path) == [4]


def test_a_run_with_added_parameters_resumes_at_their_rates(tmp_path):
    def train(updates, added):
        body, head = nn.Linear(3, 3), nn.Linear(3, 2)
        model, optimizer = nn.Sequential(body, head), OPTIMIZERS["sgd"](head.parameters())
        if added:
            optimizer.add_param_group({"params": body.parameters(), "lr": 0.01})
        with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
            if not added:
                optimizer.add_param_group({"params": body.parameters(), "lr": 0.01})
                run.extend()
            while run.updates < updates:
                update(model, optimizer)
                run.step()
            return [group["lr"] for group in optimizer.param_groups]

    assert train(5, added=False) == pytest.approx([CYCLES(5), CYCLES(5) / 10])
    assert train(6, added=True) == pytest.approx([CYCLES(6), CYCLES(6) / 10])


def test_a_scheduler_beside_a_run_takes_added_parameters_in_as_well():
    first, second = nn.Linear(3, 3), nn.Linear(3, 2)
    optimizer = OPTIMIZERS["sgd"](first.parameters())
    scheduler = SnapshotLR(optimizer, CYCLES)
    update(first, optimizer)
    scheduler.step()
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.02})
    update(first, optimizer)
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([CYCLES(2), CYCLES(2) / 5])
