"""The rules that whoever plugs into snapcore must keep, as tests to inherit. Nothing here imports a framework."""

from snapcore.testing.backend import BackendConformance

__all__ = ["BackendConformance"]
