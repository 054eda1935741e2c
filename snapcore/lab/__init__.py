"""The application on top of the core: data, training, evaluation and the `snapcore` command."""

import logging
import os
import sys
import warnings
from typing import Any


def main() -> None:
    """Run the `snapcore` command; without the `lab` extra, say how to install it."""
    _speak_plainly()
    try:
        from snapcore.lab.cli import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f"snapcore: the command needs {error.name}: pip install 'snapcore[lab]'")
    sys.exit(run(sys.argv[1:]))


def _speak_plainly() -> None:
    """Tell what the core warns of and notes in lines of its own, without the source they come from."""
    warnings.formatwarning = _one_line
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's own notes on its start
    logging.basicConfig(format="snapcore: %(message)s")
    logging.getLogger("snapcore").setLevel(logging.INFO)


def _one_line(message: Warning | str, *where: Any, **more: Any) -> str:  # noqa: ARG001
    return f"snapcore: {message}\n"


_EXTRA = ("typer", "rich", "matplotlib", "sklearn", "scipy")
