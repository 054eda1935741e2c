"""How much a run's members differ: figures 5 and 6 of the paper, from predictions that are kept and from the weights.

Figure 6 is the correlation of softmax outputs; figure 5 the test error on straight lines between members' weights.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snapcore.diversity import ambiguity, correlation, disagreement, double_fault, weight_distance
from snapcore.ensemble import interpolation
from snapcore.errors import StoreError
from snapcore.lab.evaluate import keep_predictions
from snapcore.lab.job import load_job
from snapcore.lab.network import FEW, Network, first_epoch, require_classes
from snapcore.lab.ours import DIVERSITY, DIVERSITY_PLOT, refuse_foreign
from snapcore.lab.plots import plot_diversity
from snapcore.lab.predictions import finished_members, predictions_of
from snapcore.lab.sealed import write_sealed
from snapcore.store import SnapshotStore, Tensors

_MATRICES: Mapping[str, str] = {
    "correlation": "correlation of softmax outputs",
    "disagreement": "share of images decided differently",
    "double_fault": "share of images that both get wrong",
    "weight_distance": "Euclidean distance of the weights",
}


def measure_diversity(
    directory: Path,
    report: Callable[[str], object],
    *,
    points: int = 25,
    images: int | None = None,
    refresh: bool = False,
    data_dir: Path | None = None,
    model: str | None = None,
    trust_model: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Compare a run's members on the test images, pair by pair, and walk the lines between their weights.

    The lines are those between neighbours, and from each member to the last.

    Arguments:
        directory: a run made by `snapcore train`.
        report: called with each line of text for a person as soon as it is known.
        points: how many weights on each line are scored, both ends among them.
        images: how many test images they are scored on, the first ones; default all.
        refresh: re-estimate batch statistics at each point, the ends too, on 1,024 training images or one batch at
            most; default they are averaged as the weights are.
        data_dir: as for `evaluate`, as the others.
        model: the `package.module:function` that a run may name.
        trust_model: whether to import whatever function a run names.
        device: where to compute.

    Returns:
        What `diversity.json` holds.

    Raises:
        StoreError, DataError: as for `evaluate`, fewer than two finished members, or a run that is not of classes.
    """
    require_classes(directory, "diversity")
    store, job = SnapshotStore(directory), load_job(directory)
    members = finished_members(store)
    if len(members) < 2:
        raise StoreError(f"{directory} has one finished member, and diversity is of two or more: train with --cycles 2")
    keep_predictions(directory, "test", data_dir=data_dir, model=model, trust_model=trust_model, device=device)
    dataset = job.dataset(data_dir)
    found = predictions_of(store, job, dataset, device=device)
    weights = [store.load(member.index, verify=False) for member in members]
    results: dict[str, Any] = {
        "members": [member.index for member in members],
        "correlation": correlation(found).tolist(),
        "disagreement": disagreement(found).tolist(),
        "double_fault": double_fault(found).tolist(),
        "weight_distance": weight_distance(weights).tolist(),
        "ambiguity": {
            score: dict(zip(("mean_member", "diversity", "ensemble"), ambiguity(found, score=score), strict=True))
            for score in ("nll", "brier")
        },
    }
    for line in _matrices(results):
        report(line)
    statistics = dataset.x_train[first_epoch(job, dataset, FEW)] if refresh else None
    x, y = dataset.x_test[:images], dataset.y_test[:images]
    network = Network(store, job, dataset, device)
    lines = []
    for one, other in _pairs(len(members)):
        walked = _walk(network, weights[one], weights[other], x, y, points, statistics)
        lines.append({"members": [members[one].index, members[other].index], **walked})
        report(_told(lines[-1]))
    return {
        **results,
        "interpolation": {
            "images": len(x),
            "refreshed_on": 0 if statistics is None else len(statistics),
            "shares": np.linspace(0.0, 1.0, points).tolist(),
            "lines": lines,
        },
    }


def write_diversity(results: Mapping[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write `diversity.json` and `diversity.png` into a directory and return their paths.

    Raises:
        StoreError: one cannot be written, or what is there is not snapcore's.
    """
    path, picture = directory / DIVERSITY, directory / DIVERSITY_PLOT
    refuse_foreign(directory, [DIVERSITY, DIVERSITY_PLOT])
    try:
        write_sealed(path, results)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}; make room, then start again") from error
    plot_diversity(results, picture)
    return path, picture


def _pairs(count: int) -> list[tuple[int, int]]:
    """Return neighbours, then each member with the last; no pair twice."""
    to_last = ((index, count - 1) for index in range(count - 1))
    return list(dict.fromkeys([*itertools.pairwise(range(count)), *to_last]))


def _walk(
    network: Network,
    one: Tensors,
    other: Tensors,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    points: int,
    statistics: NDArray[np.float32] | None,
) -> dict[str, Any]:
    losses = []

    def error(weights: Tensors) -> float:
        network.put(weights, statistics)
        scores = network.scores(x, y)
        losses.append(scores["nll"])
        return scores["error"]

    found = interpolation(one, other, error, points=points)
    return {"error": found.scores.tolist(), "nll": losses, "barrier": found.barrier}


def _matrices(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield each matrix, row by row, and how an ensemble's loss is made up."""
    for name, words in _MATRICES.items():
        yield f"{words}, members {results['members'][0]} … {results['members'][-1]}:"
        for row in results[name]:
            yield "  " + " ".join(f"{value:7.3f}" for value in row)
    for score, parts in results["ambiguity"].items():
        yield (
            f"{score}: ensemble {parts['ensemble']:.4f} = mean member {parts['mean_member']:.4f} − diversity "
            f"{parts['diversity']:.4f}"
        )


def _told(line: Mapping[str, Any]) -> str:
    one, other = line["members"]
    errors: Sequence[float] = line["error"]
    return (
        f"from member {one} to {other}: error {errors[0]:.2f} % and {errors[-1]:.2f} % at the ends, at most "
        f"{max(errors):.2f} % between; barrier {line['barrier']:.2f}"
    )
