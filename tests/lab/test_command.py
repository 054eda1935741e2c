"""The command line: what it prints, how it ends, and what it says when something is missing or wrong."""

import json
import math
import re
import shutil
from importlib.metadata import version

import numpy as np
import pytest

from snapcore import CosineCycles
from snapcore.lab.cli import app
from snapcore.store import SnapshotStore

SHORT = ("--epochs", "3", "--cycles", "3")
COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "select",
    "compare",
    "inspect",
    "verify",
    "schedule",
    "backends",
    "diversity",
    "soup",
)

HIDE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


# help and exit codes


def test_the_commands_are_those_of_the_documentation():
    assert tuple(command.callback.__name__ for command in app.registered_commands) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, cli):
    done = cli(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: snapcore {command} ")


OPTIONS = "backend data data-dir model method epochs cycles lr batch-size seed train-limit output resume no-resume"


@pytest.mark.parametrize("option", OPTIONS.split())
def test_train_has_the_options_that_are_promised(option, cli):
    assert re.search(rf"--{option}\b", cli("train", "--help").out)


def test_without_a_command_the_commands_are_listed_and_nothing_succeeds(cli):
    done = cli()
    assert (done.code, done.out) == (2, "")
    assert all(f"\n  {command} " in done.err for command in COMMANDS)


WRONG = [
    (["bogus"], ["No such command 'bogus'", "see snapcore --help"]),
    (["train", "--bogus"], ["No such option: --bogus", "see snapcore train --help"]),
    (["train", "--epochs", "0"], ["--epochs", "greater than or equal to 1", "see snapcore train --help"]),
    (["train", "--epochs", "2.5"], ["--epochs", "integer"]),
    (["train", "--cycles", "0"], ["--cycles"]),
    (["train", "--batch-size", "0"], ["--batch-size"]),
    (["train", "--seed", "-1"], ["--seed"]),
    (["train", "--train-limit", "0"], ["--train-limit"]),
    (["train", "--resume-every", "0"], ["--resume-every"]),
    (["train", "--lr", "fast"], ["--lr", "number"]),
    (["train", "extra"], ["unexpected extra argument", "extra"]),
    (["evaluate"], ["Missing argument", "see snapcore evaluate --help"]),
    (["schedule", "--steps", "0"], ["--steps"]),
]

REFUSED = [
    (["train", "--method", "bogus"], ["method must be one of single, cosine", "got 'bogus'"]),
    (["train", "--model", "bogus"], ["model must be one of ['cnn', 'fcn', 'mlp'] or a function", "got 'bogus'"]),
    (["train", "--model", "no.such:thing"], ["--model no.such:thing", "No module named 'no'", "PYTHONPATH"]),
    (["train", "--model", "math:bogus"], ["--model math:bogus", "has no attribute 'bogus'", "package.module:function"]),
    (["train", "--model", "math:pi"], ["--model math:pi must name a function", "got 3.14"]),
    (["train", "--model", ":mlp"], ["--model :mlp", "package.module:function"]),
    (["train", "--model", ".models:mlp"], ["--model .models:mlp", "package.module:function"]),
    (["train", "--model", "mlp:"], ["--model mlp:", "package.module:function"]),
    (
        ["train", "--data", "bogus"],
        ["data must be one of digits, digits-dense, fashion-mnist", "got 'bogus'", "give its directory"],
    ),
    (["train", "--data-dir", "."], ["digits comes with scikit-learn", "another name"]),
    (["train", "--data", "x", "--data-dir", "gone"], ["gone", "does not exist"]),
    (["train", "--backend", "bogus"], ["no backend is called 'bogus'", "torch"]),
    (["train", "--epochs", "1", "--cycles", "22"], ["cycles must be in 1..steps=21, got 22"]),
    (["train", "--lr", "nan"], ["lr must be finite", "got nan"]),
    (["train", "--lr", "inf"], ["lr must be finite", "got inf"]),
    (["train", "--lr=-0.1"], ["lr must be finite and not negative", "got -0.1"]),
    (["train", "--batch-size", "1348"], ["batch_size must be in 1..1347 examples, got 1348"]),
    (["train", "--train-limit", "1348"], ["train_limit must be in 1..1347", "got 1348"]),
    (["evaluate", "gone"], ["gone holds no job.json", "snapcore train did not make it"]),
    (["evaluate", "."], ["holds no job.json", "choose another"]),
    (["inspect", "gone"], ["gone holds no run", "check the path"]),
    (["verify", "gone"], ["gone holds no run", "check the path"]),
    (["schedule", "--method", "bogus"], ["method must be one of"]),
    (["schedule", "--steps", "3", "--cycles", "4"], ["cycles must be in 1..steps=3, got 4"]),
    (["schedule", "--remainder", "bogus"], ["remainder must be one of", "got 'bogus'"]),
    (["schedule", "--method", "single", "--lr-min", "0.1"], ["single has no cosine cycles, got --lr-min"]),
    (["schedule", "--method", "nocycle", "--warmup-steps", "5"], ["nocycle has no cosine cycles", "--warmup-steps"]),
]


@pytest.mark.parametrize(
    ("words", "fragments", "code"),
    [*((*case, 2) for case in WRONG), *((*case, 1) for case in REFUSED)],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 7 else None,
)
def test_an_error_is_one_plain_line_and_leaves_nothing_behind(words, fragments, code, cli, here):
    done = cli(*words)
    assert done.code == code
    assert done.out == ""
    for fragment in fragments:
        assert fragment in done.refusal
    assert list(here.iterdir()) == []


def test_an_error_longer_than_a_terminal_is_not_wrapped(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert len(cli("train", "--data", "x", "--data-dir", ".").refusal) > 400


def test_debug_shows_the_traceback_before_the_line(cli):
    plain = cli("train", "--lr", "nan").refusal
    for words in (["--debug", "train", "--lr", "nan"], ["train", "--lr", "nan", "--debug"]):
        done = cli(*words)
        assert done.code == 1
        assert done.err.startswith("Traceback")
        assert "ScheduleError" in done.err
        assert done.err.strip().splitlines()[-1] == plain


def test_a_folder_without_data_lists_every_file_that_was_looked_for(cli, here):
    (here / "empty").mkdir()
    refusal = cli("train", "--data", "mine", "--data-dir", "empty").refusal
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert f"{part}-ubyte" in refusal
        assert f"{part}-ubyte.gz" in refusal
    assert ".npz" in refusal


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--model", "mlp", "--output", "file/run"],
        ["schedule", "--plot", "file/plot.png"],
        ["schedule", "--plot", "gone/plot.png"],
        ["schedule", "--plot", "."],
    ],
)
def test_what_cannot_be_written_is_said_with_its_path(words, cli, here):
    (here / "file").write_text("in the way")
    done = cli(*words)
    assert done.code == 1
    assert f"{words[-1]} cannot be written: " in done.refusal
    assert "choose another" in done.refusal
    assert (here / "file").read_text() == "in the way"


