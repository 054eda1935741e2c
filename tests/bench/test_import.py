"""What `import snapcore.schedule` costs a new interpreter, beside the standard library that it needs."""

import subprocess
import sys

from .compare import Contender


def test_import_beside_its_own_dependencies(compare):
    compare(
        "python -c 'import snapcore.schedule'",
        _interpreter("import snapcore.schedule"),
        {
            "its standard library alone": _interpreter("import math, dataclasses, warnings, typing, collections"),
            "python -c pass": _interpreter("pass"),
        },
    )


def _interpreter(code: str) -> Contender:
    return Contender(lambda: subprocess.run([sys.executable, "-c", code], check=True))
