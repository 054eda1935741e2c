"""Texts with people's ratings, from an archive in an archive: small ones in the true format, and hostile ones."""

import io
import os
import tarfile
import tracemalloc

import numpy as np
import pytest

from snapcore import DataError
from snapcore.lab.datasets import load_data
from snapcore.lab.datasets import vader as module

TOP = "vaderSentiment-3.3.2"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
rng = np.random.default_rng(8)
RATINGS = {f"{number}_{part}": rng.integers(-4, 5, 20).tolist() for number in range(1, 16) for part in (1, 2)}
TEXTS = {number: f"text {number}: it\u2019s {'good' if sum(given) > 0 else 'bad'}" for number, given in RATINGS.items()}


def tables(ratings=RATINGS):
    """The eight tables, as the archive spells them: tabs, CRLF, sometimes a byte order mark, none at the last end."""
    truth = "\r\n".join(f"{number}\t{np.mean(ratings[number]):.9g}\t{text}" for number, text in TEXTS.items())
    rows = [f"{n}\t{np.mean(given):.9g}\t{np.std(given):.5f}\t{given}" for n, given in reversed(ratings.items())]
    found = {}
    for source in SOURCES:
        found[f"{source}_GroundTruth.txt"] = truth.encode()
        found[f"{source}_anonDataRatings.txt"] = b"\xef\xbb\xbf" + "\r\n".join(rows).encode()
    return found