def test_results_that_cannot_be_written_are_said_with_their_path(cli, here, finished):
    (here / "file").write_text("in the way")
    done = cli("evaluate", finished, "--output", "file/scores")
    assert done.code == 1
    assert "file/scores/results.json cannot be written" in done.refusal


def test_the_version_is_the_distributions(cli):
    done = cli("--version")
    assert (done.code, done.out, done.err) == (0, f"snapcore {version('snapcore')}\n", "")


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=str)
def test_h_is_help(words, cli):
    assert cli(*words, "-h") == cli(*words, "--help")
    assert cli(*words, "-h").code == 0


def test_the_help_names_what_holds_for_all_commands(cli):
    shown = cli("--help").out
    assert all(f"--{name} " in shown for name in ("version", "debug", "install-completion", "show-completion"))


def test_a_shell_completes_commands_and_options(python):
    code = "from snapcore.lab import main; main()"
    for typed, expected in (("snapcore ver", "verify"), ("snapcore train --warm", "--warmup-steps")):
        variables = {"_SNAPCORE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        done = python("-c", code, **variables)
        assert (done.code, done.out.split()) == (0, [expected])


# schedule


@pytest.mark.parametrize("cycles", [1, 4, 6])
def test_schedule_prints_every_cycle_and_the_rates_of_equation_2(cycles, cli):
    done = cli("schedule", "--steps", "60", "--cycles", cycles, "--lr", "0.3", "--remainder", "even")
    length = 60 // cycles
    last = 0.15 * (math.cos(math.pi * (length - 1) / length) + 1)
    rows = [[float(cell) for cell in line.split()] for line in done.out.splitlines()[2:]]
    for number, row in enumerate(rows, 1):
        assert row == pytest.approx([number, (number - 1) * length, number * length, 0.3, last], rel=1e-3)
    assert len(rows) == cycles


def test_schedule_passes_warm_up_and_floor_on(cli):
    done = cli("schedule", "--steps", "60", "--cycles", "5", "--warmup-steps", "10", "--lr-min", "0.01")
    assert [line.split()[2] for line in done.out.splitlines()[2:]] == ["20", "30", "40", "50", "60"]
    assert "lr_min=0.01, warmup_steps=10" in done.out


def test_schedule_prints_the_members_of_the_step_schedule(cli):
    done = cli("schedule", "--method", "nocycle", "--steps", "60")
    assert [line.split()[2] for line in done.out.splitlines()[2:]] == ["10", "20", "30", "40", "50", "60"]


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml"), ("a", b"\x89PNG")]
)
def test_schedule_draws_to_the_very_file_that_is_named(name, magic, cli, here):
    done = cli("schedule", "--plot", name)
    assert done.code == 0
    assert done.out.endswith(f"wrote {name}\n")
    assert (here / name).read_bytes().startswith(magic)
    assert [path.name for path in here.iterdir()] == [name]


