"""Snapshots from a loop of one's own: the right instant, the right bits, and nothing that later updates change."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from snapcore import CosineCycles, DataError
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotRun
from snapcore_torch.state import Copy, load_weights, named_tensors, to_numpy

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)


class Tied(nn.Module):
    """An embedding whose weights are the output layer's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x.abs().sum(-1).long() % 5))


def normalised():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def update(model, optimizer):
    """One real update, on noise."""
    x = torch.randn(6, 3, dtype=next(model.parameters()).dtype)
    optimizer.zero_grad()
    model(x).float().square().mean().backward()
    optimizer.step()


def bits(tensor):
    """The bytes of a tensor in C order, found without the adapter."""
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


def by_hand(model):
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def on_disk(directory, index):
    return {name: array.tobytes("C") for name, array in SnapshotStore(directory).load(index).items()}


def train(directory, model, schedule=CYCLES, optimizer=None):
    """Train to the end, and copy by hand what each snapshot should hold."""
    optimizer, copies = optimizer or sgd(model), []
    with SnapshotRun(directory, schedule, model, optimizer) as run:
        while not run.finished:
            update(model, optimizer)
            if run.updates + 1 in schedule.snapshot_steps:
                copies.append(by_hand(model))
            run.step()
    return copies


@pytest.mark.parametrize("make", [Tied, lambda: nn.Linear(3, 2).to(torch.bfloat16)])
def test_a_snapshot_holds_bit_for_bit_what_a_hand_would_have_copied_then(tmp_path, make):
    """Torch-uncertainty collects at the start of a cycle, after the rate has jumped."""
    copies = train(tmp_path / "run", make())
    assert [on_disk(tmp_path / "run", index) for index in (1, 2, 3)] == copies
    assert len({str(copy) for copy in copies}) == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_copy_is_not_changed_by_updates_that_come_before_it_is_written(kind):
    model = normalised()
    optimizer = kind(model.parameters(), lr=0.1)
    update(model, optimizer)
    expected, copy = by_hand(model), Copy(named_tensors(model))
    update(model, optimizer)
    assert {name: array.tobytes("C") for name, array in copy.resolve().items()} == expected
    assert by_hand(model) != expected


def test_tied_weights_are_copied_once_and_named_twice():
    arrays = Copy(named_tensors(Tied())).resolve()
    assert set(arrays) == {"embed.weight", "head.weight"}
    assert np.shares_memory(arrays["embed.weight"], arrays["head.weight"])


def test_parts_of_one_storage_are_not_taken_for_each_other():
    whole = torch.arange(6.0)
    arrays = Copy({"a": whole, "b": whole[:3], "c": whole[::2], "d": whole.view(2, 3)}).resolve()
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [0, 1, 2],
        "c": [0, 2, 4],
        "d": [[0, 1, 2], [3, 4, 5]],
    }


def test_weights_in_another_memory_order_are_stored_in_c_order(tmp_path):
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    with SnapshotRun(tmp_path / "run", CosineCycles(0.1, 1, 1), model, optimizer) as run:
        optimizer.step()
        run.step()
    assert on_disk(tmp_path / "run", 1) == by_hand(model)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_bfloat16_comes_to_the_host_with_its_bits(shape):
    tensor = torch.randn(shape).bfloat16()
    array = to_numpy(tensor)
    assert (array.dtype, array.shape) == (ml_dtypes.bfloat16, shape)
    assert array.astype(np.float32).tolist() == tensor.float().tolist()


def test_a_compiled_module_has_the_names_of_the_module_itself(tmp_path):
    model = torch.compile(normalised(), backend="eager")
    copies = train(tmp_path / "run", model)
    names = set(SnapshotStore(tmp_path / "run").load(1))
    assert names == set(normalised().state_dict())
    assert [on_disk(tmp_path / "run", i + 1) == {name.removeprefix("_orig_mod."): value for name, value in copy.items()}
            for i, copy in enumerate(copies)] == [True] * 3  # fmt: skip


def test_a_data_parallel_wrapper_leaves_no_trace_in_the_names():
    assert set(named_tensors(nn.DataParallel(nn.Linear(2, 2)))) == {"weight", "bias"}


def test_a_state_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path):
    class WithExtra(nn.Linear):
        def get_extra_state(self):
            return {"version": 2}

    model = WithExtra(3, 2)
    with pytest.raises(DataError, match="'_extra_state' of the model's state is dict"):
        SnapshotRun(tmp_path / "run", CYCLES, model, sgd(model))
    assert not (tmp_path / "run").exists()


def test_weights_go_back_into_the_tensors_that_the_optimizer_holds():
    model, arrays = normalised(), Copy(named_tensors(normalised())).resolve()
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    load_weights(model, arrays, "the member")
    assert by_hand(model) == {name: array.tobytes() for name, array in arrays.items()}
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == addresses


def test_weights_of_another_model_are_refused_with_a_list_of_what_differs():
    model = nn.Linear(3, 2)
    before = by_hand(model)
    with pytest.raises(DataError, match=r"'bias' \(2,\) is missing; 'scale' \(1,\) is not.*'weight' is \(2, 4\)"):
        load_weights(model, {"weight": np.zeros((2, 4)), "scale": np.zeros(1)}, "the member")
    assert by_hand(model) == before


def test_read_only_arrays_are_copied_in_without_a_warning():
    model = nn.Linear(3, 2)
    arrays = {"weight": np.broadcast_to(np.float32(3), (2, 3)), "bias": np.zeros(4, np.float32)[::-2]}
    load_weights(model, arrays, "the member")
    assert model.weight.tolist() == [[3.0] * 3] * 2
