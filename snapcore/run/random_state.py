"""The random states of Python and NumPy as plain JSON."""

import random
from typing import Any

import numpy as np


def random_state() -> dict[str, Any]:
    """Return the states of `random` and of NumPy's global generator."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = np.random.get_state(legacy=False)
    inner = {"key": [int(word) for word in state["state"]["key"]], "pos": int(state["state"]["pos"])}
    numpy = {"has_gauss": int(state["has_gauss"]), "gauss": float(state["gauss"]), "state": inner}
    return {"python": [version, list(words), gauss], "numpy": numpy}


def set_random_state(state: dict[str, Any]) -> None:
    """Set both states to what `random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    inner = {"key": np.array(state["numpy"]["state"]["key"], np.uint32), "pos": state["numpy"]["state"]["pos"]}
    np.random.set_state({"bit_generator": "MT19937", **state["numpy"], "state": inner})
