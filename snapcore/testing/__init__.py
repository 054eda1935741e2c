"""The rules that whoever plugs into snapcore must keep, as tests to inherit.

`BackendConformance` is for managed loops, `RunConformance` for the loop of one's own and for a trainer's callback. The
rules are numbered in docs/conformance.md, and each test cites its own. Nothing here imports a framework.
"""

from snapcore.testing.backend import BackendConformance

__all__ = ["BackendConformance"]
