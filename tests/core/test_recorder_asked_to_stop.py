"""A loop that counts in bulk can see whether it was asked to stop, and answer at the very next update."""

import os
import signal

import pytest

from .training import Loop


def test_a_sigterm_can_be_asked_for_before_an_update_is_recorded(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loop = Loop(tmp_path / "run")
    try:
        assert not loop.recorder.asked_to_stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert loop.recorder.asked_to_stop
        loop.recorder.record(0)  # no update, no answer
        with pytest.raises(SystemExit):
            loop.step()
    finally:
        loop.recorder.close()
        signal.signal(signal.SIGTERM, before)
