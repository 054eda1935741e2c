"""A run around a loop of one's own: what counts as an update, the rate it gets, and how it ends."""

import pytest
import torch
from torch import nn

from snapcore import CosineCycles, CycleWarning
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotLR, SnapshotRun

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def update(model, optimizer):
    """One real update, on noise."""
    optimizer.zero_grad()
    model(torch.randn(6, 3)).square().mean().backward()
    optimizer.step()


def by_hand(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def test_the_optimizer_has_the_first_rate_before_the_first_update(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = sgd(model, lr=0.1)
    warm = CosineCycles(0.1, 12, 2, warmup_steps=4)
    with SnapshotRun(tmp_path / "run", warm, model, optimizer) as run:
        assert optimizer.param_groups[0]["lr"] == warm(0) == run.lr == pytest.approx(0.02)


def test_groups_keep_their_ratio_also_in_the_next_run_of_the_same_optimizer(tmp_path):
    first, second = nn.Linear(3, 3), nn.Linear(3, 2)
    model = nn.Sequential(first, second)
    groups = [{"params": first.parameters(), "lr": 1.0}, {"params": second.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for name in ("one", "two"):
        with SnapshotRun(tmp_path / name, CYCLES, model, optimizer) as run:
            for step in range(5):
                rates = [group["lr"] for group in optimizer.param_groups]
                assert rates == pytest.approx([10 * CYCLES(step), CYCLES(step)])
                update(model, optimizer)
                run.step()


def test_a_scheduler_of_the_same_schedule_does_the_same_updates(tmp_path):
    """The run needs no scheduler; one beside a plain loop is its oracle."""
    torch.manual_seed(5)
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        while not run.finished:
            update(model, optimizer)
            run.step()
    torch.manual_seed(5)
    plain = nn.Linear(3, 2)
    optimizer = sgd(plain)
    scheduler = SnapshotLR(optimizer, CYCLES)
    for _ in range(12):
        update(plain, optimizer)
        scheduler.step()
    assert by_hand(plain) == by_hand(model)


def test_micro_batches_between_two_updates_do_not_count(tmp_path):
    """Users ask for cycles that are right under gradient accumulation."""
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        for micro_batch in range(1, 17):
            model(torch.randn(2, 3)).square().mean().backward()
            if micro_batch % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
            run.step()
            assert run.updates == micro_batch // 4
            assert optimizer.param_groups[0]["lr"] == CYCLES(micro_batch // 4)
    assert [member.step for member in SnapshotStore(tmp_path / "run").members] == [4]


def test_several_updates_between_two_calls_all_count(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        for done in (2, 4, 6, 8, 10, 12):
            update(model, optimizer)
            update(model, optimizer)
            run.step()
            assert run.updates == done
    assert [member.step for member in SnapshotStore(tmp_path / "run").members] == [4, 8, 12]


def test_an_update_that_a_loss_scaler_skipped_does_not_count(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        for attempt in range(8):
            optimizer.zero_grad()
            loss = model(torch.randn(2, 3)).square().mean() * (torch.inf if attempt % 2 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.step()
        assert run.updates == 4
    assert [member.step for member in SnapshotStore(tmp_path / "run").members] == [4]


def test_updates_said_outright_count_instead_of_the_optimizers_own(tmp_path):
    """A CUDA graph replays updates without calling the optimizer."""
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        run.step(updates=3)
        update(model, optimizer)
        run.step(updates=1)
        assert (run.updates, optimizer.param_groups[0]["lr"]) == (4, 0.1)
        run.step()
        assert run.updates == 4


def test_a_late_call_is_warned_of_and_recorded_with_the_true_step(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with SnapshotRun(tmp_path / "run", CYCLES, model, optimizer) as run:
        for _ in range(6):
            update(model, optimizer)
        with pytest.warns(CycleWarning, match="member 1 was due after update 4 and is taken 2 updates late") as caught:
            run.step()
        assert run.lr == CYCLES(6)
    (member,) = SnapshotStore(tmp_path / "run").members
    assert (member.step, member.due, member.lr) == (6, 4, CYCLES(5))
    assert caught[0].filename == __file__


def test_an_exception_in_the_loop_keeps_the_members_and_frees_the_directory_and_the_optimizer(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    run = SnapshotRun(tmp_path / "run", CYCLES, model, optimizer)

    def interrupted_loop():
        with run:
            for _ in range(5):
                update(model, optimizer)
                run.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_loop()
    with SnapshotStore(tmp_path / "run", "w") as store:
        assert ([member.step for member in store.members], store.stopped) == ([4], None)
        store.verify()
    update(model, optimizer)
    run.step()
    assert run.updates == 5
