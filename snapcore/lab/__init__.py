"""The application on top of the core: data, training, evaluation and the `snapcore` command."""

import logging
import os
import sys
import warnings
from typing import Any

_EXTRA = ("typer", "rich", "matplotlib", "sklearn", "scipy")


def main() -> None:
    """Run the `snapcore` command; without the `lab` extra, say how to install it."""
    warnings.formatwarning = _one_line
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's own notes on its start
    logging.basicConfig(format="snapcore: %(message)s")
    logging.getLogger("snapcore").setLevel(logging.INFO)
    try:
        from snapcore.lab.cli import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f"snapcore: the command needs {error.name}: pip install 'snapcore[lab]'")
    sys.exit(run(sys.argv[1:]))


def _one_line(message: Warning | str, *where: Any, **more: Any) -> str:  # noqa: ARG001
    return f"snapcore: {message}\n"  # without the line of source that warned
