"""The lab's data: true file formats written here byte by byte, read back, and every kind of damage refused."""

import gzip
import os
import struct
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapcore.errors import DataError
from snapcore.lab import datasets as data_module
from snapcore.lab.datasets import Dataset, load_data

KERAS = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

rng = np.random.default_rng(5)
X_TRAIN = rng.integers(0, 256, (7, 4, 5), dtype=np.uint8)
Y_TRAIN = np.array([0, 1, 2, 3, 0, 1, 2], np.uint8)
X_TEST = rng.integers(0, 256, (3, 4, 5), dtype=np.uint8)
Y_TEST = np.array([3, 1, 0], np.uint8)
ARRAYS = (X_TRAIN, Y_TRAIN, X_TEST, Y_TEST)


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, rename=str, pack=bytes, replace=None):
    for name, array in zip(IDX, ARRAYS, strict=True):
        content = (replace or {}).get(name, idx_bytes(array))
        (folder / rename(name)).write_bytes(pack(content))
    return folder


def write_npz(path, keys=KERAS, save=np.savez_compressed, **replace):
    save(path, **{key: replace.get(usual, a) for key, usual, a in zip(keys, KERAS, ARRAYS, strict=True)})
    return path


def standardised(images, train):
    """Compute the definition in float64, one channel."""
    pixels = train.astype(float).ravel() / 255
    mean = sum(pixels) / len(pixels)
    std = (sum((pixels - mean) ** 2) / len(pixels)) ** 0.5
    return ((images / 255 - mean) / std)[:, None]


def assert_is_the_example(data: Dataset):
    np.testing.assert_allclose(data.x_train, standardised(X_TRAIN, X_TRAIN), atol=1e-5)
    np.testing.assert_allclose(data.x_test, standardised(X_TEST, X_TRAIN), atol=1e-5)
    np.testing.assert_array_equal(data.y_train, Y_TRAIN)
    np.testing.assert_array_equal(data.y_test, Y_TEST)
    assert data.n_classes == 4
    assert {data.x_train.dtype, data.x_test.dtype} == {np.dtype(np.float32)}
    assert {data.y_train.dtype, data.y_test.dtype} == {np.dtype(np.int64)}
    assert data.x_train.flags.c_contiguous
    assert data.x_train.flags.writeable


# digits


def digits_rows(data):
    pixels = np.concatenate([data.x_train, data.x_test]) * data.std + data.mean
    return np.rint(pixels[:, 0] * 16).astype(int)


def test_digits_are_split_once_into_1347_and_450():
    data = load_data()
    assert data.name == "digits"
    assert data.x_train.shape == (1347, 1, 8, 8)
    assert data.x_test.shape == (450, 1, 8, 8)
    assert data.n_classes == 10
    assert set(data.y_train) == set(data.y_test) == set(range(10))


def test_digits_parts_are_disjoint_and_together_are_scikit_learns_images():
    from sklearn.datasets import load_digits

    data, source = load_data("digits"), load_digits()
    ours = np.column_stack([digits_rows(data).reshape(1797, 64), np.concatenate([data.y_train, data.y_test])])
    theirs = np.column_stack([source.data.astype(int), source.target])
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))


def test_digits_split_is_the_same_whatever_the_global_seed_and_the_limit():
    np.random.seed(1)
    one = load_data("digits")
    np.random.seed(2)
    two = load_data("digits", train_limit=100)
    np.testing.assert_array_equal(one.y_test, two.y_test)
    np.testing.assert_array_equal(digits_rows(one)[1347:], digits_rows(two)[100:])
    np.testing.assert_array_equal(digits_rows(one)[:100], digits_rows(two)[:100])


def test_digits_test_labels_are_pinned_so_that_results_stay_comparable():
    assert np.bincount(load_data("digits").y_test).tolist() == [43, 41, 46, 46, 51, 35, 45, 43, 47, 53]


