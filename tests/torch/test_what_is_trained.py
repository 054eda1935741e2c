"""What an optimizer may train beside the model, and what is refused before a directory is made."""

import numpy as np
import pytest
import torch
from torch import nn

from snapcore import CosineCycles, DataError, ProtocolError, StoreError
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotRun
from snapcore_torch.state import Copy

CYCLES = CosineCycles(lr=0.1, steps=12, cycles=3)


def sgd(*modules, **options):
    return torch.optim.SGD([p for module in modules for p in module.parameters()], **{"lr": 0.1, **options})


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(6, 3)).square().mean().backward()
    optimizer.step()


def refused(directory, match, *arguments, error=ProtocolError, **options):
    with pytest.raises(error, match=match) as caught:
        SnapshotRun(directory / "run", CYCLES, *arguments, **options)
    assert not (directory / "run").exists()
    assert len(str(caught.value).split()) <= 35


def test_a_head_that_the_optimizer_trains_beside_the_model_is_asked_for(tmp_path):
    """Such as that of ArcFace, or learned weights of losses."""
    model, head = nn.Linear(3, 4), nn.Linear(4, 2)
    refused(tmp_path, r"trains 2 parameters that are not the model's.*\(2, 4\): give their module in state=",
            model, sgd(model, head))  # fmt: skip


def test_a_head_given_in_state_resumes_exactly(tmp_path):
    def train(directory, until):
        torch.manual_seed(3)
        model, head = nn.Linear(3, 4), nn.Linear(4, 2)
        optimizer = sgd(model, head, momentum=0.9)
        with SnapshotRun(directory, CYCLES, model, optimizer, state={"head": head}) as run:
            while run.updates < until:
                update(nn.Sequential(model, head), optimizer)
                run.step()
        return model.weight.tolist(), head.weight.tolist()

    whole = train(tmp_path / "whole", 12)
    train(tmp_path / "parts", 6)
    assert train(tmp_path / "parts", 12) == whole


def test_learned_numbers_beside_the_model_may_be_given_as_a_parameter_list(tmp_path):
    model, scales = nn.Linear(3, 2), nn.ParameterList([torch.ones(2)])
    optimizer = sgd(model, scales)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer, state={"scales": scales}) as run:
        update(model, optimizer)
        run.step()


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    """A notebook's cell that builds the model, run twice."""
    old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    refused(tmp_path, r"\(SGD\) trains none of the model's parameters: build it from this model", new, sgd(old))


def test_an_optimizer_of_a_part_that_was_replaced_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = sgd(model)
    model[1] = nn.Linear(3, 2)
    refused(tmp_path, "2 parameters that are not the model's", model, optimizer)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_frozen_body_and_a_wrapped_model_are_fine(tmp_path, wrap):
    body, head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2)
    optimizer = sgd(head)
    with SnapshotRun(tmp_path, CYCLES, wrap(nn.Sequential(body, head)), optimizer) as run:
        update(nn.Sequential(body, head), optimizer)
        run.step()
        assert run.updates == 1


def test_a_wrapper_that_is_no_optimizer_is_refused_by_name(tmp_path):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = nn.Linear(3, 2)
    refused(tmp_path, r"got Wrapper, a wrapper: pass its .optimizer", model, Wrapper(sgd(model)))


def test_an_optimizer_that_shards_its_state_is_refused(tmp_path):
    class Sharded(torch.optim.SGD):
        def consolidate_state_dict(self, to=0): ...

    model = nn.Linear(3, 2)
    refused(tmp_path, "Sharded shards its state", model, Sharded(model.parameters(), lr=0.1))


def test_an_object_without_a_state_is_refused_by_name(tmp_path):
    model = nn.Linear(3, 2)
    refused(tmp_path, "got int as 'epoch'", model, sgd(model), state={"epoch": 3})


NO_FILE_HOLDS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "qint8": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
    "meta": lambda: torch.ones(3, device="meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("kind", NO_FILE_HOLDS)
@pytest.mark.parametrize("where", ["the model", "an object in state="])
def test_a_tensor_that_no_file_holds_is_named_before_the_first_update(tmp_path, kind, where):
    model, other = nn.Linear(3, 2), nn.Linear(1, 1)
    (model if where == "the model" else other).register_buffer("graph", NO_FILE_HOLDS[kind]())
    with pytest.raises(DataError, match=rf"graph' is a {kind}.* tensor, .*persistent=False"):
        SnapshotRun(tmp_path, CYCLES, model, sgd(model), state={"other": other})
    assert SnapshotStore(tmp_path).members == ()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.bool, torch.float64, torch.int8])
def test_what_a_file_holds_is_held(tmp_path, dtype):
    model = nn.Linear(3, 2)
    model.register_buffer("table", torch.ones(3, dtype=dtype))
    optimizer = sgd(model)
    with SnapshotRun(tmp_path, CosineCycles(0.1, 1, 1), model, optimizer) as run:
        update(model, optimizer)
        run.step()
    assert SnapshotStore(tmp_path).load(1)["table"].tobytes() == model.table.numpy().tobytes()


@pytest.mark.parametrize("bound", [torch.inf, -torch.inf, torch.nan])
def test_buffers_that_are_meant_to_be_infinite_are_members(tmp_path, bound):
    """Constraints of Gaussian processes, attention masks."""
    model = nn.Linear(3, 2)
    model.register_buffer("bound", torch.tensor(bound))
    optimizer = sgd(model)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        while not run.finished:
            update(model, optimizer)
            run.step()
    assert len(SnapshotStore(tmp_path).members) == 3


class Fussy(torch.optim.SGD):
    """Makes a state of its own at its first step."""

    def step(self, closure=None):
        self.state[self.param_groups[0]["params"][0]]["history"] = object()
        return super().step(closure)


