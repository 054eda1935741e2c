"""The command line: `snapcore train`, and what is done with the runs that it makes."""

import contextlib
import itertools
import sys
import traceback
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer

from snapcore.backend import available_backends
from snapcore.data import LOSSES
from snapcore.ensemble import RULES, Recipe
from snapcore.errors import BackendNotFoundError, SnapcoreError
from snapcore.lab.backends import first_backend, start_backend
from snapcore.lab.cells import Plan
from snapcore.lab.compare import compare as compare_cells
from snapcore.lab.comparison_table import describe as describe_comparison
from snapcore.lab.comparison_table import live_table, table_of
from snapcore.lab.describe import describe_predictions, describe_recipe, describe_run, describe_schedule, faults
from snapcore.lab.display import Display
from snapcore.lab.diversity import measure_diversity, write_diversity
from snapcore.lab.evaluate import WAYS, keep_predictions, select_members, write_results
from snapcore.lab.evaluate import evaluate as evaluate_runs
from snapcore.lab.executors import Executor, Processes, connect
from snapcore.lab.job import Job, plan
from snapcore.lab.ours import COMPARISON, DIVERSITY, DIVERSITY_PLOT, RECIPE, RESULTS, refuse_foreign
from snapcore.lab.plots import plot_schedule
from snapcore.lab.soup import describe_soup, make_soup
from snapcore.lab.text import counted, printable
from snapcore.lab.train import INTERRUPTED, is_resumable
from snapcore.lab.train import train as train_job
from snapcore.protocol import METHODS
from snapcore.store import SnapshotStore
from snapcore.verdict import FEWEST

app = typer.Typer(
    help="Train once, get M models: snapshot ensembles.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

Runs = Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)]
Method = Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")]
Cycles = Annotated[int, typer.Option(help="Cycles M, one member each. nocycle takes six members whatever M.", min=1)]
Lr = Annotated[float, typer.Option(help="The rate every cycle starts at.")]
LrMin = Annotated[float | None, typer.Option(help="The rate a cosine cycle anneals towards.")]
WarmupSteps = Annotated[int | None, typer.Option(help="Updates of linear warm-up.", min=0)]
Remainder = Annotated[str | None, typer.Option(help="paper or even, when cycles do not divide.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda, where the backend has a choice.")]
DataDir = Annotated[Path | None, typer.Option(help="Where the images are now. Default: where they were.")]
Model = Annotated[str | None, typer.Option(help="The package.module:function that a run names.")]
TrustModel = Annotated[
    bool, typer.Option("--trust-model", help="Import, and so execute, whatever function a run names.")
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"snapcore {installed_version('snapcore')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback too.")] = False,
) -> None:
    """Train once, get M models: snapshot ensembles."""


@app.command()
def train(
    backend: Annotated[str | None, typer.Option(help="Default: the first that is installed.")] = None,
    data: Annotated[str, typer.Option(help="A name of ours, or one of yours with --data-dir.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="A folder of IDX files, or of one .npz archive.")] = None,
    loss: Annotated[str | None, typer.Option(help=f"{', '.join(LOSSES)}. Default: what the data are for.")] = None,
    model: Annotated[str, typer.Option(help="mlp, cnn, fcn, or package.module:function.")] = "cnn",
    method: Method = "snapshot",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 100,
    cycles: Cycles = 5,
    lr: Lr = 0.1,
    lr_min: LrMin = None,
    warmup_steps: WarmupSteps = None,
    remainder: Remainder = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw. Default: sgd.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd. Default: 0.9.", min=0, max=1)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.0001.", min=0)] = None,
    clip_norm: Annotated[float | None, typer.Option(help="The gradient's largest norm. torch only.", min=0)] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16; torch also float16.")] = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option(help="Images per update.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of weights and batches.", min=0)] = 0,
    train_limit: Annotated[int | None, typer.Option(help="Keep the first so many training images.", min=1)] = None,
    held_out: Annotated[
        float | None, typer.Option(help="The share of them not trained on, for select and calibration.", min=0, max=1)
    ] = None,
    recipe: Annotated[bool, typer.Option("--recipe", help="At the end select members too, as select does.")] = False,
    output: Annotated[Path | None, typer.Option(help="The run's directory. Default: a new one in runs/.")] = None,
    resume: Annotated[bool, typer.Option(help="Resume an unfinished run; --no-resume moves it aside.")] = True,
    resume_every: Annotated[
        int | None, typer.Option(help="Updates between resume points, beside those at every cycle's end.", min=1)
    ] = None,
) -> None:
    """Train a model, keep its members, and score their ensembles."""
    if recipe and not held_out:
        raise typer.BadParameter("nothing would be kept back to fit it on: add --held-out 0.1", param_hint="--recipe")
    name, chosen = first_backend() if backend is None else (backend, start_backend(backend))
    job = Job(
        backend=name,
        data=data,
        data_dir=None if data_dir is None else str(data_dir.absolute()),
        model=model,
        method=method,
        epochs=epochs,
        cycles=cycles,
        lr=lr,
        lr_min=lr_min,
        warmup_steps=warmup_steps,
        remainder=remainder,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        precision=precision,
        device=device,
        batch_size=batch_size,
        seed=seed,
        train_limit=train_limit,
        held_out=held_out or None,
        loss=loss,
        task=LOSSES.get(loss or ""),
    )
    if job.has_own_model:
        _import_from_here()
    numbered = _numbered(f"{data}-{model.rpartition(':')[2]}-{method}")
    directory = output or next(path for path in numbered if not path.exists() or (resume and is_resumable(job, path)))
    if recipe:
        refuse_foreign(directory, [RECIPE])
    display = Display()
    results = train_job(job, chosen, directory, display, resume=resume, resume_every=resume_every)
    display.results(results)
    display.line(f"{_cost(results)}; members, results.json, history.csv and training.png are in {directory}")
    if recipe:
        _keep_recipe(directory, *select_members(directory, model=model if job.has_own_model else None))


