"""The rules that whoever plugs into snapcore must keep, as tests to inherit.

`BackendConformance` is for managed loops, `LoopConformance` for a run in a loop of one's own, and `RunConformance`, the
part of it that needs no loop, for a trainer's callback. The rules are numbered in docs/conformance.md, and each test
cites its own. Nothing here imports a framework.
"""

import pytest

# Before the suites are imported, so that a rule that fails shows what it found.
pytest.register_assert_rewrite(
    *(f"snapcore.testing.{name}" for name in ("arrays", "backend", "loop", "run", "trainings"))
)

from snapcore.testing.backend import BackendConformance  # noqa: E402
from snapcore.testing.loop import LoopConformance  # noqa: E402
from snapcore.testing.run import RunConformance  # noqa: E402

__all__ = ["BackendConformance", "LoopConformance", "RunConformance"]
