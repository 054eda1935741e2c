"""The table of statsmodels: a small file in its format is read, and every other file is refused in one line."""

import os
import sys

import numpy as np
import pytest

from snapcore import DataError
from snapcore.lab.datasets import load_data

HEADER = "mdvis,lncoins,idp,lpi,fmde,physlm,disea,hlthg,hlthf,hlthp"
rng = np.random.default_rng(3)
VISITS = rng.poisson(3, 60)
FEATURES = np.column_stack([rng.normal(size=(60, 8)), np.ones(60)]).round(5)


def lines(visits=VISITS, features=FEATURES):
    rows = zip(visits, features, strict=True)
    return [f"{count},{','.join(f'{value:g}' for value in row)}" for count, row in rows]


def write(folder, *, header=HEADER, rows=None, end="\n"):
    path = folder / "randhie.csv"
    path.write_text(end.join([header, *(lines() if rows is None else rows), ""]), newline="")
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_or_its_folder_is_read_into_four_fifths_and_one_fifth(tmp_path, end):
    path = write(tmp_path, end=end)
    for where in (path, tmp_path):
        data = load_data("randhie", where)
        assert (data.x_train.shape, data.x_test.shape) == ((48, 9), (12, 9))
        assert (data.kind, data.loss, data.n_classes, data.noun) == ("values", "squared-error", 1, "example")
        assert data.x_train.dtype == data.y_train.dtype == np.float32


def test_the_target_is_the_logarithm_of_one_more_visit_standardised_by_the_rows_to_train_on(tmp_path):
    data = load_data("randhie", write(tmp_path))
    assert data.y_train.mean() == pytest.approx(0, abs=1e-6)
    assert data.y_train.std() == pytest.approx(1, abs=1e-6)
    both = np.sort(np.concatenate([data.y_train, data.y_test]).astype(float))
    expected = np.sort(np.log(1.0 + VISITS))
    slope, offset = np.polyfit(both, expected, 1)
    assert slope > 0
    np.testing.assert_allclose(slope * both + offset, expected, atol=1e-6)


def test_each_feature_is_standardised_by_itself_and_one_that_never_changes_is_0(tmp_path):
    data = load_data("randhie", write(tmp_path))
    np.testing.assert_allclose(data.x_train[:, :8].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(data.x_train[:, :8].std(axis=0), 1, atol=1e-5)
    assert not data.x_train[:, 8].any()
    rows = np.concatenate([data.x_train, data.x_test]) * data.std + data.mean
    np.testing.assert_allclose(np.sort(rows, axis=0), np.sort(FEATURES, axis=0), atol=1e-5)


def test_the_split_is_the_same_whatever_the_seed_and_rows_kept_back_come_from_the_training_part(tmp_path):
    path = write(tmp_path)
    whole, split = load_data("randhie", path, seed=1), load_data("randhie", path, held_out=0.25, seed=2)
    np.testing.assert_array_equal(whole.y_test, split.y_test)
    assert (len(split.y_train), len(split.y_held_out)) == (36, 12)
    together = np.concatenate([split.y_train, split.y_held_out])
    np.testing.assert_array_equal(np.sort(together), np.sort(whole.y_train))
    assert split.sha256 == whole.sha256


def test_the_same_table_can_be_trained_with_a_variance(tmp_path):
    assert load_data("randhie", write(tmp_path), loss="gaussian-nll").kind == "gaussian"
    with pytest.raises(DataError, match="labels must be integers"):
        load_data("randhie", write(tmp_path), loss="cross-entropy")


BAD = {
    "another header": ({"header": HEADER.replace("idp", "id")}, "does not begin with mdvis,lncoins"),
    "a column less": ({"header": HEADER.rpartition(",")[0]}, "does not begin with"),
    "a cell less in one row": ({"rows": [*lines(), "1,2,3"]}, "inhomogeneous"),
    "a cell less in every row": ({"rows": [row.rpartition(",")[0] for row in lines()]}, r"got \[60, 9\]"),
    "words": ({"rows": [*lines(), "one," + ",".join("0" * 9)]}, "could not convert"),
    "NaN": ({"rows": [*lines(), "nan," + ",".join("0" * 9)]}, "must be finite"),
    "negative visits": ({"rows": [*lines(), "-1," + ",".join("0" * 9)]}, "mdvis not negative"),
    "no rows": ({"rows": []}, "10 rows or more"),
    "visits that are all the same": ({"rows": lines(np.full(60, 2))}, "mdvis must differ between rows, got 2 in all"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_another_file_is_refused_with_its_path_in_one_line(change, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        load_data("randhie", write(tmp_path, **change))
    assert str(tmp_path / "randhie.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "randhie.csv")
    for where in (tmp_path, "/dev/zero", tmp_path / "nothing"):
        with pytest.raises(DataError, match=r"must be statsmodels' randhie\.csv"):
            load_data("randhie", where)


def test_statsmodels_file_is_found_and_statsmodels_is_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "statsmodels" / "datasets" / "randhie"
    folder.mkdir(parents=True)
    (tmp_path / "statsmodels" / "__init__.py").write_text("raise RuntimeError('imported')")
    write(folder)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "statsmodels", raising=False)
    assert load_data("randhie").x_train.shape == (48, 9)
    assert "statsmodels" not in sys.modules


def test_without_statsmodels_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install statsmodels, or give its randhie\.csv as --data-dir"):
        load_data("randhie")