@app.command()
def evaluate(
    runs: Runs,
    last: Annotated[int | None, typer.Option(help="Members of each run, from its end. Default: all.", min=1)] = None,
    members: Annotated[str | None, typer.Option(help="Members of each run, by index, such as 1,3.")] = None,
    data_dir: DataDir = None,
    model: Model = None,
    trust_model: TrustModel = False,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="Where results.json goes. Default: the one run.")] = None,
) -> None:
    """Score the ensemble of one run, or of several together, and write results.json."""
    several = next(path for path in _numbered("evaluation") if not path.exists())
    directory = output or (runs[0] if len(runs) == 1 else several)
    refuse_foreign(directory, [RESULTS])
    if trust_model or model is not None:
        _import_from_here()
    results = evaluate_runs(
        runs,
        last=last,
        members=None if members is None else _indexes(members),
        data_dir=data_dir,
        model=model,
        trust_model=trust_model,
        device=device,
    )
    Display().results(results)
    _print(f"{_cost(results)}; wrote {write_results(results, directory)}")


@app.command()
def predict(
    runs: Runs,
    split: Annotated[str, typer.Option(help="test or held-out.")] = "test",
    data_dir: DataDir = None,
    model: Model = None,
    trust_model: TrustModel = False,
    device: Device = None,
) -> None:
    """Keep every member's predictions in its run, for evaluate, select and programs of your own."""
    if trust_model or model is not None:
        _import_from_here()
    for run in runs:
        path, found = keep_predictions(
            run, split, data_dir=data_dir, model=model, trust_model=trust_model, device=device
        )
        _print(f"{path}: {describe_predictions(found)}")


