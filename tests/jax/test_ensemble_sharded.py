"""Members spread over several devices give what the loop gives; JAX counts devices once, so this needs a process."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("sharded_members.py")


def test_members_spread_over_devices_give_what_the_loop_gives():
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", str(SCRIPT)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == ("4 devices\n", 0), result.stderr
