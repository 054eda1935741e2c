"""What a run was asked to do: kept whole, compared, and made into data, a program and a model."""

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import METHODS, DataError, StoreError
from snapcore.lab.job import Job, load_job
from snapcore.lab.sealed import write_sealed

counts = st.integers(1, 10**9)
jobs = st.builds(
    Job,
    backend=st.text(),
    data=st.text(),
    data_dir=st.none() | st.text(),
    model=st.text(),
    method=st.sampled_from(METHODS),
    epochs=counts,
    cycles=counts,
    lr=st.floats(0, 1e6),
    lr_min=st.none() | st.floats(0, 1e6),
    warmup_steps=st.none() | st.integers(0, 10**9),
    remainder=st.none() | st.sampled_from(["paper", "even"]),
    optimizer=st.none() | st.text(),
    momentum=st.none() | st.floats(0, 1),
    weight_decay=st.none() | st.floats(0, 1),
    clip_norm=st.none() | st.floats(0, 1e6),
    precision=st.none() | st.text(),
    device=st.none() | st.text(),
    batch_size=counts,
    seed=st.integers(0, 2**63 - 1),
    train_limit=st.none() | counts,
    data_sha256=st.none() | st.text(),
)
MAY_DIFFER = {"data_dir", "device"}


@given(job=jobs)
@settings(max_examples=30, deadline=None)
def test_a_job_is_read_as_it_was_kept(job, tmp_path_factory):
    directory = tmp_path_factory.mktemp("job") / "run"
    job.save(directory)
    assert load_job(directory) == job
    job.refuse_other(directory)
    assert [path.name for path in directory.iterdir()] == ["job.json"]


@given(asked=jobs, held=jobs)
@settings(max_examples=30, deadline=None)
def test_another_job_is_refused_with_every_value_that_differs_and_no_other(asked, held, tmp_path_factory):
    directory = tmp_path_factory.mktemp("job")
    held.save(directory)
    mine, theirs = msgspec.structs.asdict(asked), msgspec.structs.asdict(held)
    differing = [name for name in mine if mine[name] != theirs[name] and name not in MAY_DIFFER]
    if asked.data_sha256 is None and "data_sha256" in differing:  # it is not known yet what the images are
        differing.remove("data_sha256")
    if differing:
        there, here = ({name: values[name] for name in differing} for values in (theirs, mine))
        with pytest.raises(StoreError) as caught:
            asked.refuse_other(directory)
        expected = "on other images than" if differing == ["data_sha256"] else f"with {there}, asked for {here}:"
        assert f"holds a run {expected}" in str(caught.value)
    else:
        assert asked.refuse_other(directory).keys() <= MAY_DIFFER


@pytest.mark.parametrize("keep", [0, 1, 40, -2])
def test_a_job_that_was_cut_off_is_refused_with_the_cure(keep, tmp_path):
    Job(backend="torch").save(tmp_path)
    (tmp_path / "job.json").write_bytes((tmp_path / "job.json").read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"job\.json is damaged: .*; restore it, or move .* away"):
        load_job(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"epochs": 0}, "epochs"), ({"lr": None}, "lr"), ({"seed": -1}, "seed"), ({"more": 1}, "more")],
)
def test_a_job_with_values_that_no_command_gives_is_refused(change, message, tmp_path):
    values = {**msgspec.structs.asdict(Job(backend="torch")), **change}
    write_sealed(tmp_path / "job.json", values)
    with pytest.raises(StoreError, match=message):
        load_job(tmp_path)


def test_a_job_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "job.json").mkdir()
    with pytest.raises(StoreError, match="is not a regular file"):
        load_job(tmp_path)


def test_the_split_of_the_digits_is_the_same_whatever_the_seed():
    datasets = [Job(backend="torch", seed=seed).dataset() for seed in (0, 1, 12345)]
    for name in ("x_train", "y_train", "x_test", "y_test"):
        for other in datasets[1:]:
            assert np.array_equal(getattr(datasets[0], name), getattr(other, name)), name


@given(seed=st.integers(0, 2**40), start=st.integers(0, 60), length=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_batches_is_a_function_of_the_seed_and_the_step(seed, start, length):
    job = Job(backend="torch", seed=seed)
    dataset = DIGITS
    whole = job.training_data(dataset).indices(0, start + length)
    assert np.array_equal(job.training_data(dataset).indices(start, start + length), whole[start:])
    other = msgspec.structs.replace(job, seed=seed + 1)
    assert not np.array_equal(other.training_data(dataset).indices(0, start + length), whole)


@pytest.mark.parametrize(("batch_size", "updates"), [(64, 21), (1347, 1), (1, 1347), (1000, 1)])
def test_an_epoch_is_the_whole_batches_of_one_pass(batch_size, updates):
    job = Job(backend="torch", batch_size=batch_size, epochs=7, cycles=1)
    data = job.training_data(DIGITS)
    assert job.program(data).updates == 7 * updates
    used = data.indices(0, updates).ravel()
    assert len(used) == len(set(used)) == updates * batch_size


DIGITS = Job(backend="torch").dataset()


def test_a_model_is_the_name_of_a_built_in_or_the_function_that_is_named():
    assert Job(backend="torch", model="cnn").resolved_model() == "cnn"
    assert Job(backend="torch", model="dataclasses:replace").resolved_model() is dataclasses.replace
    with pytest.raises(DataError, match="must name a function"):
        Job(backend="torch", model="dataclasses:MISSING").resolved_model()
