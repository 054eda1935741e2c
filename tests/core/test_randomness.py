"""The random states of Python and NumPy, there and back through JSON."""

import json
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from snapcore.run.random_state import random_state, set_random_state

DRAWS = [
    random.random,
    lambda: random.gauss(0, 1),
    lambda: random.randrange(2**200),
    lambda: float(np.random.random()),
    lambda: float(np.random.normal()),
    lambda: np.random.permutation(7).tolist(),
]


@given(st.lists(st.sampled_from(DRAWS), max_size=30), st.lists(st.sampled_from(DRAWS), min_size=1, max_size=30))
def test_the_numbers_drawn_from_a_state_are_drawn_again_once_it_is_set(before, after):
    """Half-used pairs of normal numbers are part of it: both libraries draw two and keep one."""
    for draw in before:
        draw()
    state = json.loads(json.dumps(random_state(), allow_nan=False))
    expected = [draw() for draw in after]
    for draw in before:
        draw()
    set_random_state(state)
    assert [draw() for draw in after] == expected


def test_asking_for_the_state_changes_nothing():
    random.seed(5)
    np.random.seed(5)
    expected = [draw() for draw in DRAWS]
    random.seed(5)
    np.random.seed(5)
    found = []
    for draw in DRAWS:
        random_state()
        found.append(draw())
    assert found == expected