def test_a_picture_of_an_unknown_kind_is_refused(cli, here):
    done = cli("schedule", "--plot", "a.bogus")
    assert done.code == 1
    assert "a.bogus cannot be written: Format 'bogus' is not supported" in done.refusal
    assert list(here.iterdir()) == []


# inspect and verify


def test_inspect_lists_the_program_and_every_member(cli, finished):
    lines = cli("inspect", finished).out.splitlines()
    assert lines[0] == f"{finished}: snapshot, 63 updates, finished"
    assert lines[1] == f"schedule: {CosineCycles(0.1, 63, 3)}"
    for member, line in zip(SnapshotStore(finished).members, lines[2:], strict=True):
        size = (finished / member.file).stat().st_size
        assert line.startswith(f"member {member.index}: {member.file} ({size:,} bytes, torch), update {member.step}, ")
        assert f"error {member.metrics['error']:.4g}" in line
        assert "due" not in line
        assert "unfinished" not in line


def test_inspect_marks_members_that_are_unfinished_late_or_missing(cli, here):
    with SnapshotStore("run", "w") as store:
        weights = {"w": np.ones(3)}
        store.save(weights, index=1, step=20, cycle=0, lr=0.01, framework="numpy")
        store.save(weights, index=2, step=43, due=40, cycle=1, lr=0.2, framework="numpy")
        store.save(weights, index=3, step=50, cycle=2, lr=0.1, framework="numpy", unfinished=True)
    (here / "run" / "snapshot-001.safetensors").unlink()
    first, second, third = cli("inspect", "run").out.splitlines()
    assert "(missing, numpy)" in first
    assert "update 43, lr 0.2, due at 40" in second
    assert "update 50, lr 0.1, unfinished" in third
    assert "due" not in first + third


def test_inspect_marks_a_run_that_is_not_finished_and_lists_several(cli, stopping, finished):
    stopping(30)
    assert cli("train", *SHORT, "--model", "stopping:Net", "--output", "run").code == 130
    done = cli("inspect", "run", finished)
    assert done.code == 0
    assert "run: snapshot, 63 updates, not finished" in done.out
    assert f"{finished}: snapshot, 63 updates, finished" in done.out
    assert sum(line.startswith("member ") for line in done.out.splitlines()) == 1 + 3


def test_verify_counts_the_members_that_are_as_they_were_written(cli, finished):
    done = cli("verify", finished)
    assert (done.code, done.out) == (0, f"{finished}: 3 members, each as it was written\n")


@pytest.mark.parametrize("at", [0, 10, 0.5, -1])
def test_verify_detects_one_altered_byte_and_names_the_file(at, cli, here):
    with SnapshotStore("run", "w") as store:
        for index in (1, 2):
            store.save({"w": np.arange(100.0)}, index=index, step=index, cycle=0, lr=0.1, framework="numpy")
    path = here / "run" / "snapshot-002.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at == 0.5 else at] ^= 1
    path.write_bytes(content)
    done = cli("verify", "run")
    assert (done.code, done.out) == (1, "")
    assert "snapshot-002.safetensors" in done.refusal


