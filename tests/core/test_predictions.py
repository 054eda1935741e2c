"""Predictions, made once and kept: what may be in them, what is refused, and what a file gives back."""

import json
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import norm

from snapcore.diversity import ambiguity, correlation, disagreement, double_fault
from snapcore.ensemble import (
    MemberSequence,
    Predictions,
    combine,
    fit_temperature,
    fit_weights,
    prefix_curve,
    score_predictions,
    select,
    uncertainty,
)
from snapcore.errors import CorruptSnapshotError, DataError, StoreError
from snapcore.metrics import crps, rmse, score
from snapcore.store import write_tensor_file

from .predicting import log_probabilities, some_logs, some_predictions

KINDS = ["classes", "labels", "values", "gaussian", "tokens"]


def of_kind(kind, *, examples=9, n_members=4, seed=3, **options):
    """Predictions of any kind with labels; tokens are classes whose labels are partly ignored."""
    rng = np.random.default_rng(seed)
    if kind == "classes":
        return some_predictions(n_members, examples, seed=seed, **options)
    if kind == "labels":
        p = rng.random((n_members, examples, 3))
        return Predictions.from_probabilities(p, rng.integers(2, size=(examples, 3)), kind=kind, **options)
    if kind == "tokens":
        labels = rng.integers(4, size=(examples, 5))
        labels[:, 3:] = -100
        p = rng.dirichlet(np.ones(4), size=(n_members, examples, 5))
        return Predictions.from_probabilities(p, labels, ignore=-100, **options)
    targets = rng.normal(size=examples)
    means = targets + rng.normal(size=(n_members, examples))
    if kind == "values":
        return Predictions(means, targets, kind=kind, **options)
    return Predictions(np.stack([means, rng.uniform(0.5, 2, means.shape)], -1), targets, kind=kind, **options)


# --- what they are


def test_predictions_are_a_sequence_of_members():
    logs, labels = some_logs()
    made = Predictions(logs, labels)
    assert isinstance(made, MemberSequence)
    assert (len(made), made.shape, made.examples, made.rows) == (4, (4, 30, 3), 30, 30)
    assert [member.dtype for member in made] == [np.float32] * 4
    np.testing.assert_array_equal(made[2], logs[2].astype(np.float32))
    np.testing.assert_array_equal(made[-1], made[3])
    np.testing.assert_array_equal(made.labels, labels)
    with pytest.raises(IndexError):
        made[4]


def test_float32_is_taken_as_it_is():
    logs = some_logs()[0].astype(np.float32)
    assert np.shares_memory(Predictions(logs)[:], logs)


def test_probabilities_are_taken_as_their_logarithms_and_0_as_minus_infinity():
    made = Predictions.from_probabilities([[[0.75, 0.25], [1.0, 0.0]]])
    np.testing.assert_allclose(made[0], [[math.log(0.75), math.log(0.25)], [0.0, -math.inf]], rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_all_examples_in_their_order(kind):
    made = of_kind(kind, examples=20_000 if kind == "classes" else 300)
    found = [(rows, block) for rows, block in made.blocks()]
    np.testing.assert_array_equal(np.concatenate([block for _, block in found], axis=1), made[:].astype(np.float64))
    assert found[0][1].dtype == np.float64
    assert len(found) == (2 if kind == "classes" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_some_of_the_examples_keep_all_that_is_known_of_them(kind):
    made = of_kind(kind, split="held-out", data="d", members=list("abcd"))
    some = made.take([5, 2])
    np.testing.assert_array_equal(some[:], made[:][:, [5, 2]])
    np.testing.assert_array_equal(some.labels, made.labels[[5, 2]])
    assert (some.kind, some.ignore, some.split, some.data, some.members) == (
        made.kind,
        made.ignore,
        "held-out",
        "d",
        ("a", "b", "c", "d"),
    )
    assert Predictions(made[:], kind=made.kind).take([0]).labels is None


# --- what is refused


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([[[0.0, -1.0]]], {"kind": "class"}, r"kind must be one of classes, labels, values, gaussian, got 'class'"),
        ([[0.0]], {"kind": "values", "ignore": 3}, "ignore is for classes alone, got it with kind='values'"),
        ([[0.0, -1.0]], {}, r"must be \[members, examples, classes\] or have more axes .*, got shape \(1, 2\)"),
        ([0.0], {"kind": "values"}, r"must be \[members, examples\] or have more axes"),
        ([[1.0, 2.0]], {"kind": "gaussian"}, r"must be \[members, examples, 2\] or have more"),
        (np.empty((3, 0, 5)), {}, r"at least one member and one example are required, got shape \(3, 0, 5\)"),
        (np.empty((0, 3, 5)), {}, r"at least one member and one example are required"),
        (np.ones((2, 3, 3)), {"kind": "gaussian"}, r"end in an axis of 2, mean and variance, got shape \(2, 3, 3\)"),
        ([[["a"]]], {}, "must be real numbers, got dtype <U1"),
        ([[[0j]]], {}, "must be real numbers, got dtype complex128"),
        ([[[math.inf], [1.0]]], {"kind": "values"}, r"member \[0\] must hold finite values, got inf at \[0, 0\]"),
        ([[[1.0, 2.0], [1.0, 0.0]]], {"kind": "gaussian"}, r"member \[0\] must hold variances above 0 .* at \[1\]"),
        ([[[0.0, 0.1]]], {"kind": "labels"}, r"member \[0\] must hold log-probabilities, at most 0 .*, got 0\.1 at"),
    ],
)
def test_what_are_no_predictions_is_refused(values, options, message):
    with pytest.raises(DataError, match=message):
        Predictions(values, **options)


