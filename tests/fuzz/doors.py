"""Everything that reads a run: each returns what it got as plain values, to be compared with what the files say."""

from itertools import islice

import msgspec

from snapcore.ensemble import Predictions, Recipe, combine, score_predictions
from snapcore.lab.describe import describe_run, describe_schedule, faults
from snapcore.lab.history import History
from snapcore.lab.job import load_job
from snapcore.lab.ours import is_ours
from snapcore.lab.sealed import read_sealed
from snapcore.protocol import program_from_dict
from snapcore.run import Recorder
from snapcore.store import SnapshotStore, map_tensors, move_aside, read_point

from .oracle import bits
from .run import DATA, HISTORY, JOB, PICTURE, PLAN, PREDICTIONS, RECIPE, RESULTS, Weights


def manifest(run):
    store = SnapshotStore(run)
    return store.program, store.stopped, [msgspec.to_builtins(member) for member in store.members]


def schedule(run):
    found = SnapshotStore(run).program
    return None if found is None else _used(program_from_dict(found))


def _used(program):
    """Use a program as a run, a cursor and the command do."""
    made = program.schedule
    rates = [made(step) for step in (0, made.steps // 2, made.steps, 2 * made.steps)]
    cycles = [made.cycle_at(step) for step in (0, made.steps - 1, made.steps)]
    return program.to_dict(), len(program), rates, cycles, [*islice(describe_schedule(made), 9)]


def weights(run):
    store = SnapshotStore(run)
    found = [bits(store.load(member.index)) for member in store.members]
    store.verify()
    return found


def mapped(run):
    """Without a digest: whatever it gives, it must be there to be looked at."""
    store = SnapshotStore(run)
    for member in store.members:
        bits(store.load(member.index, verify=False))
        bits(map_tensors(run / member.file))


def point(run):
    found = read_point(run)
    if found is None:
        return None
    return bits(found.tensors), found.state, msgspec.to_builtins(found.member)


def job(run):
    return msgspec.structs.asdict(load_job(run))


def asked_for(run):
    found = load_job(run)
    return _used(found.program(DATA)), found.refuse_other(run), found.has_own_model


def results(run):
    return read_sealed(run / RESULTS) if (run / RESULTS).exists() else None


def history(run):
    return History(run, PLAN.schedule).rows


def predictions(run):
    found = Predictions.open(run / PREDICTIONS)
    facts = found.kind, found.ignore, found.split, found.data, found.members
    labels = {} if found.labels is None else {"labels": found.labels}
    combine(found)
    if labels:
        score_predictions(found)
    return facts, bits({"predictions": found[:], **labels})


def recipe(run):
    return msgspec.to_builtins(Recipe.open(run / RECIPE))


def ours(run):
    return {name for name in (JOB, RESULTS, HISTORY, PICTURE, RECIPE) if not is_ours(run / name)}


def described(run):
    return [*describe_run(run)], [*faults(run)]


def resumed(run):
    recorder = Recorder(run, PLAN, Weights(), framework="numpy")
    try:
        recorder.start()
        return recorder.cursor.state_dict()
    finally:
        recorder.close(exact=False)


def moved(run):
    return move_aside(run).name


# The last two change what is there.
STORE = (manifest, schedule, weights, mapped, point, described, resumed, moved)
DOORS = {
    JOB: (job, asked_for, ours, described),
    RESULTS: (results, ours, described),
    HISTORY: (history, ours),
    PICTURE: (ours,),
    PREDICTIONS: (predictions,),
    "predictions": (predictions,),
    RECIPE: (recipe, ours, described),
}
"""What reads a file, where that is not what reads a run's members, manifest and resume point."""