def test_digits_pixels_are_scaled_before_mean_and_std_are_taken():
    data = load_data("digits")
    assert 0 < data.mean < 1
    assert 0 < data.std < 1
    assert abs(data.x_train.mean()) < 1e-5
    assert abs(data.x_train.std() - 1) < 1e-5


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'snapcore\[lab\]'"):
        load_data("digits")


def test_a_module_that_scikit_learn_itself_lacks_is_not_blamed_on_scikit_learn(monkeypatch):
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    monkeypatch.setattr(sys, "meta_path", [LacksScipy(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="scipy"):
        load_data("digits")


class LacksScipy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "sklearn.datasets":
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")


def test_digits_with_a_directory_is_refused_rather_than_one_of_them_ignored(tmp_path):
    with pytest.raises(DataError, match="another name"):
        load_data("digits", tmp_path)


# names and directories


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match=r"digits, digits-dense, fashion-mnist, randhie, vader.*'mnits'"):
        load_data("mnits")


def test_fashion_mnist_is_found_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(data_module._INSTALLED, "fashion-mnist", write_idx(tmp_path))
    assert_is_the_example(load_data("fashion-mnist"))


def test_fashion_mnist_that_is_not_installed_names_the_package_and_the_directory(tmp_path, monkeypatch):
    monkeypatch.setitem(data_module._INSTALLED, "fashion-mnist", tmp_path / "absent")
    with pytest.raises(DataError, match=r"absent.*package dataset-fashion-mnist"):
        load_data("fashion-mnist")


def test_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere, which does not exist: give the directory"):
        load_data("mnist", tmp_path / "nowhere")


# IDX


@pytest.mark.parametrize(
    ("rename", "pack"),
    [
        (str, bytes),
        (lambda name: name + ".gz", gzip.compress),
        (lambda name: name.replace("-idx", ".idx"), bytes),
        (lambda name: name.replace("-idx", ".idx") + ".gz", gzip.compress),
    ],
    ids=["plain", "gz", "dotted", "dotted-gz"],
)
def test_idx_folder_is_read_in_every_usual_spelling(tmp_path, rename, pack):
    assert_is_the_example(load_data("kmnist", str(write_idx(tmp_path, rename, pack))))


def test_plain_idx_file_is_preferred_to_its_gz_neighbour(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not looked at")
    assert_is_the_example(load_data("mnist", tmp_path))


def test_folder_without_a_part_says_exactly_what_was_looked_for_and_where(tmp_path):
    write_idx(tmp_path)
    (tmp_path / IDX[1]).unlink()
    with pytest.raises(DataError) as caught:
        load_data("mnist", tmp_path)
    message = str(caught.value)
    for mark in "-.":
        for ending in ("", ".gz"):
            assert f"train-labels{mark}idx1-ubyte{ending}" in message
    assert str(tmp_path) in message
    assert "t10k" not in message


def test_empty_folder_lists_all_four_parts(tmp_path):
    with pytest.raises(DataError) as caught:
        load_data("mnist", tmp_path)
    assert all(name in str(caught.value) for name in IDX)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"\0\0\x08", "got 00 00 08"),
        (idx_bytes(Y_TRAIN), "must begin with 00 00 08 03 .* got 00 00 08 01"),
        (b"\0\0\x0d" + idx_bytes(X_TRAIN)[3:], "got 00 00 0d 03"),
        (b"<html>not found</html>", "got 3c 68 74 6d"),
        (idx_bytes(X_TRAIN)[:10], "must have"),
        (idx_bytes(X_TRAIN)[:-1], r"must have 156 bytes for the shape \[7, 4, 5\] .* got 155"),
        (idx_bytes(X_TRAIN) + b"\0", "got 157"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "must have"),
        (gzip.compress(idx_bytes(X_TRAIN), mtime=0)[:-9], "plain or gzip"),
        (gzip.compress(idx_bytes(X_TRAIN), mtime=0)[:-8] + bytes(8), "plain or gzip"),
        (b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20, "plain or gzip"),
    ],
)
def test_damaged_idx_file_is_named_with_what_is_wrong(tmp_path, content, message):
    write_idx(tmp_path, replace={IDX[0]: content})
    with pytest.raises(DataError, match=message) as caught:
        load_data("mnist", tmp_path)
    assert str(tmp_path / IDX[0]) in str(caught.value)


