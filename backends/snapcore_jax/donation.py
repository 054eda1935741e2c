"""Arrays that cannot be copied any more, because an update was given them, or not yet, because they are traced."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.core import Tracer

from snapcore import ProtocolError
from snapcore_jax.trees import named_leaves


def donated(parts: Mapping[str, Any]) -> str | None:
    """Return the name of an array that was donated, or None.

    Arguments:
        parts: trees by name.
    """
    leaves = named_leaves(parts).items()
    return next((name for name, leaf in leaves if isinstance(leaf, jax.Array) and leaf.is_deleted()), None)


def refuse_unusable(parts: Mapping[str, Any]) -> None:
    """Raise `ProtocolError` if an array was donated or is being traced, with the rule that was broken and the cure."""
    for name, leaf in named_leaves(parts).items():
        if isinstance(leaf, Tracer):
            raise ProtocolError(f"{name!r} is being traced: call run.step outside of jax.jit, after the update")
    gone = donated(parts)
    if gone:
        raise ProtocolError(
            f"the array {gone!r} was donated to an update and is gone: after donate_argnums, give run.step what the "
            "update returned: variables, rest = run.step(*update(variables, rest))"
        )
