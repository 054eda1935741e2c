"""How a loop of one's own ends and what it hears of members: Ctrl-C, a refused member, functions of the user."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from snapcore import CosineCycles
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotRun

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)


def train(directory, *, interrupt_at=None, where="before the update"):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with SnapshotRun(directory, CYCLES, model, optimizer) as run:
        for x in run.batches(torch.ones(5, 6, 3)):
            if run.updates == interrupt_at and where == "before the update":
                signal.raise_signal(signal.SIGINT)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if run.updates == interrupt_at and where == "after the update":
                signal.raise_signal(signal.SIGINT)
            run.step()
    return [SnapshotStore(directory).load(index)["0.weight"].tobytes() for index in (1, 2, 3)]


@pytest.mark.parametrize("where", ["before the update", "after the update"])
def test_a_first_ctrl_c_leaves_after_the_update_with_a_resume_point(tmp_path, caplog, where):
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", interrupt_at=5, where=where)
    assert "left after 6 of 12 updates; it resumes after update 6" in caplog.text
    assert train(tmp_path / "parts") == whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_programs_own_is_kept(tmp_path):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        train(tmp_path, interrupt_at=5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["mine"]


PROGRAM = """
    import sys, torch
    from torch import nn
    from snapcore import CosineCycles
    from snapcore_torch import SnapshotRun
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = SnapshotRun(sys.argv[1], CosineCycles(0.1, 4, 2), model, optimizer)
    while not run.finished:
        optimizer.zero_grad(); model(torch.ones(1, 3)).square().mean().backward(); optimizer.step()
        if run.updates == 3 and sys.argv[2] == "diverges":
            model.weight.data[0, 0] = torch.nan
        run.step()
    print("done")
"""


@pytest.mark.exhaustive(keep=1)
@pytest.mark.parametrize(("ending", "members"), [("well", 2), ("diverges", 1)])
def test_a_program_that_never_closes_its_run_ends_in_an_error_if_the_last_member_was_refused(tmp_path, ending, members):
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "run"), ending],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode == 0) == (ending == "well"), ended.stderr
    assert ("member 2 at update 4 is refused" in ended.stderr) == (ending == "diverges")
    assert len(SnapshotStore(tmp_path / "run").members) == members


def test_step_returns_the_snapshot_that_it_took_and_functions_are_called_with_it(tmp_path):
    model, taken = nn.Linear(3, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measured = {"metrics": lambda snapshot: {"loss": snapshot.step / 10}, "on_member": taken.append}
    returned = []
    with SnapshotRun(tmp_path, CYCLES, model, optimizer, **measured) as run:
        while not run.finished:
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().mean().backward()
            optimizer.step()
            returned.append(run.step())
    assert [each and each.step for each in returned] == [None, None, None, 4, None, None, None, 8, None, None, None, 12]
    assert taken == [each for each in returned if each]
    assert [member.metrics for member in SnapshotStore(tmp_path).members] == [
        {"loss": 0.4},
        {"loss": 0.8},
        {"loss": 1.2},
    ]
