"""Print the table of docs/parity.md: `python -m tests.parity`, from the root of the repository."""

from .table import report

print(report())