@app.command()
def select(
    run: Annotated[Path, typer.Argument(help="A run made with --held-out.", show_default=False)],
    by: Annotated[str, typer.Option(help=f"One of: {', '.join(WAYS)}.")] = "select",
    size: Annotated[int, typer.Option(help="Choices of select at most.", min=1)] = 25,
    tolerance: Annotated[
        float | None, typer.Option(help="Fit a cascade too: points of error that it may cost.", min=0)
    ] = None,
    rule: Annotated[str, typer.Option(help=f"Of the cascade. One of: {', '.join(RULES)}.")] = "probability",
    data_dir: DataDir = None,
    model: Model = None,
    trust_model: TrustModel = False,
    device: Device = None,
) -> None:
    """Choose, weight and calibrate members on the held-out images, and write recipe.json."""
    if by not in WAYS:
        raise typer.BadParameter(f"must be one of {', '.join(WAYS)}, got {by}", param_hint="--by")
    if rule not in RULES:
        raise typer.BadParameter(f"rule must be one of {', '.join(RULES)}, got {rule}", param_hint="--rule")
    refuse_foreign(run, [RECIPE])
    if trust_model or model is not None:
        _import_from_here()
    found = select_members(
        run,
        by=by,
        size=size,
        tolerance=tolerance,
        rule=rule,
        data_dir=data_dir,
        model=model,
        trust_model=trust_model,
        device=device,
    )
    _keep_recipe(run, *found)


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help=f"Separated by commas. Of: {', '.join(METHODS)}.")] = "cosine,snapshot",
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, …; six are the fewest that decide.", min=1)] = FEWEST,
    backend: Annotated[str | None, typer.Option(help="Default: the first that is installed.")] = None,
    data: Annotated[str, typer.Option(help="As for train.")] = "digits",
    data_dir: DataDir = None,
    model: Annotated[str, typer.Option(help="mlp, cnn, fcn, or package.module:function.")] = "cnn",
    epochs: Annotated[int, typer.Option(help="Passes over the training examples; the budget.", min=1)] = 100,
    cycles: Cycles = 5,
    lr: Lr = 0.1,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw. Default: sgd.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.0001.", min=0)] = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option(help="Examples per update.", min=1)] = 64,
    train_limit: Annotated[int | None, typer.Option(help="Keep the first so many training examples.", min=1)] = None,
    held_out: Annotated[float, typer.Option(help="The share not trained on, to calibrate on.", min=0, max=1)] = 0.1,
    loss: Annotated[str | None, typer.Option(help="As for train.")] = None,
    least: Annotated[
        float, typer.Option(help="The gain, in nats or RMSE, under which it is not worth it.", min=0)
    ] = 0.0,
    jobs: Annotated[int, typer.Option(help="Trainings at a time, in processes of this machine.", min=1)] = 1,
    executor: Annotated[str | None, typer.Option(help="Where to train instead, such as dask://host:port.")] = None,
    add: Annotated[list[Path] | None, typer.Option(help="A run of a loop of yours, called NAME-seedK.")] = None,
    resume_every: Annotated[int | None, typer.Option(help="Updates between resume points.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="The comparison's directory. Default: one in runs/.")] = None,
) -> None:
    """Train methods at one budget with several seeds, and say whether they are worth it here."""
    if executor is not None and jobs > 1:
        raise typer.BadParameter("it is for processes here: leave it or --executor out", param_hint="--jobs")
    name = first_backend()[0] if backend is None else backend
    job = Job(
        backend=name,
        data=data,
        data_dir=None if data_dir is None else str(data_dir.absolute()),
        model=model,
        epochs=epochs,
        cycles=cycles,
        lr=lr,
        optimizer=optimizer,
        weight_decay=weight_decay,
        device=device,
        batch_size=batch_size,
        train_limit=train_limit,
        held_out=held_out or None,
        loss=loss,
        task=LOSSES.get(loss or ""),
    )
    if job.has_own_model:
        _import_from_here()
    chosen = Plan(job, tuple(each.strip() for each in methods.split(",")), tuple(range(seeds)))
    directory = output or Path("runs") / f"compare-{data}-{model.rpartition(':')[2]}"
    display = Display()
    with contextlib.ExitStack() as stack:
        where: Executor | None = None
        if executor is not None:
            where = stack.enter_context(connect(executor))
        elif jobs > 1:
            where = stack.enter_context(Processes(jobs))
        watch = stack.enter_context(live_table(display.console))
        found = compare_cells(
            chosen, directory, add=add or (), executor=where, resume_every=resume_every, least=least, watch=watch
        )
    display.console.print(table_of(found["methods"], f"means over {counted(seeds, 'seed')}"))
    for line in describe_comparison(found):
        _print(line)
    _print(f"wrote {directory / COMPARISON}")
    raise typer.Exit(1 if found["failed"] else 0)


@app.command()
def inspect(runs: Runs) -> None:
    """Show what run directories hold."""
    for run in runs:
        for line in describe_run(run):
            _print(line)


@app.command()
def verify(runs: Runs) -> None:
    """Check every file of run directories against its digest, and list those that are damaged."""
    code = 0
    for run in runs:
        whole = True
        for fault in faults(run):
            whole, code = False, 1
            _print(f"snapcore: {fault}", err=True)
        if whole:
            _print(f"{run}: {counted(len(SnapshotStore(run).members), 'member')}, each as it was written")
    raise typer.Exit(code)


@app.command()
def schedule(
    steps: Annotated[int, typer.Option(help="Optimizer updates in all.", min=1)] = 300,
    cycles: Cycles = 6,
    lr: Lr = 0.2,
    method: Method = "snapshot",
    lr_min: LrMin = None,
    warmup_steps: WarmupSteps = None,
    remainder: Remainder = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it, to this file.")] = None,
) -> None:
    """Print a method's schedule, and draw it."""
    given: dict[str, Any] = {"lr_min": lr_min, "warmup_steps": warmup_steps, "remainder": remainder}
    options = {name: value for name, value in given.items() if value is not None}
    chosen = plan(method, lr=lr, steps=steps, cycles=cycles, **options).schedule
    for line in describe_schedule(chosen):
        _print(line)
    if plot is not None:
        plot_schedule(chosen, plot)
        _print(f"wrote {plot}")


@app.command()
def backends() -> None:
    """List the backends, their versions and devices, and what to install for the rest."""
    for name in sorted(available_backends()):
        try:
            _print(f"{name}: {start_backend(name).about()}")
        except BackendNotFoundError as error:
            _print(f"{name}: {error}")


@app.command()
def diversity(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    points: Annotated[int, typer.Option(help="Weights scored on each line between two members.", min=3)] = 25,
    images: Annotated[int | None, typer.Option(help="Test images they are scored on. Default: all.", min=1)] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Re-estimate batch statistics at each.")] = False,
    data_dir: DataDir = None,
    model: Model = None,
    trust_model: TrustModel = False,
    device: Device = None,
) -> None:
    """Measure how members differ, figures 5 and 6 of the paper, and write diversity.json and diversity.png."""
    refuse_foreign(run, [DIVERSITY, DIVERSITY_PLOT])
    if trust_model or model is not None:
        _import_from_here()
    results = measure_diversity(
        run,
        _print,
        points=points,
        images=images,
        refresh=refresh,
        data_dir=data_dir,
        model=model,
        trust_model=trust_model,
        device=device,
    )
    path, picture = write_diversity(results, run)
    _print(f"wrote {path} and {picture}")


@app.command()
def soup(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The new run's directory.", show_default=False)],
    last: Annotated[int | None, typer.Option(help="Members, from the run's end. Default: all.", min=1)] = None,
    members: Annotated[str | None, typer.Option(help="Members by index, such as 1,3.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Average them whatever barrier lies between them.")] = False,
    data_dir: DataDir = None,
    model: Model = None,
    trust_model: TrustModel = False,
    device: Device = None,
) -> None:
    """Average members' weights into one member, where no barrier lies between them, and write it as a run."""
    if trust_model or model is not None:
        _import_from_here()
    scores = make_soup(
        run,
        output,
        last=last,
        members=None if members is None else _indexes(members),
        force=force,
        data_dir=data_dir,
        model=model,
        trust_model=trust_model,
        device=device,
    )
    for line in describe_soup(scores):
        _print(line)
    _print(f"wrote {output}")


def run(arguments: list[str]) -> int:
    """Run the command; an error becomes one plain line, and its traceback only with `--debug`.

    Returns:
        The exit code: 0 only on success.
    """
    debug = "--debug" in arguments
    try:
        code = app([word for word in arguments if word != "--debug"], standalone_mode=False, prog_name="snapcore")
    except SystemExit as stop:  # a run was interrupted or terminated, and has said where it resumes
        code = stop.code
    except (SnapcoreError, OSError, typer.TyperException, typer.Abort) as error:
        if debug:
            for line in traceback.format_exc().splitlines():
                _print(line, err=True)
        _print_error(error)
        return error.exit_code if isinstance(error, typer.TyperException) else 1
    else:
        if code == INTERRUPTED:
            _print("snapcore: interrupted", err=True)
    return code if isinstance(code, int) else 0


def _keep_recipe(run: Path, recipe: Recipe, report: dict[str, Any]) -> None:
    recipe.save(run / RECIPE)
    for line in describe_recipe(recipe, report):
        _print(line)
    _print(f"wrote {run / RECIPE}")


def _print(text: str, *, err: bool = False) -> None:
    typer.echo(printable(" ".join(text.splitlines())), err=err)


def _print_error(error: Exception) -> None:
    if not isinstance(error, typer.TyperException):
        hint = "" if isinstance(error, SnapcoreError) else "; --debug shows where"
        _print(f"snapcore: {str(error) or 'stopped'}{hint}", err=True)
        return
    message = error.format_message()
    if message.startswith("Usage:"):  # no command was given: these are
        typer.echo(message, err=True)
        return
    context = getattr(error, "ctx", None)
    command = "snapcore" if context is None else context.command_path
    _print(f"snapcore: {message.rstrip('.')}; see {command} --help", err=True)


def _cost(results: dict[str, Any]) -> str:
    return f"{results['seconds']:.1f} s on {counted(results['threads'], 'thread')}"


def _indexes(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"members must be indexes such as 1,3, got {text}", param_hint="--members") from None


def _import_from_here() -> None:
    """Let a model that the command line names be found here too, after all that is installed."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _numbered(name: str) -> Iterator[Path]:
    return (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