def test_an_object_in_the_optimizers_state_is_named_after_the_first_update(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = Fussy(model.parameters(), lr=0.1)
    run = SnapshotRun(tmp_path, CYCLES, model, optimizer)
    update(model, optimizer)
    with pytest.raises(DataError, match="history is a object, which cannot be saved without pickle"), run:
        run.step()


def test_another_optimizer_on_resume_is_refused_with_the_weights_as_they_were(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = sgd(model, momentum=0.9)
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for _ in range(5):
            update(model, optimizer)
            run.step()
    other = nn.Linear(3, 2)
    before = other.weight.tolist()
    with pytest.raises(StoreError, match="a run trained by SGD, got Adam"):
        SnapshotRun(tmp_path, CYCLES, other, torch.optim.Adam(other.parameters(), lr=0.1))
    assert other.weight.tolist() == before


def test_settings_that_differ_on_resume_are_said_and_the_saved_ones_are_in_force(tmp_path, caplog):
    for weight_decay in (0.01, 0.5):
        model = nn.Linear(3, 2)
        optimizer = sgd(model, weight_decay=weight_decay)
        with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
            update(model, optimizer)
            run.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    (said,) = [each.message for each in caplog.records if "settings differ" in each.message]
    assert said.endswith("weight_decay 0.01 saved, 0.5 given, 0.01 in force")


def refuse(state):
    raise KeyError("version")


@pytest.mark.parametrize("wrong", ["groups", "state", "an object's own loading", "another shape in state="])
def test_a_resume_point_that_does_not_fit_leaves_the_weights_as_they_were(tmp_path, wrong):
    def open_run(*, first):
        model, other = nn.Linear(3, 2), nn.Linear(2, 2)
        optimizer = sgd(model, momentum=0.9)
        state = {"other": other}
        if not first and wrong == "groups":
            optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
        elif not first and wrong == "state":
            state["more"] = other
        elif not first and wrong == "an object's own loading":
            other.load_state_dict = refuse
        elif not first:
            state["other"] = nn.Linear(2, 3)
        before = model.weight.tolist()
        try:
            with SnapshotRun(tmp_path, CYCLES, model, optimizer, state=state) as run:
                update(model, optimizer)
                run.step()
        finally:
            assert first or model.weight.tolist() == before

    open_run(first=True)
    with pytest.raises((DataError, KeyError, RuntimeError)):
        open_run(first=False)


NAMES = [
    "model",
    "optimizer",
    "weights",
    "weights/weight",
    "model/weight",
    "scaler",
    "average",
    "state",
    "training",
    "",
]


def test_an_object_in_state_may_have_any_name(tmp_path):
    def train(until, build):
        torch.manual_seed(build)
        model = nn.Linear(3, 2)
        others = {name: nn.Linear(1, 1) for name in NAMES}
        optimizer, scaler = sgd(model, momentum=0.9), torch.amp.GradScaler("cpu", init_scale=4.0 * build)
        with SnapshotRun(tmp_path, CYCLES, model, optimizer, state=others, scaler=scaler) as run:
            begun = {name: other.weight.item() for name, other in others.items()}
            while run.updates < until:
                update(model, optimizer)
                run.step()
        return begun, scaler.get_scale()

    first, _ = train(3, build=1)
    assert train(12, build=2) == (first, 4.0)


def test_numpys_scalars_are_numbers(tmp_path):
    """What a search over hyperparameters gives."""
    model = nn.Linear(3, 2)
    for until in (3, 12):
        optimizer = sgd(model, weight_decay=np.float64(1e-4), momentum=np.float32(0.5), nesterov=np.bool_(True))
        with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
            while run.updates < until:
                update(model, optimizer)
                run.step()
    assert optimizer.param_groups[0]["momentum"] == 0.5


class Observer(nn.Module):
    """Loads its range in its own way, as the observers of quantization do: it has no shape before it is seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("range", torch.zeros(0))

    def forward(self, x):
        self.range = x.detach().amax(0)
        return x

    def _load_from_state_dict(self, state, prefix, *rest):
        self.range = torch.zeros_like(state[prefix + "range"])
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_a_module_that_loads_itself_resumes(tmp_path, wrap):
    def build():
        model = nn.Sequential(nn.Linear(3, 3), Observer(), nn.BatchNorm1d(3))
        return model, sgd(model)

    model, optimizer = build()
    with SnapshotRun(tmp_path, CYCLES, wrap(model), optimizer) as run:
        update(model, optimizer)
        run.step()
    other, optimizer = build()
    with SnapshotRun(tmp_path, CYCLES, wrap(other), optimizer) as run:
        assert run.updates == 1
        assert other[1].range.tolist() == model[1].range.tolist()


def test_tied_weights_are_one_array():
    whole = torch.arange(6.0)
    arrays = Copy({"a": whole, "b": whole, "c": whole.view(6), "d": whole.view(2, 3)}).resolve()
    assert arrays["a"] is arrays["b"] is arrays["c"]
    assert arrays["a"] is not arrays["d"]


def test_a_rate_that_is_a_tensor_is_the_same_tensor_after_a_resume(tmp_path):
    """A compiled update, or a captured graph, reads the rate from it."""

    def make():
        model, rate = nn.Linear(3, 2), torch.tensor(0.1)
        return model, sgd(model, lr=rate, momentum=0.9), rate

    model, optimizer, rate = make()
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        for _ in range(5):
            update(model, optimizer)
            run.step()
    model, optimizer, rate = make()
    with SnapshotRun(tmp_path, CYCLES, model, optimizer) as run:
        assert run.updates == 5
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(CYCLES(5))
