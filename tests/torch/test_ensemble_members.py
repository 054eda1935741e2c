"""Members run their own weights, whatever was done to the model that they are loaded into; or the model is refused."""

import copy
import functools
import os
import pickle
import subprocess
import sys
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from snapcore import CosineCycles, DataError, StoreError
from snapcore.store import SnapshotStore
from snapcore_torch import SnapshotEnsemble, SnapshotRun
from snapcore_torch.state import Copy, named_tensors

X = torch.linspace(-2, 2, 15).view(5, 3)
CURE = "pass a freshly built model, or the function that builds it"


def write(directory, *models):
    with SnapshotStore(directory, "w") as store:
        for index, model in enumerate(models, 1):
            arrays = Copy(named_tensors(model)).resolve()
            store.save(arrays, index=index, step=index, cycle=index - 1, lr=0.1, framework="torch")
    return directory


def net():
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))


def varied(model):
    """Another member of the same architecture: every floating tensor moved a little."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) / 2)
    return model.eval()


@pytest.fixture
def run(tmp_path):
    """A run of three members of `net()`, and what their own softmax gives for X."""
    members = [varied(net()) for _ in range(3)]
    with torch.no_grad():
        return write(tmp_path / "run", *members), torch.stack([member(X).softmax(-1) for member in members])


def autocast(model):
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)


def wrapped(model):
    inner = model.forward

    @functools.wraps(inner)
    def forward(x):
        return inner(x)

    model.forward = forward


def closed_over_the_module(model):
    model.forward = lambda x: nn.Sequential.forward(model, x)


def layer_by_default_argument(model):
    model.forward = lambda x, layers=list(model): functools.reduce(lambda h, layer: layer(h), layers, x)


def within_an_object(model):
    holder = types.SimpleNamespace(model=model)
    model.forward = lambda x: nn.Sequential.forward(holder.model, x)


def hook_that_runs_a_layer(model):
    model[0].register_forward_hook(lambda module, args, output: output + model[0].bias)


def pre_hook_that_scales_by_a_weight(model):
    weight = model[0].weight
    model.register_forward_pre_hook(lambda module, args: (args[0] * weight.abs().mean(),))


def cached(model):
    model.body = functools.lru_cache(model[0].forward)


def weak_reference(model):
    model[3].parent = weakref.ref(model)


def without_gradients(model):
    model[0].forward = torch.no_grad()(model[0].forward)


def in_a_list(model):
    model.steps = [lambda x: model[0](x) * 2]


def by_a_global_name(model):
    scope = {"model": model, "Sequential": nn.Sequential}
    exec("def forward(x): return Sequential.forward(model, x)", scope)
    model.forward = scope["forward"]


BOUND = [autocast, wrapped, closed_over_the_module, layer_by_default_argument, within_an_object,
         hook_that_runs_a_layer, pre_hook_that_scales_by_a_weight, cached, weak_reference, without_gradients,
         in_a_list, by_a_global_name]  # fmt: skip


@pytest.mark.parametrize("bind", BOUND)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_function_bound_to_the_given_model_is_refused(run, bind, mapped):
    """`copy.deepcopy` shares functions, so all members would run the given model's weights."""
    model = net()
    bind(model)
    with pytest.raises(DataError, match=rf"is bound to the given model, .*: {CURE}"):
        SnapshotEnsemble.load(run[0], model, mapped=mapped)


@pytest.mark.parametrize("bind", [*BOUND[:5], hook_that_runs_a_layer])
def test_a_function_that_builds_the_model_may_bind_what_it_likes(run, bind):
    directory, _ = run

    def build():
        model = net()
        bind(model)
        return model

    with torch.no_grad():
        found = SnapshotEnsemble.load(directory, build).members(X)
        for index, probabilities in enumerate(found, 1):
            alone = build()
            alone.load_state_dict({n: torch.from_numpy(a) for n, a in SnapshotStore(directory).load(index).items()})
            assert torch.equal(probabilities, alone.eval()(X).float().softmax(-1))


