"""What a run directory holds, in lines, without loading a framework."""

from collections.abc import Iterator
from pathlib import Path

from snapcore.protocol import program_from_dict
from snapcore.schedule import Schedule
from snapcore.store import SnapshotStore


def describe_run(directory: Path) -> Iterator[str]:
    """Yield lines about a run: its method, how far it is, its members."""
    store = SnapshotStore(directory)
    if store.program is not None:
        program = program_from_dict(store.program)
        yield f"{directory}: {program.method}, {program.updates} updates, {store.stopped or 'not finished'}"
        yield f"schedule: {program.schedule}"
    for member in store.members:
        notes = [
            *(["unfinished"] if member.unfinished else []),
            *([f"due at {member.due}"] if member.due != member.step else []),
            *(f"{name} {value:.4g}" for name, value in (member.metrics or {}).items()),
        ]
        file = store.path / member.file
        size = f"{file.stat().st_size:,} bytes" if file.exists() else "missing"
        yield (
            f"member {member.index}: {member.file} ({size}, {member.framework}), update {member.step}, "
            f"lr {member.lr:.3g}" + "".join(f", {note}" for note in notes)
        )


def describe_schedule(schedule: Schedule) -> Iterator[str]:
    """Yield a line for each cycle: where it begins and ends, and at what rates."""
    yield f"{schedule}"
    yield f"{'cycle':>5} {'first update':>13} {'snapshot after':>15} {'first rate':>12} {'last rate':>12}"
    for cycle, (start, stop) in enumerate(zip(schedule.cycle_starts, schedule.snapshot_steps, strict=True), 1):
        yield f"{cycle:>5} {start:>13} {stop:>15} {schedule(start):>12.4g} {schedule(stop - 1):>12.4g}"
