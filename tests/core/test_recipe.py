"""Recipes: what may be in one, what it does to predictions, and what its file gives back."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_expit, log_softmax, logit

from snapcore.ensemble import Cascade, Fitted, Predictions, Recipe, as_recipe, combine, recipe_files
from snapcore.errors import CorruptSnapshotError, DataError, StoreError
from snapcore.store import SnapshotStore, seal

from .predicting import log_probabilities, some_predictions

positive = st.floats(1e-3, 1e3)
weights = st.lists(st.floats(0, 1e3), min_size=1, max_size=6).filter(lambda found: max(found) > 0)


def test_weights_are_shares_whatever_their_scale():
    for scale in (1e-300, 1, 4.0, 1e308):
        assert Recipe((0.25 * scale, 0.75 * scale)).weights == pytest.approx((0.25, 0.75))
    assert Recipe((1.7e308, 1.7e308)).weights == (0.5, 0.5)
    assert Recipe([1, 3]) == Recipe((0.25, 0.75), temperature=np.float64(1))


@pytest.mark.parametrize("wrong", [(), (0.0, 0.0), (1.0, -1.0), (1.0, math.nan), (math.inf, 1.0), ((1.0, 1.0),), 1.0])
def test_weights_that_are_no_shares_are_refused(wrong):
    with pytest.raises(DataError, match="weights must be finite, not negative and not all 0, got"):
        Recipe(wrong)


@pytest.mark.parametrize("temperature", [0, -1, math.inf, math.nan])
def test_a_temperature_is_above_0_and_finite(temperature):
    with pytest.raises(DataError, match=f"temperature must be above 0 and finite, got {temperature}"):
        Recipe((1.0,), temperature)
    with pytest.raises(DataError, match="temperatures must be above 0 and finite"):
        Cascade("margin", 0.5, (1.0, temperature))


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_is_in_0_to_1(threshold):
    with pytest.raises(DataError, match=rf"threshold must be in 0\.\.1, got {threshold}"):
        Cascade("margin", threshold, (1.0,))


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(DataError, match=r"rule must be one of probability, margin, interval, got 'best'"):
        Cascade("best", 0.5, (1.0,))
    with pytest.raises(DataError, match="members must be as many as weights, got 1 and 2"):
        Recipe((1, 1), members=("a",))
    with pytest.raises(DataError, match="a temperature for each of 2 stages, got 3"):
        Recipe((1, 0, 1), cascade=Cascade("margin", 0.5, (1.0, 1.0, 1.0)))


# --- what it does


@given(log_probabilities(), positive)
def test_members_are_pooled_first_and_then_tempered(data, temperature):
    made = Predictions(*data)
    shares = np.arange(1, len(made) + 1)
    pooled = combine(made[:].astype(np.float64), weights=shares, log=True)
    found = Recipe(tuple(shares), temperature).apply(made)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, log_softmax(pooled / temperature, axis=-1), rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**32 - 1), positive)
def test_of_several_labels_each_has_its_own_logit_divided(seed, temperature):
    p = np.random.default_rng(seed).uniform(0.01, 0.99, size=(3, 5, 4))
    made = Predictions.from_probabilities(p, kind="labels")
    expected = log_expit(logit(p.mean(axis=0)) / temperature)
    np.testing.assert_allclose(Recipe((1, 1, 1), temperature).apply(made), expected, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_label_that_is_certain_stays_certain_at_every_temperature(temperature):
    made = Predictions.from_probabilities([[[0.0, 1.0]]], kind="labels")
    np.testing.assert_array_equal(Recipe((1,), temperature).apply(made), [[-math.inf, 0.0]])


def test_values_are_weighed_and_have_no_temperature():
    made = Predictions([[1.0, 2.0], [3.0, 6.0]], kind="values")
    np.testing.assert_allclose(Recipe((1, 3)).apply(made), [2.5, 5.0])
    with pytest.raises(DataError, match="temperature is for probabilities, got predictions of kind 'values'"):
        Recipe((1, 3), 2.0).apply(made)


def test_predictions_of_other_members_are_refused():
    recipe = Recipe((1, 1, 1, 1), members=("a", "b", "c", "d"))
    with pytest.raises(DataError, match="the recipe is for 4 members, got predictions of 3"):
        recipe.apply(some_predictions(3))
    with pytest.raises(DataError, match="for other members, or they have changed since: fit it anew"):
        recipe.apply(some_predictions(4, members=["a", "b", "c", "e"]))
    np.testing.assert_array_equal(  # predictions that do not say whose they are
        recipe.apply(some_predictions(4)), recipe.apply(some_predictions(4, members=["a", "b", "c", "d"]))
    )


# --- the file

recipes = st.builds(
    Recipe,
    weights.map(tuple),
    positive,
    fitted=st.none() | st.builds(Fitted, st.integers(1), st.sampled_from([None, "held-out"]), st.none() | positive),
)


@given(recipes, st.booleans())
@settings(max_examples=40)
def test_a_file_gives_back_the_same_recipe(tmp_path_factory, recipe, cascaded):
    if cascaded:
        stages = sum(weight > 0 for weight in recipe.weights)
        recipe = recipe.with_cascade(Cascade("interval", 0.5, (2.0,) * stages))
    path = tmp_path_factory.mktemp("r") / "recipe.json"
    recipe.save(path)
    assert Recipe.open(path) == recipe
    assert as_recipe(str(path)) == as_recipe(recipe) == recipe


def test_an_altered_recipe_is_refused(tmp_path):
    path = tmp_path / "recipe.json"
    Recipe((1, 3)).save(path)
    path.write_text(path.read_text().replace("0.75", "0.85"))
    with pytest.raises(CorruptSnapshotError, match=r"recipe\.json is not as it was written"):
        Recipe.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seed": 7}, "is not a recipe; snapcore select writes one"),
        ({"format": "snapcore recipe 1", "weights": [0.0]}, "weights must be finite, not negative and not all 0"),
        ({"format": "snapcore recipe 1", "weights": ["a"]}, "Expected `float`"),
        ({"format": "snapcore recipe 1", "weights": [1.0], "more": 1.0}, "more"),
        ({"format": "snapcore recipe 1"}, "weights"),
        (
            {
                "format": "snapcore recipe 1",
                "weights": [1.0],
                "cascade": {"rule": "margin", "threshold": 2.0, "temperatures": [1.0]},
            },
            r"threshold must be in 0\.\.1, got 2\.0",
        ),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, content, message):
    (tmp_path / "recipe.json").write_bytes(seal(content))
    with pytest.raises(CorruptSnapshotError, match=message):
        Recipe.open(tmp_path / "recipe.json")


def test_a_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match="gone does not exist; check the path"):
        Recipe.open(tmp_path / "gone")
    with pytest.raises(StoreError, match=r"none/r could not be written: No such file or directory; choose another"):
        Recipe((1,)).save(tmp_path / "none" / "r")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match=r"loop cannot be read: .*; move it away"):
        Recipe.open(tmp_path / "loop")


# --- the members' files


def write(directory, *, finished=3, unfinished=0, first=1):
    with SnapshotStore(directory, "w") as store:
        for index in range(1, finished + unfinished + 1):
            place = {"index": index, "step": index, "cycle": index - 1, "lr": 0.1, "framework": "numpy"}
            store.save({"w": np.full(3, index + first)}, **place, unfinished=index > finished)
    return directory


def digests(directory):
    return tuple(member.sha256 for member in SnapshotStore(directory).members)


def names(files):
    return [f"{file.parent.name}/{file.name[9:12]}" for file in files]


def test_members_without_a_weight_are_not_even_read(tmp_path):
    run = write(tmp_path / "a", unfinished=1)
    (run / "snapshot-002.safetensors").write_bytes(b"?")
    files, rest = recipe_files(run, Recipe((1, 0, 3), 2.0, members=digests(run)[:3]), framework="numpy")
    assert names(files) == ["a/001", "a/003"]
    assert (rest.weights, rest.temperature, rest.members) == ((0.25, 0.75), 2.0, digests(run)[::2][:2])


def test_a_recipe_is_read_from_its_file_and_names_members_of_several_runs(tmp_path):
    runs = [write(tmp_path / "a"), write(tmp_path / "b", first=7)]
    Recipe((0, 1, 1), members=(digests(runs[0])[0], digests(runs[1])[2], digests(runs[0])[1])).save(tmp_path / "r")
    files, rest = recipe_files(runs, tmp_path / "r", framework="numpy")
    assert names(files) == ["b/003", "a/002"]
    assert rest.weights == (0.5, 0.5)


def test_a_recipe_that_names_no_members_is_for_as_many_as_it_weighs(tmp_path):
    run = str(write(tmp_path / "a"))
    files, rest = recipe_files(run, Recipe((0, 1, 1)), framework="numpy")
    assert names(files) == ["a/002", "a/003"]
    assert rest.members == digests(run)[1:]
    with pytest.raises(DataError, match="the recipe is for 2 members, and there are 3: give its own runs"):
        recipe_files(run, Recipe((1, 1)), framework="numpy")


def test_a_recipe_of_another_run_or_of_members_that_changed_is_refused(tmp_path):
    one, other = write(tmp_path / "a"), write(tmp_path / "b", first=7)
    recipe = Recipe((1, 1, 1), members=digests(one))
    with pytest.raises(DataError, match=r"members that are not in .*b, or have changed since: give its own"):
        recipe_files(other, recipe, framework="numpy")


@pytest.mark.parametrize("options", [{"last": 1}, {"members": [1]}])
def test_a_recipe_says_itself_which_members_are_used(tmp_path, options):
    with pytest.raises(DataError, match="last and members must be left out where there is a recipe"):
        recipe_files(write(tmp_path / "a"), Recipe((1, 1, 1)), framework="numpy", **options)


def test_a_recipe_is_json_for_people(tmp_path):
    Recipe((1, 3), fitted=Fitted(900, "held-out", 0.01), members=("a", "b")).save(tmp_path / "r")
    found = json.loads((tmp_path / "r").read_text())
    assert found.pop("sha256")
    assert found == {
        "format": "snapcore recipe 1",
        "weights": [0.25, 0.75],
        "temperature": 1.0,
        "cascade": None,
        "fitted": {"rows": 900, "split": "held-out", "gain": 0.01, "how": "in-sample", "test": None},
        "members": ["a", "b"],
    }