def compiled_method(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_method_of_a_layer(model):
    model[3].forward = torch.compile(model[3].forward, backend="eager")


def partial(model):
    model.forward = functools.partial(model.forward)


def bound_method(model):
    model.forward = types.MethodType(nn.Sequential.forward, model)


def method_kept(model):
    model.run = model.forward


def names(model):
    model.register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize(
    "bind", [compiled_method, compiled_method_of_a_layer, partial, bound_method, method_kept, names]
)
@pytest.mark.parametrize("mapped", [False, True])
def test_what_a_copy_can_follow_runs_the_members_weights(run, bind, mapped):
    directory, wanted = run
    model = net()
    bind(model)
    torch.testing.assert_close(SnapshotEnsemble.load(directory, model, mapped=mapped).members(X), wanted)


def test_forward_hooks_stay_with_the_members(run):
    model, seen = net(), []
    model[2].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    directory, _ = run
    found = SnapshotEnsemble.load(directory, model)(X)
    assert seen == [(5, 6)] * 3
    torch.testing.assert_close(found, SnapshotEnsemble.load(directory, net())(2 * X))


def test_hooks_of_a_wrapper_are_refused_since_members_would_lose_them(run):
    model = nn.DataParallel(net())
    model.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(DataError, match="wrapper DataParallel has forward hooks, which members would lose"):
        SnapshotEnsemble.load(run[0], model)


class Elsewhere(nn.Linear):
    """Runs weights that no copy and no state reaches."""

    live = nn.Linear(3, 4)

    def forward(self, x):
        return self.live(x)


@pytest.mark.parametrize("strategy", ["loop", "stacked"])
def test_members_that_all_give_the_same_though_their_weights_differ_are_refused(strategy):
    members = [varied(Elsewhere(3, 4)) for _ in range(3)]
    for method in ("__call__", "members"):
        ensemble = SnapshotEnsemble(members, strategy=strategy)
        for _ in range(2):
            with pytest.raises(
                DataError, match=rf"weights differ, yet their outputs are bit-equal: {CURE}; or allow_e"
            ):
                getattr(ensemble, method)(X)
    found = SnapshotEnsemble(members, strategy=strategy, allow_equal=True)(X)
    torch.testing.assert_close(found, Elsewhere.live(X).softmax(-1))


@pytest.mark.parametrize("activation", ["identity", "sigmoid", torch.tanh])
def test_equal_members_are_noticed_under_every_activation(activation):
    with pytest.raises(DataError, match="bit-equal"):
        SnapshotEnsemble([varied(Elsewhere(3, 4)) for _ in range(2)], activation=activation)(X)


def test_the_same_weights_may_give_the_same():
    model = varied(net())
    assert SnapshotEnsemble([copy.deepcopy(model), copy.deepcopy(model)])(X).shape == (5, 4)


def test_zeros_decide_nothing_and_the_next_batch_is_checked():
    """Of a model without biases, whatever its weights are."""
    right = SnapshotEnsemble([nn.Linear(3, 4, bias=False) for _ in range(2)])
    assert right(torch.zeros(2, 3)).tolist() == [[0.25] * 4] * 2
    assert right(torch.zeros(0, 3)).shape == (0, 4)
    assert right(X).shape == (5, 4)

    class Wrong(nn.Linear):
        live = nn.Linear(3, 4, bias=False)

        def forward(self, x):
            return self.live(x)

    wrong = SnapshotEnsemble([Wrong(3, 4) for _ in range(2)])
    wrong(torch.zeros(2, 3))
    with pytest.raises(DataError, match="bit-equal"):
        wrong(X)


class Keeping(nn.Linear):
    """Keeps what it computed, as some code bases do to look at it later."""

    def __init__(self):
        super().__init__(3, 4)
        self.kept, self.history, self.by_name = None, [], {}

    def forward(self, x):
        self.kept = super().forward(x)
        self.history.append(self.kept)
        self.by_name["last"] = self.kept
        return self.kept


def pruned():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    return model


def with_old_spectral_norm():
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 4))


class Sparse(nn.Module):
    """Keeps a tensor that has no memory of the usual kind."""

    def __init__(self):
        super().__init__()
        self.mask = torch.eye(3).to_sparse()

    def forward(self, x):
        return (self.mask @ x.T).T


