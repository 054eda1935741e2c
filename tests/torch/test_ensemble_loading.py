"""Loading members: mapped, checked, of any module, and refused by name when they do not fit."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from snapcore import CorruptSnapshotError, DataError, StoreError
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.state import Copy, named_tensors

X = torch.linspace(-2, 2, 30).view(2, 5, 3)


def write(directory, *models, framework="torch", unfinished=False):
    with SnapshotStore(directory, "w") as store:
        for index, model in enumerate(models, 1):
            arrays = Copy(named_tensors(model)).resolve()
            entry = {"index": index, "step": index, "cycle": index - 1, "lr": 0.1}
            store.save(arrays, **entry, framework=framework, unfinished=unfinished)


def varied(model):
    """Another member of the same architecture: every floating tensor moved a little."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) / 5)
    return other


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(3, 4, bias=False)
        self.out = nn.Linear(4, 3)
        self.back = nn.Linear(3, 4, bias=False)
        self.back.weight = self.into.weight

    def forward(self, x):
        return self.back(self.out(self.into(x)))


class WithReferences(nn.Module):
    """A module that keeps its weights in a plain list too, where `load_state_dict` does not reach."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.weights = [self.linear.weight]

    def forward(self, x):
        return x @ self.weights[0].T


class WithScratch(nn.Module):
    """A module with a buffer that its state does not hold."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("offset", torch.full((4,), offset), persistent=False)

    def forward(self, x):
        return self.linear(x) + self.offset * torch.arange(4)


MODULES = {
    "linear": lambda: nn.Linear(3, 4),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(3, 4)),
    "batch norm without statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False, affine=True),
    "recurrent": lambda: Recurrent(3, 4, num_layers=2, batch_first=True),
    "attention": lambda: Attention(3, 1, batch_first=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
    "tied": Tied,
    "references": WithReferences,
    "non-persistent buffer": lambda: WithScratch(0.5),
    "frozen": lambda: nn.Linear(3, 4).requires_grad_(False),
    "double": lambda: nn.Sequential(nn.Linear(3, 4)).double(),
}


@pytest.mark.parametrize("name", MODULES)
def test_any_module_gives_the_outputs_of_the_copies_it_was_written_from(tmp_path, name):
    model = MODULES[name]()
    members = [varied(model).eval(), varied(model).eval()]
    write(tmp_path, *members)
    x = X.to(next(model.parameters()).dtype)
    found = SnapshotEnsemble.load(tmp_path, model, activation="identity").members(x)
    torch.testing.assert_close(found, torch.stack([member(x) for member in members]))
    assert not torch.equal(found[0], found[1])


def test_tied_weights_stay_tied_and_are_held_once(tmp_path):
    write(tmp_path, Tied())
    (member,) = SnapshotEnsemble.load(tmp_path, Tied()).models
    assert member.back.weight is member.into.weight


def test_buffers_outside_the_state_are_the_given_models(tmp_path):
    write(tmp_path, WithScratch(0.5))
    (member,) = SnapshotEnsemble.load(tmp_path, WithScratch(2.0)).models
    assert member.offset.tolist() == [2.0] * 4


def test_bfloat16_members_come_back_bit_for_bit(tmp_path):
    model = nn.Linear(3, 4).bfloat16()
    write(tmp_path, model)
    (member,) = SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4).bfloat16()).models
    assert member.weight.dtype == torch.bfloat16
    assert torch.equal(member.weight.view(torch.int16), model.weight.view(torch.int16))


@pytest.mark.parametrize("compile_in_place", [True, False])
def test_a_compiled_model_is_an_architecture_like_any_other(tmp_path, compile_in_place):
    model = nn.Linear(3, 4)
    write(tmp_path, model)
    compiled = nn.Linear(3, 4) if compile_in_place else torch.compile(nn.Linear(3, 4), backend="eager")
    if compile_in_place:
        compiled.compile(backend="eager")
    torch.testing.assert_close(SnapshotEnsemble.load(tmp_path, compiled, axis=-1)(X), model(X).softmax(-1))


