"""What a run directory holds, in lines, without loading a framework; and what in it is damaged."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from snapcore.ensemble import Predictions, Recipe
from snapcore.errors import ScheduleError, StoreError
from snapcore.lab.ours import DIVERSITY, JOB, RECIPE, RESULTS
from snapcore.lab.scores import SHOWN, cell
from snapcore.lab.sealed import LARGEST, read_sealed
from snapcore.lab.text import counted, printable
from snapcore.protocol import program_from_dict
from snapcore.schedule import Schedule
from snapcore.store import SnapshotStore, read_point, read_regular

_PREDICTED = {
    "classes": "log-probabilities",
    "labels": "log-probabilities",
    "values": "values",
    "gaussian": "means and variances",
}
_OF_A_RECIPE = ("error", "rmse", "nll", "crps", "ece")


def describe_run(directory: Path) -> Iterator[str]:
    """Yield lines about a run: its method, how far it is, its members."""
    store = SnapshotStore(directory)
    if store.program is not None:
        try:
            program = program_from_dict(store.program)
        except ScheduleError as error:  # a shape that only the program that trained it knows
            yield printable(f"{directory}: {store.stopped or 'not finished'}; its schedule is not known here: {error}")
        else:
            updates = counted(program.updates, "update")
            yield printable(f"{directory}: {program.method}, {updates}, {store.stopped or 'not finished'}")
            yield printable(f"schedule: {program.schedule}")
    for member in store.members:
        notes = [
            *(["unfinished"] if member.unfinished else []),
            *([f"due at {member.due}"] if member.due != member.step else []),
            *(f"{name} {value:.4g}" for name, value in (member.metrics or {}).items()),
        ]
        file = store.path / member.file
        size = f"{file.stat().st_size:,} bytes" if file.exists() else "missing"
        yield printable(
            f"member {member.index}: {member.file} ({size}, {member.framework}), update {member.step}, "
            f"lr {member.lr:.3g}" + "".join(f", {note}" for note in notes)
        )


def describe_predictions(found: Predictions) -> str:
    """Return in words what predictions hold."""
    members, examples, *axes = found.shape
    words = [f"{_PREDICTED[found.kind]} of {counted(members, 'member')}", counted(examples, "example")]
    inner, last = (axes, []) if found.kind == "values" else (axes[:-1], axes[-1:])
    named = [f"{size} {found.kind}" for size in last if found.kind != "gaussian"]
    return ", ".join([*words, *map(str, inner), *named])


def describe_recipe(recipe: Recipe, report: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield lines about a recipe, and what it does on the test examples."""
    shares = ", ".join(f"{index}: {weight:.3f}" for index, weight in enumerate(recipe.weights, 1) if weight)
    probable = "ece" in report["equal"]  # values have no temperature
    yield f"weights {shares}" + (f"; temperature {recipe.temperature:.3f}" if probable else "")
    unit = "nats" if "nll" in report["equal"] else "of RMSE"
    if recipe.fitted is not None and recipe.fitted.gain is not None:
        yield f"gain on {recipe.fitted.rows} held-out rows ({recipe.fitted.how}): {recipe.fitted.gain:.4f} {unit}"
    for name, scores in report.items():
        members = f", {scores['members_used']:.2f} members an example" if "members_used" in scores else ""
        shown = ", ".join(f"{SHOWN[each]} {cell(each, scores[each])}" for each in _OF_A_RECIPE if each in scores)
        yield f"{name:<8} on the test examples: {shown}{members}"
    if recipe.fitted is not None and recipe.fitted.test is not None:
        yield f"gain on the test examples: {recipe.fitted.test:.4f} {unit}"


def faults(directory: Path) -> Iterator[str]:
    """Yield a line for every file of a run that is not as it was written, predictions apart, which are made anew."""
    try:
        store = SnapshotStore(directory)
    except StoreError as error:
        yield str(error)
        return
    sealed = [path for name in (JOB, RESULTS, RECIPE, DIVERSITY) if _claims_a_seal(path := directory / name)]
    checks: list[Callable[[], object]] = [
        *(functools.partial(store.file, member.index) for member in store.members),
        *([] if store.members else [store.verify]),  # of the manifest alone
        functools.partial(read_point, directory),
        *(functools.partial(read_sealed, path) for path in sealed),
    ]
    seen = set()
    for check in checks:
        try:
            check()
        except StoreError as error:
            if str(error) not in seen:  # an altered manifest is found beside every member
                seen.add(str(error))
                yield str(error)


def _claims_a_seal(path: Path) -> bool:
    """Return whether a file is meant to be one of ours: beside a run of one's own loop it may be the user's."""
    try:
        return b'"sha256"' in read_regular(path, limit=LARGEST, follow=True)
    except OSError:
        return False


def describe_schedule(schedule: Schedule) -> Iterator[str]:
    """Yield a line for each cycle: where it begins and ends, and at what rates."""
    yield f"{schedule}"
    yield f"{'cycle':>5} {'first update':>13} {'snapshot after':>15} {'first rate':>12} {'last rate':>12}"
    for cycle, (start, stop) in enumerate(zip(schedule.cycle_starts, schedule.snapshot_steps, strict=True), 1):
        yield f"{cycle:>5} {start:>13} {stop:>15} {schedule(start):>12.4g} {schedule(stop - 1):>12.4g}"
