"""The command line: `snapcore train | evaluate | inspect | verify | schedule | backends`."""

import itertools
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from snapcore.backend import available_backends, load_backend
from snapcore.errors import BackendNotFoundError, ScheduleError, SnapcoreError
from snapcore.lab.describe import describe_run, describe_schedule
from snapcore.lab.display import Display
from snapcore.lab.evaluate import evaluate as evaluate_runs
from snapcore.lab.evaluate import write_results
from snapcore.lab.job import Job, first_backend
from snapcore.lab.plots import plot_schedule
from snapcore.lab.train import is_resumable
from snapcore.lab.train import train as train_job
from snapcore.protocol import METHODS, program
from snapcore.schedule import StepDecay
from snapcore.store import SnapshotStore

app = typer.Typer(
    help="Train once, get M models: snapshot ensembles.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

Runs = Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)]
Method = Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")]
Cycles = Annotated[int, typer.Option(help="Cycles M, one member each. nocycle takes six members whatever M.", min=1)]
Lr = Annotated[float, typer.Option(help="The rate every cycle starts at.")]


@app.command()
def train(
    backend: Annotated[str | None, typer.Option(help="Default: the first that is installed.")] = None,
    data: Annotated[str, typer.Option(help="digits, fashion-mnist, or a name of yours with --data-dir.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="A folder of IDX files, or of one .npz archive.")] = None,
    model: Annotated[str, typer.Option(help="mlp, cnn, or package.module:function.")] = "cnn",
    method: Method = "snapshot",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 100,
    cycles: Cycles = 5,
    lr: Lr = 0.1,
    batch_size: Annotated[int, typer.Option(help="Images per update.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of weights and batches.", min=0)] = 0,
    train_limit: Annotated[int | None, typer.Option(help="Keep the first so many training images.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="The run's directory. Default: a new one in runs/.")] = None,
    resume: Annotated[bool, typer.Option(help="Resume an unfinished run; --no-resume moves it aside.")] = True,
    resume_every: Annotated[
        int | None, typer.Option(help="Updates between resume points, beside those at every cycle's end.", min=1)
    ] = None,
) -> None:
    """Train a model, keep its members, and score their ensembles."""
    name, chosen = first_backend() if backend is None else (backend, load_backend(backend))
    job = Job(
        backend=name,
        data=data,
        data_dir=None if data_dir is None else str(data_dir.absolute()),
        model=model,
        method=method,
        epochs=epochs,
        cycles=cycles,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        train_limit=train_limit,
    )
    numbered = _numbered(f"{job.data}-{job.model.rpartition(':')[2]}-{job.method}")
    directory = output or next(path for path in numbered if not path.exists() or (resume and is_resumable(job, path)))
    display = Display()
    results = train_job(job, chosen, directory, display, resume=resume, resume_every=resume_every)
    display.ensembles(results["ensemble"])
    display.line(f"{results['seconds']:.1f} s; members, results.json, history.csv and training.png are in {directory}")


@app.command()
def evaluate(
    runs: Runs,
    last: Annotated[int | None, typer.Option(help="Members of each run, from its end. Default: all.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Where results.json goes. Default: the one run.")] = None,
) -> None:
    """Score the ensemble of one run, or of several together, and write results.json."""
    results = evaluate_runs(runs, last=last)
    Display().ensembles(results["ensemble"])
    several = next(path for path in _numbered("evaluation") if not path.exists())
    directory = output or (runs[0] if len(runs) == 1 else several)
    typer.echo(f"wrote {write_results(results, directory)}")


@app.command()
def inspect(runs: Runs) -> None:
    """Show what run directories hold."""
    for run in runs:
        for line in describe_run(run):
            typer.echo(line)


@app.command()
def verify(runs: Runs) -> None:
    """Check every member of run directories against its digest."""
    for run in runs:
        store = SnapshotStore(run)
        store.verify()
        typer.echo(f"{run}: {len(store.members)} members, each as it was written")


@app.command()
def schedule(
    steps: Annotated[int, typer.Option(help="Optimizer updates in all.", min=1)] = 300,
    cycles: Cycles = 6,
    lr: Lr = 0.2,
    method: Method = "snapshot",
    lr_min: Annotated[float | None, typer.Option(help="The rate a cosine cycle anneals towards.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Updates of linear warm-up.", min=0)] = None,
    remainder: Annotated[str | None, typer.Option(help="paper or even, when cycles do not divide.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it, to this file.")] = None,
) -> None:
    """Print a method's schedule, and draw it."""
    given: dict[str, Any] = {"lr_min": lr_min, "warmup_steps": warmup_steps, "remainder": remainder}
    options = {name: value for name, value in given.items() if value is not None}
    if options and isinstance(program(method, lr=lr, steps=steps, cycles=1).schedule, StepDecay):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise ScheduleError(f"{method} has no cosine cycles, got {names}: leave that out, or choose another --method")
    chosen = program(method, lr=lr, steps=steps, cycles=cycles, **options).schedule
    for line in describe_schedule(chosen):
        typer.echo(line)
    if plot is not None:
        plot_schedule(chosen, plot)
        typer.echo(f"wrote {plot}")


@app.command()
def backends() -> None:
    """List the backends, their versions and devices, and what to install for the rest."""
    for name in sorted(available_backends()):
        try:
            typer.echo(f"{name}: {load_backend(name).about()}")
        except BackendNotFoundError as error:
            typer.echo(f"{name}: {error}")


def run(arguments: list[str]) -> int:
    """Run the command; an error becomes one plain line, and its traceback only with `--debug`.

    Returns:
        The exit code: 0 only on success.
    """
    debug = "--debug" in arguments
    try:
        code = app([word for word in arguments if word != "--debug"], standalone_mode=False, prog_name="snapcore")
    except (SnapcoreError, OSError, typer.TyperException, typer.Abort) as error:
        if debug:
            traceback.print_exc()
        typer.echo(_line(error), err=True)
        return error.exit_code if isinstance(error, typer.TyperException) else 1
    return code if isinstance(code, int) else 0


def _line(error: Exception) -> str:
    if isinstance(error, typer.TyperException):
        message = error.format_message()
        if message.startswith("Usage:"):  # no command was given: these are
            return message
        context = getattr(error, "ctx", None)
        command = "snapcore" if context is None else context.command_path
        return f"snapcore: {message.rstrip('.')}; see {command} --help"
    text = " ".join(str(error).splitlines())
    if isinstance(error, SnapcoreError):
        return f"snapcore: {text}"
    return f"snapcore: {text or 'stopped'}; --debug shows where"


def _numbered(name: str) -> Iterator[Path]:
    return (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