def test_verify_lists_every_damaged_file_of_every_run(cli, here, finished):
    for name in ("a", "b", "c"):
        shutil.copytree(finished, here / name)
    for run, file in (("a", "snapshot-001.safetensors"), ("a", "snapshot-003.safetensors"), ("b", "results.json")):
        content = (here / run / file).read_bytes()
        (here / run / file).write_bytes(content.replace(content[-40:], content[-40:].swapcase()))
    (here / "b" / "job.json").write_text('{"sha256": "0"}')
    (here / "b" / "snapshot-002.safetensors").unlink()
    done = cli("verify", "a", "gone", "b", "c")
    assert done.code == 1
    assert done.out == "c: 3 members, each as it was written\n"
    lines = done.err.splitlines()
    damaged = ["a/snapshot-001", "a/snapshot-003", "gone", "b/snapshot-002", "b/job.json", "b/results.json"]
    assert len(lines) == len(damaged)
    for line, name in zip(lines, damaged, strict=True):
        assert line.startswith("snapcore: ")
        assert name in line


def test_verify_says_once_that_a_manifest_was_altered(cli, here, finished):
    shutil.copytree(finished, here / "run")
    text = (here / "run" / "snapcore.json").read_text()
    (here / "run" / "snapcore.json").write_text(text.replace('"cycle": 2', '"cycle": 1'))
    assert "run/snapcore.json" in cli("verify", "run").err
    assert sum("run/snapcore.json" in line for line in cli("verify", "run").err.splitlines()) == 1


def test_verify_finds_a_damaged_resume_point(cli, here, stopping):
    stopping(50)
    assert cli("train", *SHORT, "--model", "stopping:Net", "--output", "run").code == 130
    assert cli("verify", "run").code == 0
    point = here / "run" / "resume" / "point.safetensors"
    point.write_bytes(point.read_bytes()[:-1] + b"!")
    assert "resume/point.safetensors" in cli("verify", "run").refusal


def test_verify_leaves_a_users_own_files_beside_a_run_alone(cli, here):
    with SnapshotStore("run", "w") as store:
        store.save({"w": np.ones(3)}, index=1, step=9, cycle=0, lr=0.1, framework="torch")
    for name in ("job.json", "results.json"):
        (here / "run" / name).write_text('{"accuracy": 0.9}')
    assert cli("verify", "run").out == "run: 1 member, each as it was written\n"


@pytest.mark.parametrize(
    "name", ["torch\x1b[31m", "torch\nmember 2: fine", "torch\r", "torch\x9b31m", "torch\u202e", "torch\x7f\x00\x07"]
)
def test_names_from_a_manifest_reach_no_terminal_as_they_are(name, cli, here):
    with SnapshotStore("run", "w") as store:
        weights = {"w": np.ones(3)}
        store.save(weights, index=1, step=9, cycle=0, lr=0.1, framework=name, metrics={name: 1.0})
        store.describe(stopped=name)
    done = cli("inspect", "run")
    assert done.code == 0
    assert done.out.count("\n") == 1
    assert done.out.rstrip("\n").isprintable()


def test_names_from_disk_reach_no_terminal_in_an_error_either(cli, here, finished):
    for name in ("run\x1b[2J", "run\nsnapcore: fine"):
        shutil.copytree(finished, here / name)
        for file in ("job.json", "snapshot-001.safetensors", "snapcore.json"):
            (here / name / file).write_bytes(b"\x1b[31m")
        for command in ("evaluate", "verify", "inspect", "train --output"):
            done = cli(*command.split(), name)
            assert done.code == 1
            assert done.refusal.isprintable()


# other processes


def test_python_m_snapcore_is_the_command(python, cli):
    done = python("-m", "snapcore", "schedule", "--steps", "10", "--cycles", "4")
    assert done.code == 0
    assert done.out == cli("schedule", "--steps", "10", "--cycles", "4").out
    assert done.refusal.startswith("snapcore: steps=10 does not fit 4 cycles")