def packed(files, change=lambda member: None):
    """A gzipped archive of bytes by name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            change(member)
            archive.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return stream.getvalue()


def inner_of(files=None):
    return packed({f"hutto_ICWSM_2014/{name}": content for name, content in (files or tables()).items()})


def sdist(folder, inner=None, **others):
    files = {f"{TOP}/setup.py": b"raise SystemExit", f"{TOP}/{INNER}": inner_of() if inner is None else inner, **others}
    path = folder / f"{TOP}.tar.gz"
    path.write_bytes(packed(files))
    return path


def test_texts_become_vectors_of_length_1_before_they_are_scaled_alike(tmp_path):
    data = load_data("vader", sdist(tmp_path))
    assert (data.kind, data.n_classes, data.noun) == ("gaussian", 1, "example")
    rows = np.concatenate([data.x_train, data.x_test]).astype(float) * data.std + data.mean
    assert rows.shape == (4 * 30, module.FEATURES)
    np.testing.assert_allclose((rows**2).sum(axis=1), 1, rtol=1e-4)
    assert np.isscalar(data.std)


def test_mean_and_spread_are_those_of_the_ratings_joined_by_number(tmp_path):
    rated = module.read_ratings(sdist(tmp_path))
    assert rated.texts == list(TEXTS.values()) * 4
    np.testing.assert_allclose(rated.mean, [np.mean(RATINGS[number]) for number in TEXTS] * 4)
    np.testing.assert_allclose(rated.spread, [np.std(RATINGS[number]) for number in TEXTS] * 4)


def test_documents_are_whole_on_one_side_and_the_spread_is_that_of_the_test_texts(tmp_path):
    data = load_data("vader", sdist(tmp_path))
    given = np.array(list(RATINGS.values())).reshape(15, 2, 20)  # documents of two texts each
    means, spreads = given.mean(axis=2).astype(np.float32), given.std(axis=2)
    assert len(np.unique(means, axis=0)) == 15
    found = data.y_test.reshape(-1, 2)
    assert 0 < len(found) < 2 * 15
    where = [np.flatnonzero((means == pair).all(axis=1)).item() for pair in found]
    np.testing.assert_allclose(data.spread.reshape(-1, 2), spreads[where])


def test_a_folder_that_was_unpacked_is_read_like_the_archive(tmp_path):
    whole = load_data("vader", sdist(tmp_path))
    for folder in (tmp_path / "a" / TOP, tmp_path / "b"):
        (folder / "additional_resources").mkdir(parents=True)
        (folder / INNER).write_bytes(inner_of())
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert load_data("vader", folder).sha256 == whole.sha256


def test_nothing_of_an_archive_is_written(tmp_path, monkeypatch):
    path = sdist(tmp_path)
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    load_data("vader", path)
    assert set(tmp_path.rglob("*")) == before


def linked(kind):
    def change(member):
        if member.name.endswith("tweets_GroundTruth.txt"):
            member.type, member.linkname, member.size = kind, "/etc/passwd", 0

    return packed({f"hutto_ICWSM_2014/{name}": content for name, content in tables().items()}, change)


def changed(name, edit):
    files = tables()
    files[name] = edit(files[name])
    return inner_of(files)


HOSTILE = {
    "a path that leads out": (lambda: packed({"../../evil_GroundTruth.txt": b"x"}), "leads out of the archive"),
    "an absolute path": (lambda: packed({"/etc/evil_GroundTruth.txt": b"x"}), "leads out of the archive"),
    "a symbolic link": (lambda: linked(tarfile.SYMTYPE), "is a link or another thing that is no file"),
    "a hard link": (lambda: linked(tarfile.LNKTYPE), "is a link"),
    "a device": (lambda: linked(tarfile.CHRTYPE), "is a link or another thing"),
    "cut off": (lambda: inner_of()[:-40], "must be the sdist"),
    "no archive": (lambda: b"hello", "must be the sdist"),
    "nothing": (lambda: b"", "must be the sdist"),
    "a table missing": (
        lambda: inner_of({name: table for name, table in tables().items() if name != "tweets_anonDataRatings.txt"}),
        "has no tweets_anonDataRatings.txt",
    ),
    "a column missing": (
        lambda: changed("tweets_GroundTruth.txt", lambda text: text.replace(b"\t", b" ")),
        "tweets_GroundTruth.txt must have 3 columns, got 1",
    ),
    "an empty table": (lambda: changed("tweets_GroundTruth.txt", lambda text: b""), "got no lines"),
    "a text without ratings": (
        lambda: changed("tweets_GroundTruth.txt", lambda text: text + b"\r\n99\t0\tnot rated"),
        "tweets must have ratings for every text, and for no other",
    ),
    "ratings beyond the scale": (
        lambda: changed("tweets_anonDataRatings.txt", lambda text: text.replace(b"[", b"[7, ")),
        r"in -4\.\.4",
    ),
    "ratings that are code": (
        lambda: changed("tweets_anonDataRatings.txt", lambda text: text.replace(b"[", b"[__import__('os'), ")),
        "invalid literal",
    ),
    "no UTF-8": (lambda: changed("tweets_GroundTruth.txt", lambda text: b"\xff" + text), "must be the sdist"),
}


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE)
def test_an_archive_that_is_another_or_hostile_is_refused_in_one_line(make, message, tmp_path):
    path = sdist(tmp_path, make())
    with pytest.raises(DataError, match=message) as caught:
        load_data("vader", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_outer_archive_is_looked_at_in_the_same_way(tmp_path):
    for name in ("../evil", "/evil"):
        with pytest.raises(DataError, match="leads out of the archive"):
            load_data("vader", sdist(tmp_path, None, **{name: b"x"}))
    path = sdist(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"must be the sdist of vaderSentiment 3\.3\.2"):
        load_data("vader", path)
    path.write_bytes(packed({"other/setup.py": b""}))
    with pytest.raises(DataError, match=f"it has 0 files {INNER}"):
        load_data("vader", path)
    with pytest.raises(DataError, match="the folder has 0 files"):
        load_data("vader", tmp_path)


def test_an_archive_that_swells_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LARGEST", 2**20)
    path = sdist(tmp_path, packed({"zeros": bytes(2**24)}))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="unpacks to more than 1048576 bytes"):
            load_data("vader", path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for where in (tmp_path / "pipe", tmp_path / "nothing", "/dev/zero"):
        with pytest.raises(DataError, match="must be the sdist"):
            load_data("vader", where)
    with pytest.raises(DataError, match=r"give that \.tar\.gz as --data-dir"):
        load_data("vader")