USED = {
    "activations": Keeping,
    "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 4)),
    "old spectral norm": with_old_spectral_norm,
    "sparse": lambda: nn.Sequential(Sparse(), nn.Linear(3, 4)),
    "pruning": pruned,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 4)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_model_that_was_trained_is_an_architecture_like_a_new_one(tmp_path, name, mapped):
    model, own = USED[name](), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    with SnapshotRun(tmp_path / "run", CosineCycles(lr=0.2, steps=128, cycles=2), model, optimizer) as run:
        for x, y in run.batches([(X, torch.arange(5) % 4)]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            run.step()
            if run.updates % 64 == 0:
                model.eval()
                own.append(model(X).softmax(-1).detach())
                model.train()
    model(X)  # and has a graph
    found = SnapshotEnsemble.load(tmp_path / "run", model, mapped=mapped).members(X)
    torch.testing.assert_close(found, torch.stack(own))


class Locked(nn.Linear):
    def __init__(self):
        super().__init__(3, 4)
        self.lock = threading.Lock()


class Viewing(nn.Linear):
    """Keeps a view of its weight, which it would not be in a copy."""

    def __init__(self, view=torch.t):
        super().__init__(3, 4)
        self.transposed = view(self.weight)

    def forward(self, x):
        return x @ self.transposed + self.bias


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Locked, "Locked cannot be copied, .*lock"),
        (Viewing, "'transposed' is a view of the weights"),
        (lambda: Viewing(lambda weight: weight.data.t()), "'transposed' is a view of the weights"),
    ],
)
def test_what_cannot_be_copied_is_refused_in_one_line_and_can_be_built(tmp_path, make, why):
    members = [varied(make()) for _ in range(2)]
    directory = write(tmp_path / "run", *members)
    with pytest.raises(DataError, match=rf"^{why}.*{CURE}$") as caught:
        SnapshotEnsemble.load(directory, make())
    assert "\n" not in str(caught.value)
    found = SnapshotEnsemble.load(directory, make).members(X)
    torch.testing.assert_close(
        found, torch.stack([nn.functional.linear(X, m.weight, m.bias) for m in members]).softmax(-1)
    )


def test_a_model_on_the_meta_device_gets_its_weights_from_the_files(run):
    directory, wanted = run
    with torch.device("meta"):
        model = net()
    for mapped in (False, True):
        for given in (model, lambda: copy.deepcopy(model)):
            torch.testing.assert_close(SnapshotEnsemble.load(directory, given, mapped=mapped).members(X), wanted)


def test_a_buffer_on_the_meta_device_that_members_lack_is_refused_by_name(tmp_path):
    def build(device):
        with torch.device(device):
            model = nn.Linear(3, 4)
            model.register_buffer("scale", torch.ones(4), persistent=False)
        return model

    directory = write(tmp_path / "run", build("cpu"))
    with pytest.raises(DataError, match="'scale' is on the meta device and in no member: build the model on the CPU"):
        SnapshotEnsemble.load(directory, build("meta"))


