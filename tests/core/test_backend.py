"""Backends are found by name; one whose framework is missing says what to install."""

from importlib.metadata import EntryPoint

import pytest

from snapcore import backend
from snapcore.backend import GROUP, available_backends, load_backend
from snapcore.errors import BackendNotFoundError, SnapcoreError

THIRD = EntryPoint("third", "collections:OrderedDict", GROUP)
TORCH = EntryPoint("torch", "snapcore_torch_is_not_there.backend:TorchBackend", GROUP)
ELSEWHERE = EntryPoint("elsewhere", "a_package_that_is_not_there:Backend", GROUP)


@pytest.fixture
def registered(monkeypatch):
    """Three entry points in the group, and nothing in any other."""

    def entry_points(*, group):
        return [THIRD, TORCH, ELSEWHERE] if group == "snapcore.backends" else []

    monkeypatch.setattr(backend, "entry_points", entry_points)


@pytest.mark.usefixtures("registered")
def test_registered_backends_are_listed_without_being_imported():
    assert available_backends() == {"third": THIRD, "torch": TORCH, "elsewhere": ELSEWHERE}


@pytest.mark.usefixtures("registered")
def test_a_backend_of_a_third_party_is_loaded_by_its_name():
    import collections

    assert type(load_backend("third")) is collections.OrderedDict


@pytest.mark.usefixtures("registered")
def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        BackendNotFoundError,
        match=r"no backend is called 'caffe'; known: elsewhere, jax, keras, tensorflow, third, torch\. A",
    ):
        load_backend("caffe")


@pytest.mark.usefixtures("registered")
def test_a_backend_whose_framework_is_missing_names_the_extra():
    with pytest.raises(BackendNotFoundError, match=r"pip install 'snapcore\[torch\]'") as caught:
        load_backend("torch")
    assert "No module named 'snapcore_torch_is_not_there'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.usefixtures("registered")
def test_a_third_party_s_missing_framework_is_named_without_an_extra():
    with pytest.raises(BackendNotFoundError, match="'a_package_that_is_not_there'") as caught:
        load_backend("elsewhere")
    assert "pip install" not in str(caught.value)


def test_a_backend_that_is_not_registered_at_all_names_the_extra(monkeypatch):
    monkeypatch.setattr(backend, "entry_points", lambda *, group: [])
    assert available_backends() == {}
    with pytest.raises(
        BackendNotFoundError,
        match=r"known: jax, keras, tensorflow, torch\. Install it with: pip install 'snapcore\[torch\]'",
    ):
        load_backend("torch")


def test_an_error_inside_a_backend_is_not_taken_for_a_missing_one(monkeypatch):
    broken = EntryPoint("broken", "operator:index", GROUP)  # called without arguments, it raises TypeError
    monkeypatch.setattr(backend, "entry_points", lambda *, group: [broken])
    with pytest.raises(TypeError):
        load_backend("broken")


def test_not_found_is_a_lookup_error_and_a_snapcore_error():
    assert issubclass(BackendNotFoundError, LookupError)
    assert issubclass(BackendNotFoundError, SnapcoreError)
