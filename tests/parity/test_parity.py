"""Every framework does one job as the oracle of its rule does it, update by update."""

from pathlib import Path

import pytest

from .frameworks import FRAMEWORKS, done
from .job import BOUNDS, JOBS, Course, deviations, expected
from .table import table

pytestmark = pytest.mark.xdist_group("parity")  # every job is done once
PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
QUANTITIES = ("loss", "weights", "ensembles")


@pytest.fixture(scope="module", params=[(name, model) for name in FRAMEWORKS for model in JOBS], ids=" ".join)
def way(request):
    """A framework and a job."""
    name, model = request.param
    return FRAMEWORKS[name], JOBS[model]


@pytest.fixture
def course(way) -> Course:
    return done(*way)


@pytest.fixture
def apart(way, course):
    framework, job = way
    return deviations(course, expected(job, framework.rule, framework.ddof))


def test_every_update_is_done_at_the_rate_of_equation_2(apart):
    assert apart["rate used"] <= BOUNDS["rate used"]


def test_the_frameworks_own_schedule_names_the_rate_of_equation_2(apart):
    assert apart["rate of the schedule"] <= BOUNDS["rate of the schedule"]


def test_losses_are_the_oracles_update_by_update(apart):
    assert apart["loss"] <= BOUNDS["loss"]


def test_the_loss_of_every_update_is_the_oracles_at_the_weights_it_began_with(apart):
    assert apart["loss at its own weights"] <= BOUNDS["loss at its own weights"]


def test_snapshots_are_taken_at_the_same_updates(way, course):
    assert course.steps == (58, 116, 174, 230)


def test_weights_at_every_snapshot_are_the_oracles(apart):
    assert apart["weights"] <= BOUNDS["weights"]


def test_batch_statistics_at_every_snapshot_are_the_oracles(apart):
    assert apart.get("batch statistics", 0) <= BOUNDS["batch statistics"]


def test_members_and_ensembles_give_the_oracles_probabilities(apart):
    assert apart["members"] <= BOUNDS["members"]
    assert apart["ensembles"] <= BOUNDS["ensembles"]


def test_the_table_of_errors_is_the_oracles_within_two_examples(apart):
    assert apart["errors"] <= BOUNDS["errors"]


def test_a_frameworks_momentum_is_not_that_of_the_other_rule(way, course):
    framework, job = way
    (other,) = {"updates", "gradients"} - {framework.rule}
    wrong = deviations(course, expected(job, other, framework.ddof))
    assert all(wrong[quantity] > BOUNDS[quantity] for quantity in QUANTITIES)


@pytest.mark.parametrize("model", JOBS)
def test_the_page_keeps_this_table_but_for_its_numbers(model):
    kept, now = PAGE.read_text(encoding="utf-8").splitlines(), table(JOBS[model])
    position = kept.index(now[0])
    was = kept[position : position + len(now)]
    assert _cells(was[1]) == _cells(now[1])
    assert [_cells(line)[:2] for line in was] == [_cells(line)[:2] for line in now]


def _cells(line):
    return [cell.strip() for cell in line.split("|")]
