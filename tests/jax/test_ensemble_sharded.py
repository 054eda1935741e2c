"""Members spread over several devices give what the loop gives; JAX counts devices once, so this needs a process."""

from pathlib import Path

import pytest

from ..forked import Forked

SCRIPT = Path(__file__).with_name("sharded_members.py")


@pytest.mark.exhaustive
def test_members_spread_over_devices_give_what_the_loop_gives(tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    process = Forked(SCRIPT, log=tmp_path / "log", strict=True, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert (process.wait(), process.output) == (0, "4 devices\n"), process.errors