@pytest.mark.parametrize(("name", "part"), [(IDX[1], "training"), (IDX[3], "test")])
def test_images_and_labels_must_be_equally_many(tmp_path, name, part):
    write_idx(tmp_path, replace={name: idx_bytes(np.zeros(5, np.uint8))})
    with pytest.raises(DataError, match=rf"{part} .*one label per example, got \d examples and 5 labels"):
        load_data("mnist", tmp_path)


def test_idx_part_without_examples_is_refused(tmp_path):
    empty = {IDX[2]: idx_bytes(np.zeros((0, 4, 5), np.uint8)), IDX[3]: idx_bytes(np.zeros(0, np.uint8))}
    with pytest.raises(DataError, match=r"test images must be .* not empty"):
        load_data("mnist", write_idx(tmp_path, replace=empty))


# npz


@pytest.mark.parametrize("keys", [KERAS, MEDMNIST], ids=["keras", "medmnist"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_with_either_set_of_keys(tmp_path, keys, save):
    assert_is_the_example(load_data("mine", write_npz(tmp_path / "mine.npz", keys, save)))


def test_folder_with_exactly_one_npz_is_read(tmp_path):
    write_npz(tmp_path / "mine.npz")
    assert_is_the_example(load_data("mine", tmp_path))


def test_folder_with_two_npz_files_asks_which(tmp_path):
    write_npz(tmp_path / "a.npz")
    write_npz(tmp_path / "b.npz")
    with pytest.raises(DataError, match=r"exactly one \.npz file \(it has 2\).*give the \.npz file itself"):
        load_data("mine", tmp_path)


def test_npz_beside_an_incomplete_idx_set_does_not_hide_what_is_missing(tmp_path):
    write_npz(tmp_path / "a.npz")
    write_idx(tmp_path)
    (tmp_path / IDX[3]).unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load_data("mine", tmp_path)


def test_medmnist_validation_part_is_left_out_and_column_labels_are_flattened(tmp_path):
    path = tmp_path / "pathmnist.npz"
    arrays = dict(zip(MEDMNIST, (X_TRAIN, Y_TRAIN[:, None], X_TEST, Y_TEST[:, None]), strict=True))
    np.savez(path, val_images=X_TEST, val_labels=np.full((3, 1), 9), **arrays)
    assert_is_the_example(load_data("pathmnist", path))


def test_colour_images_become_channels_first(tmp_path):
    train, test = (rng.integers(0, 256, (n, 6, 5, 3), dtype=np.uint8) for n in (7, 3))
    data = load_data("mine", write_npz(tmp_path / "a.npz", x_train=train, x_test=test))
    assert data.x_train.shape == (7, 3, 6, 5)
    pixels = data.x_train * data.std + data.mean
    for n, row, column, channel in [(0, 0, 0, 0), (6, 5, 4, 2), (3, 1, 2, 1)]:
        assert pixels[n, channel, row, column] * 255 == pytest.approx(train[n, row, column, channel], abs=1e-3)
    assert data.x_train.flags.c_contiguous


def test_floats_are_taken_as_they_are(tmp_path):
    path = write_npz(tmp_path / "a.npz", x_train=X_TRAIN / 255 * 4 - 2, x_test=X_TEST / 255 * 4 - 2)
    data = load_data("mine", path)
    np.testing.assert_allclose(data.x_train, standardised(X_TRAIN, X_TRAIN), atol=1e-5)
    assert data.mean == pytest.approx((X_TRAIN / 255 * 4 - 2).mean(), abs=1e-6)


def test_pickled_arrays_are_refused_and_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "a.npz"
    np.savez(path, allow_pickle=True, **dict(zip(KERAS, (np.array([Bomb()]), *ARRAYS[1:]), strict=True)))
    with pytest.raises(DataError, match=r"a\.npz must be a \.npz file of plain arrays"):
        load_data("mine", path)
    assert not (tmp_path / "executed").exists()


def test_npz_with_other_keys_lists_what_it_wants_and_what_it_got(tmp_path):
    np.savez(tmp_path / "a.npz", images=X_TRAIN, y_train=Y_TRAIN)
    with pytest.raises(DataError, match=r"x_train y_train x_test y_test, or train_images .*got images y_train"):
        load_data("mine", tmp_path / "a.npz")


def test_file_that_is_no_npz_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", X_TRAIN)
    with pytest.raises(DataError, match=r"a\.npy must be a \.npz file or a folder"):
        load_data("mine", tmp_path / "a.npy")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(random=st.randoms(use_true_random=False), save=st.sampled_from([np.savez, np.savez_compressed]))
def test_npz_with_one_flipped_bit_is_refused_or_reads_as_before(tmp_path, random, save):
    content = bytearray(write_npz(tmp_path / "a.npz", save=save).read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    (tmp_path / "b.npz").write_bytes(content)
    try:
        data = load_data("mine", tmp_path / "b.npz")
    except DataError:
        return
    assert_is_the_example(data)


# files that are no data: they answer at once, and take no memory

LARGE = 200 * 2**20
LITTLE = 100 * 2**20  # of memory


def zeros(length):
    """Zeros, gzipped, without having them in memory."""
    packer = zlib.compressobj(1, wbits=31)
    yield from (packer.compress(bytes(2**20)) for _ in range(length // 2**20))
    yield packer.flush()


def write_packed(path, head, length):
    """Write `head` and as many zeros, gzipped."""
    with path.open("wb") as file:
        file.write(gzip.compress(head))
        file.writelines(zeros(length))


def write_archive(path, entry, *, method=zipfile.ZIP_DEFLATED, **replace):
    """Write an archive whose images to train on are the chunks of `entry`."""
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for key, array in zip(KERAS, ARRAYS, strict=True):
            with archive.open(f"{key}.npy", "w") as member:
                if key == "x_train":
                    for chunk in entry:
                        member.write(chunk)
                else:
                    np.lib.format.write_array(member, replace.get(key, array))
    return path


def npy_header(shape, version=(1, 0), length=None):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + text


def assert_refused_with_little_memory(path, name="mine"):
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            load_data(name, path)
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()
    return str(caught.value)


IDX_HEADERS = {
    "promises little and holds much": (7, 4, 5),
    "promises what it holds, which is nothing but zeros": (LARGE // 400, 20, 20),
    "promises more than there is": (2**32 - 1, 2**32 - 1, 2**32 - 1),
}


@pytest.mark.parametrize("shape", IDX_HEADERS.values(), ids=IDX_HEADERS)
def test_a_gzipped_file_that_swells_is_refused_before_it_does(shape, tmp_path):
    write_idx(tmp_path)
    (tmp_path / IDX[0]).unlink()
    path = tmp_path / f"{IDX[0]}.gz"
    write_packed(path, struct.pack(">BBBB3I", 0, 0, 8, 3, *shape), LARGE)
    assert str(path) in assert_refused_with_little_memory(tmp_path)


ENTRIES = {
    "nothing but zeros": lambda: [npy_header((LARGE // 20, 4, 5)), *[bytes(2**20)] * (LARGE // 2**20)],
    "more than its header says": lambda: [npy_header((7, 4, 5)), *[bytes(2**20)] * (LARGE // 2**20)],
    "less than its header says": lambda: [npy_header((10**9, 10**9)), bytes(140)],
    "a header that never ends": lambda: [npy_header((1,), (2, 0), LARGE), *[b" " * 2**20] * (LARGE // 2**20)],
    "a header of Python that never ends": lambda: [npy_header("(" * 5000)],
    "a header of Python that is too deep": lambda: [npy_header("-" * 9000 + "1")],
    "a header of Python that is none": lambda: [npy_header("1}\n  2\n 3 {")],
    "negative": lambda: [npy_header((-7, 4, 5)), bytes(140)],
    "another version": lambda: [npy_header((7, 4, 5), (9, 0)), bytes(140)],
    "no array": lambda: [b"hello"],
    "nothing": list,
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_archive_that_is_not_what_it_says_is_refused_before_it_is_read(entry, tmp_path):
    path = write_archive(tmp_path / "a.npz", entry())
    assert str(path) in assert_refused_with_little_memory(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_is_packed_as_numpy_packs_none_is_refused(method, tmp_path):
    path = write_archive(tmp_path / "a.npz", [npy_header((7, 4, 5)), bytes(140)], method=method)
    with pytest.raises(DataError, match="packed in a way that NumPy does not use"):
        load_data("mine", path)


def test_a_small_archive_of_zeros_is_images_like_others(tmp_path):
    path = write_npz(tmp_path / "a.npz", x_test=np.zeros((3, 4, 5), np.uint8))
    assert load_data("mine", path).x_test.shape == (3, 1, 4, 5)


@pytest.mark.parametrize("name", ["a.npz", *IDX])
def test_a_pipe_among_the_data_is_refused_without_waiting_for_it(name, tmp_path):
    if name != "a.npz":
        write_idx(tmp_path)
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    for path in {tmp_path, tmp_path / name}:
        assert str(tmp_path) in assert_refused_with_little_memory(path)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/null"])
def test_a_device_is_no_data(device, tmp_path):
    assert device in assert_refused_with_little_memory(device)
    (tmp_path / "a.npz").symlink_to(device)
    assert "it is no regular file" in assert_refused_with_little_memory(tmp_path)


# the digest


def test_the_digest_is_of_what_is_stored_in_whatever_format(tmp_path):
    digests = []
    for name, write in (("idx", write_idx), ("npz", lambda folder: write_npz(folder / "a.npz"))):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        digests.append(load_data("mine", tmp_path / name).sha256)
    assert digests[0] == digests[1]
    assert len(digests[0]) == 64


@pytest.mark.parametrize("key", KERAS)
def test_the_digest_changes_with_any_array(key, tmp_path):
    array = dict(zip(KERAS, ARRAYS, strict=True))[key].copy()
    array.flat[0] ^= 1
    whole = load_data("mine", write_npz(tmp_path / "a.npz")).sha256
    assert load_data("mine", write_npz(tmp_path / "b.npz", **{key: array})).sha256 != whole


# arrays that are not what they should be


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"y_train": Y_TRAIN.astype(int) - 1}, "training labels must be 0 or more, got -1"),
        ({"y_test": Y_TEST.astype(float)}, "test labels must be integers .* got float64"),
        ({"y_train": np.eye(7, 4, dtype=int)}, r"test labels must be 0 or 1, .* got uint8 \[3\]"),
        ({"y_train": np.array(3)}, r"training labels must be .* got int64 \[\]"),
        ({"y_train": np.array(list("abcabca"))}, "training labels must be integers"),
        ({"x_train": np.array(3)}, r"training images must be numbers .* got int64 \[\]"),
        ({"x_train": X_TRAIN.reshape(7, 20)}, r"training images must be numbers .* got uint8 \[7, 20\]"),
        ({"x_test": X_TEST.astype(complex)}, "test images must be numbers .* got complex128"),
        ({"x_test": X_TEST > 9}, "test images must be numbers .* got bool"),
        ({"x_train": X_TRAIN.astype(int) + 9}, "one type and shape, got int64 .* and uint8"),
        ({"x_test": X_TEST[:, :3]}, r"one type and shape, got uint8 \[1, 4, 5\] and uint8 \[1, 3, 5\]"),
        ({"x_train": np.full_like(X_TRAIN, 51)}, "must differ somewhere, got 0.2 in every pixel"),
        ({"x_train": X_TRAIN * 257.0, "x_test": X_TEST * np.nan}, "must be finite"),
        ({"x_train": X_TRAIN * 1e300, "x_test": X_TEST * 1.0}, "must be finite in float32"),
        ({"x_train": np.int16(X_TRAIN) - 300, "x_test": np.int16(X_TEST)}, r"must be in 0\.\.255, got -"),
        ({"x_train": np.int16(X_TRAIN), "x_test": np.int16(X_TEST) + 256}, r"must be in 0\.\.255, got 2"),
        ({"x_train": np.zeros((7, 3, 9, 9)), "x_test": np.zeros((3, 3, 9, 9))}, "channels last"),
    ],
)
def test_arrays_that_are_not_images_and_labels_are_refused(tmp_path, replace, message):
    with pytest.raises(DataError, match=message):
        load_data("mine", write_npz(tmp_path / "a.npz", **replace))


# train_limit


@given(limit=st.integers(2, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_train_limit_keeps_the_first_images_and_standardises_by_them(tmp_path, limit):
    data = load_data("mine", write_npz(tmp_path / "a.npz"), train_limit=limit)
    np.testing.assert_allclose(data.x_train, standardised(X_TRAIN[:limit], X_TRAIN[:limit]), atol=1e-5)
    np.testing.assert_allclose(data.x_test, standardised(X_TEST, X_TRAIN[:limit]), atol=1e-5)
    np.testing.assert_array_equal(data.y_train, Y_TRAIN[:limit])


def test_train_limit_does_not_change_the_number_of_classes(tmp_path):
    path = write_npz(tmp_path / "a.npz", y_test=np.array([0, 1, 0]))
    assert load_data("mine", path, train_limit=2).n_classes == 4


@pytest.mark.parametrize("limit", [-1, 0, 8])
def test_train_limit_outside_the_set_is_refused(tmp_path, limit):
    with pytest.raises(DataError, match=rf"train_limit must be in 1\.\.7, the training examples, got {limit}"):
        load_data("mine", write_npz(tmp_path / "a.npz"), train_limit=limit)


def test_one_hot_labels_are_not_taken_for_several_labels(tmp_path):
    y = np.eye(3, dtype=int)[np.arange(30) % 3]
    x = np.random.default_rng(0).random((30, 2))
    np.savez(tmp_path / "rows.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(DataError, match=r"labels look one-hot, one 1 in each row: give class numbers, y\.argmax\(1\)"):
        load_data("rows", tmp_path / "rows.npz")


def test_an_archive_without_labels_is_refused(tmp_path):
    x = np.ones((4, 2))
    np.savez(tmp_path / "rows.npz", x_train=x, y_train=np.ones((0, 3), int), x_test=x, y_test=np.ones((4, 3), int))
    with pytest.raises(DataError, match=r"labels must be there, got shape \[0, 3\]"):
        load_data("rows", tmp_path / "rows.npz")


def dense_archive(path, **more):
    """Images whose bright pixels are class 1, with a border that does not count."""
    x = np.random.default_rng(0).integers(0, 256, size=(40, 6, 6), dtype=np.uint8)
    y = (x > 127).astype(np.int64)
    y[:, 0] = -100
    np.savez(path, x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:], **more)
    return path


def test_an_archive_may_have_a_class_for_every_pixel_and_a_number_that_does_not_count(tmp_path):
    found = load_data("mine", dense_archive(tmp_path / "a.npz", ignore=np.array(-100)), held_out=0.2)
    assert (found.kind, found.ignore, found.n_classes) == ("classes", -100, 2)
    assert (found.y_train.shape, found.y_held_out.shape, found.y_test.shape) == ((24, 6, 6), (6, 6, 6), (10, 6, 6))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "labels must be 0 or more, got -100: number the classes from 0, and let the archive's ignore be"),
        ({"ignore": np.array(0.5)}, "ignore must be one class number, got float64 []"),
        ({"ignore": np.array([1, 2])}, "ignore must be one class number, got int64 [2]"),
    ],
    ids=["none", "a float", "two"],
)
def test_a_number_that_does_not_count_must_be_one_and_named(tmp_path, more, message):
    with pytest.raises(DataError) as refused:
        load_data("mine", dense_archive(tmp_path / "a.npz", **more))
    assert message in str(refused.value)
