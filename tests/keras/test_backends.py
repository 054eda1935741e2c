"""The callback does the same on each of Keras' backends: what a script saw that fits on one of them."""

import pytest

pytestmark = pytest.mark.xdist_group("keras backends")  # each is run once
BACKENDS = ("tensorflow", "jax", "torch")


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["schedule", "plain"])
def test_members_and_rates_are_the_same_on_every_backend(seen, backend, mode, formula):
    """The rates differ by the backend in Keras' CosineDecayRestarts."""
    found = seen[backend][mode]
    assert seen[backend]["backend"] == backend
    assert found["steps"][0] == [8, 16, 24]
    assert found["same"]  # as a plain callback sees them
    assert found["rates"][0] == pytest.approx([formula(step) for step in range(24)], abs=4e-7 * 0.02, rel=0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plain_rate_may_have_run_after_run_of_whatever_cycles(seen, backend, formula):
    found = seen[backend]["plain"]
    assert found["steps"][1] == [12, 24]
    expected = [formula(step, cycles=2) for step in range(24)]
    assert found["rates"][1] == pytest.approx(expected, abs=4e-7 * 0.02, rel=0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bare_schedule_counts_the_updates_that_gradients_are_accumulated_to(seen, backend, formula):
    expected = [formula(step) for step in range(24)]
    assert seen[backend]["accumulated"] == pytest.approx(expected, abs=4e-7 * 0.02, rel=0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_fit_builds_is_followed_from_its_first_batch(seen, backend):
    assert seen[backend]["unbuilt"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_do_not_have_the_rounding_of_half_floats(seen, backend):
    assert max(seen[backend]["half"]) < 4e-7  # that of bfloat16 is 2e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_resumes_at_its_own_point_to_the_last_bit(seen, backend):
    assert seen[backend]["own"] == {"batches": 12, "same": True}  # killed at 20, resumed after 12 of 24


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_resumes_where_backup_and_restore_does(seen, backend):
    """Killed at 17, with a backup after 12: the member of 16 is taken again."""
    assert seen[backend]["beside"] == {"batches": 12, "same": True}


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_is_looked_at_at_boundaries_alone(seen, backend):
    """Before training, and then once for each of three members."""
    assert seen[backend]["looks"] == [2, 2 + 3]


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_batches_to_an_execution_move_no_snapshot(seen, backend):
    assert seen[backend]["at once"] == [8, 16, 24]


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lone_callback_needs_no_list(seen, backend):
    assert seen[backend]["alone"] == [8, 16, 24]


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "epochs", "updates"),
    [
        ("ends between epochs", 4, 24),
        ("ends within one", 4, 21),
        ("accumulates", 7, 21),
        ("restarts", 4, 21),
        ("steps by itself", 16, 24),
        ("is changed after", 4, 24),
    ],
)
def test_a_callback_that_is_called_at_batches_ends_in_other_threads_does_the_same(seen, backend, name, epochs, updates):
    assert seen[backend]["unwatched"][name] == [[*range(epochs)], updates, True]


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_dies_between_a_batch_and_the_next_has_its_member(seen, backend):
    assert seen[backend]["unwatched"]["dies"] == [[8, 16], [8, 16, 24]]


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_continues_when_the_update_that_should_have_been_the_last_is_skipped(seen, backend):
    assert seen[backend]["unwatched"]["skips"] == [[8, 16, 24], [3, 4], 29]


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_that_keras_puts_in_at_the_end_are_not_resumed_from_on_any_backend(seen, backend):
    assert seen[backend]["averages"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_what_recurrent_layers_keep_from_batch_to_batch_is_resumed_on_every_backend_that_trains_them(seen, backend):
    assert seen[backend]["recurrent"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS)
def test_members_are_handed_over_with_their_metrics_on_every_backend(seen, backend):
    assert seen[backend]["handed over"] == [[8, 16, 24], [{"seen": 1.0}, {"seen": 2.0}, {"seen": 3.0}]]
