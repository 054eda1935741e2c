"""Short texts, each rated by some twenty people: what the sdist of PyPI's vaderSentiment 3.3.2 holds.

Its folder `additional_resources` has an archive with 23,703 texts from four sources. None of its code is executed, and
nothing is unpacked to disk.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from snapcore.errors import DataError
from snapcore.lab.datasets.arrays import Arrays, scikit_learn, seeded_raw
from snapcore.lab.files import open_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEATURES = 1024
"""How many columns words and pairs of words are hashed to."""

_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_SOURCES = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
_LARGEST = 2**26  # bytes of an archive, unpacked; the outer one has 3 million, the inner one 6
_UNREADABLE = (OSError, EOFError, zlib.error, tarfile.TarError, ValueError)
_CURE = "fetch its .tar.gz from PyPI again"


class Rated(NamedTuple):
    """Texts, and what people said of them, from −4 (most negative) to 4.

    Attributes:
        documents: what each text is a part of, such as a review; [n].
        texts: [n].
        mean: of each text's ratings, [n].
        spread: their standard deviation, [n].
    """

    documents: list[str]
    texts: list[str]
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]


def read_vader(path: Path) -> Arrays:
    """Return texts as signed counts of hashed words and pairs, each text's of length 1, and the mean of its ratings.

    About a fifth is for testing, whole documents at a time: no two parts share a review or an article.

    Arguments:
        path: the sdist, `vaderSentiment-3.3.2.tar.gz`, or the folder that it was unpacked to.

    Raises:
        DataError: it is neither, or scikit-learn is not installed.
    """
    rated = read_ratings(path)
    hashing = scikit_learn("feature_extraction.text", "vader").HashingVectorizer
    counts = hashing(n_features=FEATURES, ngram_range=(1, 2), norm=None, dtype=np.float32).transform(rated.texts)
    x = np.asarray(counts.toarray(), np.float64)
    x = (x / np.maximum(np.sqrt((x**2).sum(axis=1, keepdims=True)), 1)).astype(np.float32)  # the same everywhere
    _, document = np.unique(rated.documents, return_inverse=True)
    test = (seeded_raw(int(document.max()) + 1) % np.uint64(5) == 0)[document]
    if test.all() or not test.any():
        raise DataError(f"{path}: texts must be of several documents, got {len(set(rated.documents))}: {_CURE}")
    return Arrays(
        x[~test], rated.mean[~test], x[test], rated.mean[test], "gaussian-nll", spread=rated.spread[test], alike=True
    )


def read_ratings(path: Path) -> Rated:
    """Return all texts with their ratings, in the archive's order of sources.

    Raises:
        DataError: it is not what it should be.
    """
    try:
        files = _files(_inner(path))
        parts = [_of_source(source, files) for source in _SOURCES]
    except _UNREADABLE as error:
        raise DataError(f"{path} must be the sdist of vaderSentiment 3.3.2: {error}; {_CURE}") from error
    return Rated(
        [each for part in parts for each in part.documents],
        [each for part in parts for each in part.texts],
        np.concatenate([part.mean for part in parts]),
        np.concatenate([part.spread for part in parts]),
    )


def _inner(path: Path) -> bytes:
    """Return the archive with the texts, from the sdist or from its folder."""
    if path.is_dir():
        found = [folder / _INNER for folder in (path, *path.glob("vaderSentiment-*")) if (folder / _INNER).is_file()]
        if len(found) != 1:
            raise ValueError(f"the folder has {len(found)} files {_INNER}")
        return _content(found[0])
    wanted = [content for name, content in _members(_content(path)).items() if name.partition("/")[2] == _INNER]
    if len(wanted) != 1:
        raise ValueError(f"it has {len(wanted)} files {_INNER}")
    return wanted[0]


def _content(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(_LARGEST)


def _files(archive: bytes) -> dict[str, list[list[str]]]:
    """Return the tables with texts and with ratings, by file name: lines, and what tabs separate in each."""
    return {
        PurePosixPath(name).name: [
            line.rstrip("\r").split("\t") for line in content.decode("utf-8-sig").split("\n") if line
        ]
        for name, content in _members(archive).items()
        if name.endswith(("_GroundTruth.txt", "_anonDataRatings.txt"))
    }


def _members(packed: bytes) -> dict[str, bytes]:
    """Return the files of a gzipped archive, in memory.

    Raises:
        ValueError: it is larger than any that is meant, or has a link, a device, or a path that leads out of it.
    """
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        content = stream.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"an archive in it unpacks to more than {_LARGEST} bytes")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.name.startswith("/") or ".." in parts:
                raise ValueError(f"{member.name} leads out of the archive")
            if member.isdir():
                continue
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise ValueError(f"{member.name} is a link or another thing that is no file")
            file = archive.extractfile(member)
            found[member.name] = b"" if file is None else file.read()
    return found


def _of_source(source: str, files: dict[str, list[list[str]]]) -> Rated:
    """Return one source's texts, in their order; its two tables are joined by a text's number."""
    tables = []
    for name, width in ((f"{source}_GroundTruth.txt", 3), (f"{source}_anonDataRatings.txt", 4)):
        if name not in files:
            raise ValueError(f"it has no {name}")
        wrong = [row for row in files[name] if len(row) != width]
        if wrong or not files[name]:
            raise ValueError(f"{name} must have {width} columns, got {len(wrong[0]) if wrong else 'no lines'}")
        tables.append({row[0]: row[-1] for row in files[name]})
    texts, given = tables
    if texts.keys() != given.keys():
        raise ValueError(f"{source} must have ratings for every text, and for no other")
    # The means that are beside the texts are not always those of the ratings: the ratings are what counts.
    ratings = [[int(each) for each in given[number].strip("[]").split(",")] for number in texts]
    if any(len(each) < 2 or min(each) < -4 or max(each) > 4 for each in ratings):
        raise ValueError(f"{source} must have two ratings or more for each text, in -4..4")
    return Rated(
        [f"{source} {number.partition('_')[0]}" for number in texts],
        list(texts.values()),
        np.array([np.mean(each) for each in ratings], np.float64),
        np.array([np.std(each) for each in ratings], np.float64),
    )
