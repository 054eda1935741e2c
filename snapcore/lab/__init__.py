"""The application on top of the core: data, training, evaluation and the `snapcore` command."""

import io
import logging
import os
import sys
import warnings
from typing import Any

from snapcore.lab.text import printable

_EXTRA = ("typer", "rich", "matplotlib", "sklearn", "scipy")


def main() -> None:
    """Run the `snapcore` command; without the `lab` extra, say how to install it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where there is no console
            stream.reconfigure(errors="replace")  # a name that the terminal cannot show ends no training
    warnings.formatwarning = _one_line
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("snapcore: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("snapcore").setLevel(logging.INFO)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's own notes on its start
    try:
        from snapcore.lab.cli import run

        code = run(sys.argv[1:])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f"snapcore: the command needs {error.name}: pip install 'snapcore[lab]'")
    except (KeyboardInterrupt, RuntimeError) as error:  # while it was being imported, or as it ended
        # Python 3.11 wraps what is raised while a class is made.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        sys.stderr.write("snapcore: interrupted\n")
        sys.exit(130)
    sys.exit(code)


class _OneLine(logging.Formatter):
    """What is noted on the way, names from disk and all, as one line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _one_line(message: Warning | str, *where: Any, **more: Any) -> str:  # noqa: ARG001
    return printable(f"snapcore: {message}") + "\n"  # without the line of source that warned