def test_members_of_other_class_counts_are_refused():
    with pytest.raises(
        DataError, match=r"^members must have one shape: .*predict the same examples with each$"
    ) as caught:
        Predictions([np.log(np.full((4, 2), 0.5)), np.log(np.full((4, 5), 0.2))])
    assert "\n" not in str(caught.value)


def test_nan_in_one_member_is_refused_by_member_and_position_wherever_it_is():
    logs, _ = some_logs(3, 20_000)
    logs[1, 15_000, 2] = math.nan
    with pytest.raises(DataError, match=r"^member \[1\] must hold log-prob.* not NaN, got nan at \[15000, 2\]$"):
        Predictions(logs)


def test_rows_that_do_not_sum_to_1_are_refused_and_those_of_logits_too():
    logs, _ = some_logs()
    logs[2, 7] += -0.1
    with pytest.raises(DataError, match=r"member \[2\] must hold rows .*, which sum to 1: off by 0\.095 at \[7\]"):
        Predictions(logs)
    assert len(Predictions(logs, tolerance=0.1)) == 4
    with pytest.raises(DataError, match=r"member \[0\] must hold log-probabilities, at most 0"):
        Predictions(np.random.default_rng(0).normal(size=(2, 5, 3)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_may_be_off_by_what_it_rounds(dtype):
    p = np.random.default_rng(1).dirichlet(np.ones(10), size=(2, 50))
    assert Predictions(np.log(p).astype(dtype))[0].dtype == np.float32
    assert Predictions.from_probabilities(p.astype(dtype))[0].dtype == np.float32
    with pytest.raises(DataError, match="sum to 1"):
        Predictions(np.log(0.9 * p).astype(dtype))


@pytest.mark.parametrize("value", [-0.5, 1.5, math.nan])
def test_what_are_no_probabilities_is_refused(value):
    with pytest.raises(DataError, match=r"probabilities must be finite and in 0\.\.1; give outputs through softmax"):
        Predictions.from_probabilities([[[value, 0.5]]])


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("classes", [0, 1], r"labels must have shape \(9,\) for predictions \(9, 3\), got \(2,\)"),
        ("classes", np.zeros(9), "labels must be integers, got dtype float64"),
        ("classes", [0] * 8 + [3], r"labels must be in 0\.\.2, got 3 at \[8\]; ignore= names"),
        ("classes", [-1] + [0] * 8, r"got -1 at \[0\]"),
        ("labels", np.full((9, 3), 2), "labels must be 0 or 1"),
        ("labels", np.zeros(9), r"shape \(9, 3\)"),
        ("values", [math.nan] * 9, "labels must be finite real numbers; leave examples without a target out"),
        ("gaussian", ["a"] * 9, "labels must be finite real numbers"),
        ("gaussian", np.zeros((9, 2)), r"shape \(9,\)"),
        ("tokens", np.full((9, 5), -100), "at least one label must count, got ignore=-100 alone"),
        ("tokens", np.full((9, 5), -1), r"labels must be in 0\.\.3, got -1 at \[0, 0\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(kind, labels, message):
    made = of_kind(kind)
    with pytest.raises(DataError, match=message):
        Predictions(made[:], labels, kind=made.kind, ignore=made.ignore)


def test_digests_must_name_each_member():
    with pytest.raises(DataError, match="members must name each of the 4 members, got 1"):
        Predictions(some_logs()[0], members=["a"])


@pytest.mark.parametrize(
    "asked",
    [
        lambda made: made.rows,
        lambda made: made.labels_of(slice(None)),
        Predictions.log_likelihood,
        prefix_curve,
        score_predictions,
        select,
        fit_weights,
        fit_temperature,
    ],
)
def test_labels_that_are_missing_are_asked_for(asked):
    with pytest.raises(DataError, match="labels are missing: give"):
        asked(Predictions(some_logs()[0]))


# --- the file


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_back_what_was_saved(tmp_path, kind):
    made = of_kind(kind, split="held-out", data="digest of it", members=list("abcd"))
    made.save(tmp_path / "p.safetensors")
    found = Predictions.open(str(tmp_path / "p.safetensors"))
    np.testing.assert_array_equal(found[:], made[:])
    np.testing.assert_array_equal(found.labels, made.labels)
    assert (found.kind, found.ignore, found.split, found.data, found.members) == (
        made.kind,
        made.ignore,
        "held-out",
        "digest of it",
        tuple("abcd"),
    )
    assert not found[0].flags.writeable  # it is the file's own memory


@given(log_probabilities())
@settings(max_examples=20)
def test_every_bit_survives_the_file_impossible_labels_too(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("p") / "p.safetensors"
    Predictions(*data).save(path)
    np.testing.assert_array_equal(Predictions.open(path)[:], data[0])


def test_labels_may_be_left_out_of_a_file_and_numpy_numbers_kept_in_it(tmp_path):
    Predictions(some_logs()[0], ignore=np.int64(-100)).save(tmp_path / "p")
    found = Predictions.open(tmp_path / "p")
    assert (found.labels, found.ignore, found.members) == (None, -100, None)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"gone does not exist; check the path"):
        Predictions.open(tmp_path / "gone")


def test_another_file_is_not_taken_for_predictions(tmp_path):
    write_tensor_file(tmp_path / "w", {"w": np.ones(3)}, {})
    with pytest.raises(CorruptSnapshotError, match="does not hold predictions: it says None"):
        Predictions.open(tmp_path / "w")
    (tmp_path / "t").write_text("no tensors")
    with pytest.raises(CorruptSnapshotError, match="t is not what was written"):
        Predictions.open(tmp_path / "t")


def test_every_altered_byte_is_noticed(tmp_path):
    path = tmp_path / "p"
    some_predictions(2, 3).save(path)
    content = path.read_bytes()
    for position in range(-1, -2 * 3 * 3 * 4 - 3 * 8 - 1, -7):  # all that is numbers
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CorruptSnapshotError, match="its SHA-256 is another; make it anew"):
            Predictions.open(path)


FACTS = {"kind": "classes", "ignore": None, "split": None, "data": None, "members": None}


@pytest.mark.parametrize(
    "facts",
    [[], {"kind": "classes"}, *({**FACTS, **other} for other in ({"more": 1}, {"ignore": "x"}, {"members": "m"}))],
)
def test_facts_that_another_version_wrote_are_refused(tmp_path, facts):
    from snapcore.ensemble.predictions import _FORMAT, _digest

    tensors = {"predictions": np.zeros((1, 1, 1), np.float32)}
    metadata = {"format": _FORMAT, "facts": json.dumps(facts)}
    write_tensor_file(tmp_path / "p", tensors, {**metadata, "sha256": _digest(tensors, metadata)})
    with pytest.raises(CorruptSnapshotError, match=r"is not what was written: .*; make it anew"):
        Predictions.open(tmp_path / "p")


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/p could not be written, which needs 1680 bytes: .*; choose another"):
        some_predictions().save(tmp_path / "file" / "p")
    with pytest.raises(StoreError, match="could not be written"):
        some_predictions().save(tmp_path / "none" / "p")


def test_a_name_of_the_data_that_no_reader_would_take_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(StoreError, match="are too long for one file"):
        some_predictions(data="x" * 2**25).save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


# --- together


@given(log_probabilities())
def test_predictions_are_combined_in_log_space_without_being_asked(data):
    logs, labels = data
    expected = combine(logs.astype(np.float64), log=True)
    np.testing.assert_allclose(combine(Predictions(logs, labels)), expected, rtol=1e-6, atol=1e-7)


def test_last_and_weights_are_those_of_any_members():
    made = some_predictions()
    expected = combine(made[:], last=2, weights=[1, 3], log=True)
    np.testing.assert_allclose(combine(made, last=2, weights=[1, 3]), expected, rtol=1e-6)
    for options in ({"last": 5}, {"last": 0}, {"weights": [1, 1]}, {"weights": [0] * 4}):
        with pytest.raises(DataError):
            combine(made, **options)


def test_values_are_averaged_and_gaussian_members_make_a_mixture():
    made = of_kind("values")
    np.testing.assert_allclose(combine(made, weights=[1, 0, 2, 1]), np.average(made[:], 0, [1, 0, 2, 1]), rtol=1e-6)
    made = of_kind("gaussian")
    mean, variance = np.moveaxis(made[:].astype(np.float64), -1, 0)
    expected = [mean.mean(0), variance.mean(0) + mean.var(0)]  # the law of total variance
    np.testing.assert_allclose(np.moveaxis(combine(made), -1, 0), expected, rtol=1e-6)


def test_the_mixtures_moments_are_those_of_its_draws():
    made = Predictions([[[0.0, 1.0]], [[4.0, 0.25]]], kind="gaussian")
    rng = np.random.default_rng(0)
    draws = np.where(rng.random(10**6) < 0.5, rng.normal(size=10**6), rng.normal(4.0, 0.5, size=10**6))
    np.testing.assert_allclose(combine(made)[0], [draws.mean(), draws.var()], rtol=0.01)


# --- scores of every kind


@given(log_probabilities())
def test_the_curve_of_predictions_is_that_of_their_logarithms(data):
    logs, labels = data
    found, expected = prefix_curve(Predictions(logs, labels)), prefix_curve(logs.astype(np.float64), labels, log=True)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


def test_labels_are_not_given_twice():
    made = some_predictions()
    with pytest.raises(DataError, match="labels must be left out: predictions have their own"):
        prefix_curve(made, made.labels)


def as_classes(made, member=None):
    """What is known of tokens, or of yes and no, as rows of classes."""
    p = np.exp(made[:].astype(np.float64)).mean(axis=0)
    if made.kind == "labels":
        return np.stack([1 - p, p], -1).reshape(-1, 2), made.labels.ravel()
    counts = made.labels != -100
    return p[counts], made.labels[counts]


@pytest.mark.parametrize("kind", ["labels", "tokens"])
def test_several_labels_and_tokens_are_scored_label_by_label(kind):
    made = of_kind(kind)
    expected = score(*as_classes(made))
    assert score_predictions(made) == pytest.approx(expected, rel=1e-6)
    curve = prefix_curve(made)
    assert curve[-1] == {"m": 4, **curve[-1]}
    assert curve[-1]["nll"] == pytest.approx(expected["nll"], rel=1e-6)
    assert curve[0]["error"] == pytest.approx(score_predictions(made, weights=[0, 0, 0, 1])["error"])
    assert made.rows == 27


def test_a_block_whose_labels_are_all_ignored_counts_nothing():
    logs, labels = some_logs(2, 30_000)
    labels[:20_000] = -100
    found = score_predictions(Predictions(logs, labels, ignore=-100))
    assert found == pytest.approx(score_predictions(Predictions(logs[:, 20_000:], labels[20_000:])))


def test_values_are_scored_by_their_mean():
    made = of_kind("values")
    expected = rmse(made[:].mean(axis=0), made.labels)
    assert score_predictions(made) == {"rmse": pytest.approx(expected, rel=1e-6)}
    assert prefix_curve(made)[-1] == {"m": 4, "rmse": pytest.approx(expected, rel=1e-6)}


def test_gaussian_members_are_scored_as_the_mixture_they_are():
    made = of_kind("gaussian")
    weights = np.array([0.1, 0.2, 0.0, 0.7])
    mean, variance = np.moveaxis(made[:].astype(np.float64), -1, 0)
    density = weights @ norm.pdf(made.labels, mean, np.sqrt(variance))
    expected = {
        "rmse": rmse(weights @ mean, made.labels),
        "nll": -np.log(density).mean(),
        "crps": crps(mean, variance, made.labels, weights=weights),
    }
    assert score_predictions(made, weights=7 * weights) == pytest.approx(expected, rel=1e-9)
    assert prefix_curve(made)[0] == {"m": 1, **score_predictions(made, weights=[0, 0, 0, 1])}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [score_predictions, uncertainty])
def test_weights_that_do_not_fit_the_members_are_refused(kind, asked):
    for weights in ([1, 1], [1] * 5, [0] * 4, [-1, 1, 1, 1], [math.nan, 1, 1, 1]):
        with pytest.raises(DataError, match="weights must"):
            asked(of_kind(kind), weights=weights)


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_no_temperature_but_a_positive_number_is_taken(temperature):
    with pytest.raises(DataError, match="temperature must be above 0 and finite"):
        score_predictions(of_kind("classes"), temperature=temperature)


@pytest.mark.parametrize("kind", ["values", "gaussian"])
def test_values_have_no_temperature(kind):
    with pytest.raises(DataError, match=f"temperature is for probabilities, got predictions of kind '{kind}'"):
        score_predictions(of_kind(kind), temperature=2.0)


def test_plain_values_have_no_likelihood():
    with pytest.raises(DataError, match="plain values have no likelihood: use kind='gaussian'"):
        of_kind("values").log_likelihood()


def test_a_likelihood_is_that_of_each_label_under_each_member():
    made = of_kind("labels")
    p = np.exp(made[:].astype(np.float64))
    expected = np.log(np.where(made.labels, p, 1 - p)).reshape(4, -1)
    np.testing.assert_allclose(made.log_likelihood(), expected, rtol=1e-5)
    made = of_kind("gaussian")
    mean, variance = np.moveaxis(made[:].astype(np.float64), -1, 0)
    np.testing.assert_allclose(made.log_likelihood(), norm.logpdf(made.labels, mean, np.sqrt(variance)))
    made = of_kind("tokens")
    counts = np.argwhere(made.labels != -100)
    expected = [[made[m][i, j, made.labels[i, j]] for i, j in counts] for m in range(4)]
    np.testing.assert_array_equal(made.log_likelihood(), expected)


# --- memory


MEMORY = {
    "curve": prefix_curve,
    "select": select,
    "weights": fit_weights,
    "temperature": fit_temperature,
    "uncertainty": uncertainty,
    "combine": combine,
    "correlation": correlation,
    "disagreement": disagreement,
    "double fault": double_fault,
    "ambiguity": ambiguity,
    "ambiguity of Brier": lambda made: ambiguity(made, score="brier"),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Ten members, 10,000 examples and 100 classes, in a file: 40 MB."""
    path = tmp_path_factory.mktemp("large") / "p.safetensors"
    some_predictions(10, 10_000, 100).save(path)
    return Predictions.open(path)


@pytest.mark.parametrize("what", MEMORY)
def test_about_one_member_is_in_memory_beyond_the_file(large, what):
    tracemalloc.start()
    MEMORY[what](large)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6, f"{peak / 1e6:.1f} MB"


@pytest.mark.parametrize("kind", ["values", "gaussian"])
def test_values_are_scored_with_little_memory_beyond_the_file(tmp_path, kind):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(10, 500_000)).astype(np.float32)
    made = values if kind == "values" else np.stack([values, np.ones_like(values)], -1)[:, :250_000]
    Predictions(made, rng.normal(size=made.shape[1]), kind=kind).save(tmp_path / "p.safetensors")
    found = Predictions.open(tmp_path / "p.safetensors")
    tracemalloc.start()
    score_predictions(found, weights=[0] * 7 + [1, 2, 3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6, f"{peak / 1e6:.1f} MB"


def test_values_in_many_blocks_are_scored_as_a_whole():
    rng = np.random.default_rng(1)
    values, weights = rng.normal(size=(3, 50_000, 2)), np.array([0.5, 0.0, 0.5])
    values[..., 1] = np.exp(values[..., 1])
    targets = rng.normal(size=50_000)
    made = Predictions(values, targets, kind="gaussian")
    mean, variance = np.moveaxis(made[:].astype(np.float64), -1, 0)
    logs = norm.logpdf(targets, mean, np.sqrt(variance))
    assert len([*made.blocks()]) > 1
    assert score_predictions(made, weights=weights) == pytest.approx(
        {
            "rmse": rmse(weights @ mean, targets),
            "nll": -np.mean(np.logaddexp(logs[0], logs[2]) - np.log(2)),
            "crps": crps(mean, variance, targets, weights=weights),
        },
        rel=1e-12,
    )


def test_a_file_that_save_wrote_is_told_from_others(tmp_path):
    ours, other = tmp_path / "ours", tmp_path / "other"
    Predictions(np.zeros((1, 2, 1))).save(ours)
    other.write_bytes(b"somebody's")
    assert Predictions.is_kept_in(ours)
    assert not Predictions.is_kept_in(other)
    assert not Predictions.is_kept_in(tmp_path / "nothing")