class Resizing(nn.Module):
    """Loads in a way of its own, as observers of quantization do: a buffer takes the shape that comes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(0))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.seen = torch.empty_like(state_dict[prefix + "seen"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return self.linear(x) * self.seen


def lazy():
    return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("as_function", [False, True])
def test_modules_with_a_loading_of_their_own_are_loaded(tmp_path, run, as_function):
    members = [varied(Resizing()) for _ in range(2)]
    for member in members:
        member.seen = torch.rand(4)
    directory = write(tmp_path / "resizing", *members)
    wanted = torch.stack([member(X).softmax(-1) for member in members])
    found = SnapshotEnsemble.load(directory, Resizing if as_function else Resizing()).members(X)
    torch.testing.assert_close(found, wanted)
    directory, wanted = run
    torch.testing.assert_close(SnapshotEnsemble.load(directory, lazy if as_function else lazy()).members(X), wanted)


def test_a_run_of_a_module_with_a_loading_of_its_own_resumes(tmp_path):
    def part(stop):
        torch.manual_seed(0)
        model = Resizing()
        if not (tmp_path / "run").exists():
            model.seen = torch.rand(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with SnapshotRun(tmp_path / "run", CosineCycles(lr=0.1, steps=16, cycles=2), model, optimizer) as run:
            while run.updates < stop:
                optimizer.zero_grad()
                model(X).sum().backward()
                optimizer.step()
                run.step()
        return model.seen

    first, again = part(10), part(16)
    assert torch.equal(first, again)


def test_a_part_that_cannot_be_loaded_after_all_is_refused_in_one_line(tmp_path):
    class Strict(Resizing):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    member = Resizing()
    member.seen = torch.ones(4)
    with pytest.raises(DataError, match=r"snapshot-001.safetensors cannot be loaded into Strict: .*size mismatch"):
        SnapshotEnsemble.load(write(tmp_path / "run", member), Strict())


def test_a_function_that_does_not_build_all_anew_is_refused(run):
    one, backbone = net(), nn.Linear(3, 6)
    for build, name in ((lambda: one, "0.weight"), (lambda: nn.Sequential(backbone, *list(net())[1:]), "0.")):
        with pytest.raises(DataError, match=rf"must build all of the model anew, but two have one '{name}"):
            SnapshotEnsemble.load(run[0], build)
    for wrong in (run[0], 3, None):
        with pytest.raises(DataError, match=r"model must be an nn\.Module or a function that builds one, got"):
            SnapshotEnsemble.load(run[0], wrong)
    with pytest.raises(DataError, match=r"must return an nn\.Module, got dict"):
        SnapshotEnsemble.load(run[0], dict)


def test_weights_are_copied_unless_asked_to_be_mapped(run):
    directory, wanted = run
    copied = SnapshotEnsemble.load(directory, net())
    mapped = SnapshotEnsemble.load(directory, net(), mapped=True)
    for index in (1, 2, 3):
        file = directory / f"snapshot-00{index}.safetensors"
        with file.open("r+b") as opened:  # as `rsync --inplace` does
            opened.seek(-64, os.SEEK_END)
            opened.write(np.full(16, 9, np.float32).tobytes())
    torch.testing.assert_close(copied.members(X), wanted)
    assert not torch.equal(mapped.members(X), wanted)


def test_copies_have_the_dtype_of_the_given_model(run):
    directory, wanted = run
    ensemble = SnapshotEnsemble.load(directory, net().double())
    assert {tensor.dtype for tensor in ensemble.parameters()} == {torch.float64}
    torch.testing.assert_close(ensemble.members(X.double()).float(), wanted)


def test_members_are_chosen_by_their_indices_and_a_damaged_one_may_be_left_out(run):
    directory, wanted = run
    torch.testing.assert_close(SnapshotEnsemble.load(directory, net(), members=[3, 1]).members(X), wanted[[2, 0]])
    (directory / "snapshot-002.safetensors").write_bytes(b"?")
    with pytest.raises(StoreError, match=r"snapshot-002.*restore it \(members=\[1, 3\] leaves it out\)$"):
        SnapshotEnsemble.load(directory, net())
    found = SnapshotEnsemble.load([directory, directory], net(), members=[1, 3]).members(X)
    torch.testing.assert_close(found, wanted[[0, 2, 0, 2]])
    with pytest.raises(DataError, match="either last or members must be left out"):
        SnapshotEnsemble.load(directory, net(), members=[1], last=1)


class Returns(nn.Linear):
    def __init__(self, wrap):
        super().__init__(3, 4)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


def model_output(logits):
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=logits)


class Plain:
    def __init__(self, logits):
        self.logits = logits


def in_a_dict(logits):
    return {"hidden": None, "logits": logits}


def in_a_tuple(logits):
    return logits, None


def by_name(outputs):
    return outputs.logits


@pytest.mark.parametrize(
    ("wrap", "cure", "output"),
    [
        (in_a_dict, r"dict: pass output='logits', or another of its keys \['hidden', 'logits'\]", "logits"),
        (in_a_tuple, r"tuple: pass output=0, or another position in 0\.\.1", 0),
        (model_output, r"SequenceClassifierOutput: pass output='logits'", "logits"),
        (Plain, r"Plain: pass output=, the name of the tensor's attribute", "logits"),
        (Plain, r"Plain: pass output=", by_name),
    ],
)
@pytest.mark.parametrize("strategy", ["loop", "stacked"])
def test_what_a_model_returns_is_picked_from_or_refused_naming_output(wrap, cure, output, strategy):
    members = [Returns(wrap) for _ in range(2)]
    with pytest.raises(DataError, match=rf"^the model must return one tensor, got {cure}"):
        SnapshotEnsemble(members)(X)
    ensemble = SnapshotEnsemble(members, output=output, strategy=strategy)
    by_hand = sum(nn.functional.linear(X, m.weight, m.bias).softmax(-1) for m in members) / 2
    torch.testing.assert_close(ensemble(X), by_hand)


@pytest.mark.parametrize("output", ["scores", 7])
def test_an_output_that_there_is_not_is_refused_with_the_keys(output):
    with pytest.raises(DataError, match=rf"output={output!r} must be in what .* dict with keys \['hidden', 'logits'\]"):
        SnapshotEnsemble([Returns(in_a_dict)], output=output)(X)
    with pytest.raises(DataError, match="output= must pick one tensor of what the model returns, got NoneType"):
        SnapshotEnsemble([Returns(in_a_dict)], output="hidden")(X)


@pytest.mark.parametrize("strategy", ["loop", "stacked"])
def test_softmax_is_over_the_axis_of_the_classes_in_segmentation(strategy):
    members = [nn.Conv2d(3, 5, 3, padding=1) for _ in range(2)]
    images = torch.rand(2, 3, 8, 5)
    with pytest.raises(DataError, match=r"shape \(2, 5, 8, 5\) may be its axis 1 or its last: pass axis=1 or axis=-1"):
        SnapshotEnsemble(members, strategy=strategy)(images)
    found = SnapshotEnsemble(members, strategy=strategy, axis=1)(images)
    torch.testing.assert_close(found, sum(member(images).softmax(1) for member in members) / 2)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 8, 5))
    with pytest.raises(DataError, match="already are probabilities"):
        SnapshotEnsemble([nn.Sequential(member, nn.Softmax(1)) for member in members], axis=1)(images)
    with pytest.raises(DataError, match=r"axis must be in -4\.\.3 for outputs of shape .*, got 4"):
        SnapshotEnsemble(members, axis=4)(images)
    with pytest.raises(DataError, match="softmax over one output"):
        SnapshotEnsemble([nn.Conv2d(3, 1, 3)], axis=1)(images)


def test_sequences_of_a_convolution_and_of_a_transformer_are_distinguished_by_axis():
    sequences = torch.rand(2, 3, 7)
    member = nn.Conv1d(3, 7, 1)
    with pytest.raises(DataError, match="pass axis=1 or axis=-1"):
        SnapshotEnsemble([member])(sequences)
    torch.testing.assert_close(SnapshotEnsemble([member], axis=1)(sequences), member(sequences).softmax(1))


def test_one_axis_is_that_of_the_batch_and_refused():
    members = [nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)) for _ in range(2)]  # as `.squeeze(-1)` leaves it
    with pytest.raises(DataError, match=r"\[batch, classes\], got shape \(5,\): pass activation='sigmoid'"):
        SnapshotEnsemble(members)(X)
    torch.testing.assert_close(
        SnapshotEnsemble(members, activation="sigmoid")(X), sum(m(X).sigmoid() for m in members) / 2
    )
    example = nn.Linear(3, 4)
    torch.testing.assert_close(SnapshotEnsemble([example], axis=0)(X[0]), example(X[0]).softmax(0))


OPTIONS = [
    {},
    {"output": "logits", "axis": 1},
    {"activation": "sigmoid"},
    {"activation": torch.tanh, "strategy": "stacked"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("used", [False, True])
def test_it_pickles(run, options, used):
    members = [Returns(in_a_dict) if "output" in options else varied(net()) for _ in range(2)]
    ensemble = SnapshotEnsemble(members, **options)
    if used:
        ensemble(X)
    again = pickle.loads(pickle.dumps(ensemble))
    torch.testing.assert_close(again(X), ensemble(X))
    assert again.strategy == ensemble.strategy


@pytest.mark.exhaustive
def test_a_loaded_ensemble_pickles_for_another_process(run, tmp_path):
    directory, wanted = run
    (tmp_path / "e.pickle").write_bytes(pickle.dumps(SnapshotEnsemble.load(directory, net())))
    code = (
        "import pickle, sys, torch; e = pickle.load(open(sys.argv[1], 'rb'));"
        "print(e(torch.linspace(-2, 2, 15).view(5, 3)).tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "e.pickle"], capture_output=True, text=True, check=True, env=environment
    )
    np.testing.assert_allclose(eval(done.stdout), wanted.mean(0), atol=1e-6)


def test_it_has_a_length_and_yields_its_members(run):
    directory, wanted = run
    ensemble = SnapshotEnsemble.load(directory, net())
    assert len(ensemble) == len(list(ensemble)) == 3
    for member, probabilities in zip(ensemble, wanted, strict=True):
        torch.testing.assert_close(member(X), probabilities)
        np.testing.assert_allclose(member.predict([X]), probabilities, atol=1e-6)
        assert len(member) == 1


def test_predict_gives_the_mean_for_all_of_a_loader(run):
    directory, wanted = run
    ensemble, mean = SnapshotEnsemble.load(directory, net()), wanted.mean(0).numpy()
    dataset = torch.utils.data.TensorDataset(X, torch.arange(5))
    loaders = [
        torch.utils.data.DataLoader(dataset, batch_size=2),
        [X[:3], X[3:]],
        ((x.numpy(), None) for x in X.split(2)),
        X,
        X.numpy(),
    ]
    for loader in loaders:
        found = ensemble.predict(loader)
        assert (type(found), found.dtype) == (np.ndarray, np.float32)
        np.testing.assert_allclose(found, mean, atol=1e-6)
    with pytest.raises(DataError, match="at least one batch, got none"):
        ensemble.predict([])


def test_predict_passes_on_what_a_batch_begins_with():
    class Pair(nn.Linear):
        def forward(self, pair):
            left, right = (pair["left"], pair["right"]) if isinstance(pair, dict) else pair
            return super().forward(left + right)

    member = Pair(3, 4)
    wanted = member((X, X)).softmax(-1).detach().numpy()
    for batch in (((X, X), "labels"), {"left": X, "right": X.numpy()}):
        np.testing.assert_allclose(SnapshotEnsemble([member]).predict([batch]), wanted, atol=1e-6)
