"""The table of docs/parity.md: the largest deviation by quantity and framework, and how far apart the oracles are."""

from snapcore.backend import load_backend

from .frameworks import FRAMEWORKS, done
from .job import BOUNDS, JOBS, deviations, expected

RULES_APART = "the two rules"
VARIANCES_APART = "n for n − 1"


def columns(job):
    """Return the deviations of every framework from its oracle, and of one oracle from another, by name."""
    found = {
        name: deviations(done(framework, job), expected(job, framework.rule, framework.ddof))
        for name, framework in FRAMEWORKS.items()
    }
    found[RULES_APART] = deviations(expected(job, "updates", 0), expected(job, "gradients", 0))
    if job.model == "cnn":
        found[VARIANCES_APART] = deviations(expected(job, "gradients", 0), expected(job, "gradients", 1))
    return found


def table(job):
    """Return the lines of a job's table."""
    found = columns(job)
    numbers = {quantity: [each[quantity] for each in found.values()] for quantity in next(iter(found.values()))}
    rows = [(quantity, *map(_written, (BOUNDS[quantity], *values))) for quantity, values in numbers.items()]
    rows.insert(0, ("largest deviation", "allowed", *found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = f"{job.model}: rate {job.lr}, batches of {job.batch_size}, {job.steps} updates, {job.cycles} cycles"
    return [title, *(" | ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]


def report():
    """Return all that the command prints."""
    tables = ["\n".join(table(job)) for job in JOBS.values()]
    backends = dict.fromkeys(framework.backend for framework in FRAMEWORKS.values())
    return "\n\n".join([*tables, "\n".join(load_backend(name).about() for name in backends)])


def _written(value):
    return f"{value:.1e}" if value and isinstance(value, float) else f"{value:g}"
