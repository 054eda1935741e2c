"""Scripts in processes of their own that have a framework's imports behind them: for TensorFlow six seconds each.

The standard library's fork server imports, begins no thread, and forks. What a test asks of such a process is what it
would ask of any: that it writes, is killed, and resumes.
"""

import multiprocessing
import os
import runpy
import sys
import warnings
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["snapcore_jax.backend", "snapcore_tensorflow.backend", "snapcore.run"])


class Forked:
    """A script that runs, `python script arguments`.

    Arguments:
        log: what it says goes to the end of this file, and to the end of the same with `.errors`.
        strict: whether its warnings are errors, but for that of cycles that are short.
        environment: on top of this process's own; None takes a variable away.
    """

    def __init__(self, script, *arguments, log, strict=False, **environment):
        self._log = Path(log)
        words = {"script": str(script), "arguments": [*map(str, arguments)], "log": str(log), "strict": strict}
        job = {"JOB": {**words, "environment": environment}}
        self._process = _SERVER.Process(target=runpy.run_path, args=(__file__, job, "__main__"))
        self._process.start()

    def wait(self, seconds=200):
        """Return the exit code, negative for a signal."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError(self.errors)
        return self._process.exitcode

    def kill(self):
        """End it, if it has not ended."""
        self._process.kill()
        self._process.join()

    @property
    def output(self):
        """What it has said."""
        return self._log.read_text()

    @property
    def errors(self):
        """What it has said to its standard error."""
        return _errors(self._log).read_text()


def _errors(log):
    return Path(f"{log}.errors")


def become(script, arguments, log, strict, environment):
    """Run a script in this process, as if it had been started."""
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    for descriptor, path in ((1, log), (2, _errors(log))):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    if strict:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "steps=12 makes cycles of length")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    become(**JOB)  # noqa: F821 - given by the process that started this one
