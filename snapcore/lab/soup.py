"""One network out of a run's members: the mean of their weights, as a run of one member."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from snapcore.ensemble import soup
from snapcore.errors import DataError, StoreError
from snapcore.lab.evaluate import evaluate, write_results
from snapcore.lab.job import load_job
from snapcore.lab.network import FEW, Network, first_epoch, require_classes
from snapcore.lab.ours import JOB, RESULTS, refuse_foreign
from snapcore.store import MANIFEST, SnapshotStore, Tensors, new_member


def make_soup(
    directory: Path,
    output: Path,
    *,
    last: int | None = None,
    members: Sequence[int] | None = None,
    force: bool = False,
    data_dir: Path | None = None,
    model: str | None = None,
    trust_model: bool = False,
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Average members' weights, re-estimate the batch statistics, and write a run directory with that one member.

    Members with a barrier between them are refused. It is measured on the images that were kept back, and else on
    training images, at most 1,024 or one batch, never on test images; batch statistics are re-estimated there on as
    many training images, and for the mean itself on those of a whole epoch.

    Arguments:
        directory: a run made by `snapcore train`.
        output: the directory of the new run, which `evaluate` and the rest take like any other.
        last: as for `evaluate`, as the others.
        members: which members instead, by index.
        force: average them whatever lies between them.
        data_dir: where the images are now.
        model: the `package.module:function` that a run may name.
        trust_model: whether to import whatever function a run names.
        device: where to compute.

    Returns:
        Scores on the test images: of `soup`, of the `best member` (by their error), and of the members' `ensemble`.

    Raises:
        DataError: fewer than two members, or a barrier of more than 2 points of error between them.
        StoreError: `output` holds a run already, or files that are not snapcore's.
        StoreError, DataError: as for `evaluate`.
    """
    if (output / MANIFEST).exists():
        raise StoreError(f"{output} holds a run already: choose another --output")
    refuse_foreign(output, [JOB, RESULTS])
    require_classes(directory, "a soup")
    evaluated = partial(evaluate, data_dir=data_dir, model=model, trust_model=trust_model, device=device)
    before = evaluated([directory], last=last, members=members)
    store, job = SnapshotStore(directory), load_job(directory)
    dataset, by_index = job.dataset(data_dir), {member.index: member for member in store.members}
    chosen = [by_index[row["index"]] for row in before["members"]]
    if len(chosen) < 2:
        raise DataError(f"at least two members are required for a mean, got {len(chosen)} of {directory}")
    network = Network(store, job, dataset, device)
    few = first_epoch(job, dataset, FEW)
    x, y = dataset.x_train[few], dataset.y_train[few]
    if job.held_out:
        x, y = dataset.x_held_out, dataset.y_held_out

    def error(weights: Tensors) -> float:
        network.put(weights, dataset.x_train[few])
        return network.scores(x, y)["error"]

    weights = [store.load(member.index, verify=False) for member in chosen]
    mean = soup(weights, error, force=force, names=[member.index for member in chosen])
    network.put(mean, dataset.x_train[first_epoch(job, dataset)])
    newest = chosen[-1]
    job.save(output)
    with SnapshotStore(output, "w") as made:
        made.describe(program=store.program)
        member = new_member(
            index=1,
            step=newest.step,
            cycle=newest.cycle,
            lr=newest.lr,
            framework=newest.framework,
            metrics=network.scores(dataset.x_test, dataset.y_test),
        )
        names = ", ".join(f"{each.index} ({each.sha256[:12]})" for each in chosen)
        made.add(made.put(network.weights(), member), stopped=f"the mean of members {names}")
    after = evaluated([output])
    write_results(after, output)
    return {
        "soup": after["ensemble"][0],
        "best member": min(before["members"], key=lambda row: row["error"]),
        "ensemble": before["ensemble"][-1],
    }


def describe_soup(scores: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each of what `make_soup` scored."""
    return [
        f"{name:<11} error {each['error']:5.2f} %, NLL {each['nll']:.4f}, ECE {each['ece']:.4f}"
        for name, each in scores.items()
    ]