def mapped_from(address):
    """The file whose pages are at an address of this process, as Linux reports it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split()
        begin, end = (int(bound, 16) for bound in span.split("-"))
        if begin <= address < end:
            return path
    return None


def test_on_the_cpu_weights_are_mapped_from_their_files_and_not_copied(tmp_path):
    """Users ask for inference of M members that costs less than M times."""
    write(tmp_path, nn.Linear(3, 4), nn.Linear(3, 4))
    ensemble = SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4), axis=-1, mapped=True)
    ensemble(X)
    files = [{mapped_from(tensor.data_ptr()) for tensor in member.parameters()} for member in ensemble.models]
    assert files == [{str(tmp_path / f"snapshot-00{index}.safetensors")} for index in (1, 2)]
    assert mapped_from(torch.ones(3).data_ptr()) not in files[0] | files[1]


def test_a_member_with_other_names_and_shapes_is_refused_with_a_list(tmp_path):
    write(tmp_path, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    with pytest.raises(DataError) as caught:
        SnapshotEnsemble.load(tmp_path, nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 4)))
    message = str(caught.value)
    assert "snapshot-001.safetensors does not fit the model (6 differences)" in message
    assert "'2.weight' (4, 5) is missing" in message
    assert "'1.weight' (4, 4) is not in the model" in message
    assert "; …" in message


def test_a_member_of_another_shape_is_refused_with_both(tmp_path):
    write(tmp_path, nn.Linear(3, 4))
    with pytest.raises(DataError, match=r"'weight' is \(4, 3\), the model's is \(4, 2\)"):
        SnapshotEnsemble.load(tmp_path, nn.Linear(2, 4))


def test_a_file_that_was_altered_is_refused(tmp_path):
    """Nobody else checks what is loaded."""
    write(tmp_path, nn.Linear(3, 4), nn.Linear(3, 4))
    file = tmp_path / "snapshot-002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptSnapshotError, match=r"snapshot-002.safetensors.*SHA-256"):
        SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4))


def test_a_member_that_is_not_used_is_not_read(tmp_path):
    """Users ask to load a part of a saved ensemble."""
    write(tmp_path, nn.Linear(3, 4), nn.Linear(3, 4))
    (tmp_path / "snapshot-001.safetensors").unlink()
    assert len(SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4), last=1).models) == 1


def test_members_of_another_framework_are_refused_by_name(tmp_path):
    write(tmp_path, nn.Linear(3, 4), framework="jax")
    with pytest.raises(DataError, match=r"member 1 .* was written by jax, not by torch"):
        SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4))


@pytest.mark.parametrize("last", [0, -1, 3])
def test_last_must_be_among_the_finished_members(tmp_path, last):
    write(tmp_path, nn.Linear(3, 4), nn.Linear(3, 4))
    with pytest.raises(StoreError, match=rf"last must be in 1\.\.2.*got {last}"):
        SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4), last=last)


def test_a_run_without_a_finished_member_is_refused(tmp_path):
    write(tmp_path, nn.Linear(3, 4), unfinished=True)
    with pytest.raises(StoreError, match="no finished member"):
        SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4))


def test_a_directory_without_a_run_is_refused_and_not_created(tmp_path):
    with pytest.raises(StoreError):
        SnapshotEnsemble.load(tmp_path / "none", nn.Linear(3, 4))
    assert not (tmp_path / "none").exists()


def test_a_strategy_that_there_is_not_is_refused_by_name(tmp_path):
    write(tmp_path, nn.Linear(3, 4))
    with pytest.raises(DataError, match=r"strategy must be one of \['loop', 'stacked', 'graph'\], got 'guess'"):
        SnapshotEnsemble.load(tmp_path, nn.Linear(3, 4), strategy="guess")


def test_the_files_are_plain_safetensors_with_the_models_own_names(tmp_path):
    model = nn.Linear(3, 4)
    write(tmp_path, model)
    arrays = SnapshotStore(tmp_path).load(1)
    np.testing.assert_array_equal(arrays["weight"], model.weight.detach().numpy())


def test_a_structure_beside_the_model_that_has_it_is_refused(tmp_path):
    model = nn.Linear(3, 2)
    write(tmp_path, model)
    with pytest.raises(DataError, match="like must be left out"):
        SnapshotEnsemble.load(tmp_path, model, like=model.state_dict())
    assert len(SnapshotEnsemble.load(tmp_path, model, like=None, axis=-1).members(X)) == 1
