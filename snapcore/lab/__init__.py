"""The application on top of the core: data, training, evaluation and the `snapcore` command."""

import sys


def main() -> None:
    """Run the `snapcore` command; without the `lab` extra, say how to install it."""
    try:
        from snapcore.lab.command import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f"snapcore: the command needs {error.name}: pip install 'snapcore[lab]'")
    sys.exit(run(sys.argv[1:]))


_EXTRA = ("typer", "rich", "matplotlib", "sklearn", "scipy")