def test_backends_lists_what_is_installed(cli):
    done = cli("backends")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^torch: torch \d+\.\d+.* on ", done.out, re.MULTILINE)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_command_says_how_to_install_it(missing, python):
    done = python("-c", HIDE + "from snapcore.lab import main; main()", missing, "backends")
    assert (done.code, done.out) == (1, "")
    assert done.refusal == f"snapcore: the command needs {missing}: pip install 'snapcore[lab]'"


def test_an_own_module_that_is_missing_is_not_taken_for_the_extra(python):
    done = python("-c", HIDE + "from snapcore.lab import main; main()", "msgspec")
    assert done.code == 1
    assert "No module named 'msgspec'" in done.err
    assert "snapcore[lab]" not in done.err


def test_without_pytorch_every_door_says_how_to_install_it(python):
    code = """
import contextlib, io, json
from snapcore.lab.cli import run
printed = []
for words in (["train"], ["backends"], ["train", "--backend", "torch"]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        printed.append([run(words), out.getvalue() + err.getvalue()])
try:
    import snapcore_torch
except ModuleNotFoundError as error:
    printed.append([error.name, str(error)])
print(json.dumps(printed))
"""
    done = python("-c", HIDE + code, "torch", "jax", "tensorflow", "keras")
    train, backends, named, imported = json.loads(done.out)
    assert train == [1, "snapcore: no framework is installed: pip install 'snapcore[torch]'\n"]
    assert backends[0] == 0
    assert [line.partition(":")[0] for line in backends[1].splitlines()] == ["jax", "keras", "tensorflow", "torch"]
    assert imported == ["torch", "snapcore_torch needs PyTorch: pip install 'snapcore[torch]'"]
    assert named[0] == 1
    assert all(f"pip install 'snapcore[{name}]'" in backends[1] for name in ("jax", "keras", "tensorflow"))
    for text in (backends[1].splitlines()[-1], named[1].rstrip()):
        assert "pip install 'snapcore[torch]'" in text
        assert "\n" not in text


@pytest.mark.exhaustive
def test_a_terminal_that_cannot_show_a_name_ends_no_command(python, here):
    """The name of the directory is printed at the end; none of its letters is ASCII."""
    words = ("train", "--model", "mlp", "--epochs", "1", "--cycles", "1", "--output", "прогон")
    done = python("-m", "snapcore", *words, PYTHONIOENCODING="ascii")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("are in ??????\n")
    refused = python("-m", "snapcore", "inspect", "нет", PYTHONIOENCODING="ascii:strict")
    assert refused.code == 1
    assert "holds no run" in refused.refusal


@pytest.mark.exhaustive
def test_a_name_that_is_no_text_ends_no_command(python, here):
    name = "run-\udcff"
    done = python("-m", "snapcore", "train", "--model", "mlp", "--epochs", "1", "--cycles", "1", "--output", name)
    assert (done.code, done.err) == (0, "")
    assert python("-m", "snapcore", "evaluate", name).code == 0


@pytest.mark.exhaustive
def test_tensorflow_begins_without_notes_of_its_own(python):
    done = python("-m", "snapcore", "backends")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^tensorflow: tensorflow \d", done.out, re.MULTILINE)


@pytest.mark.parametrize(("cause", "code"), [("KeyboardInterrupt()", 130), ("OSError()", 1)])
def test_ctrl_c_while_a_class_is_made_is_one_line_too(python, cause, code):
    """Python 3.11 wraps what is raised then in a RuntimeError."""
    stop = (
        f"import snapcore.lab.cli as cli\ndef stop(*words): raise RuntimeError('made') from {cause}\ncli.run = stop\n"
    )
    done = python("-c", stop + "from snapcore.lab import main; main()")
    assert done.code == code
    assert ("snapcore: interrupted" in done.err) == (code == 130)
    assert ("Traceback" in done.err) == (code == 1)


def test_ctrl_c_before_there_is_anything_to_resume_is_one_line(python):
    code = "import snapcore.lab.cli as cli\ndef stop(*words): raise KeyboardInterrupt\ncli.describe_run = stop\n"
    done = python("-c", code + "from snapcore.lab import main; main()", "inspect", "run")
    assert (done.code, done.out) == (130, "")
    assert done.refusal == "snapcore: interrupted"
