"""What messages promise: every option and argument that one of them names exists, and each fits on a line."""

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import typer

from snapcore.lab.cli import app

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("snapcore/**/*.py"), *ROOT.glob("backends/**/*.py")])
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
ARGUMENT = re.compile(r"(?<![\w.\-{}'\"])([a-z][a-z_0-9]*)=(?![=>])")
RAISING = re.compile(r"Error|Warning|BadParameter|warn|warning|info")
MOST_WORDS = 30
COUNTS = {"examples", "until_next", "u"}  # said of what is there, as in examples=3
FRAMEWORKS = {
    "wrt": "flax.nnx:Optimizer.__init__",
    "axis": "keras.ops:softmax",
    "from_logits": "keras.losses:SparseCategoricalCrossentropy",
    "steps_per_execution": "keras:Model.compile",
    "lr_scheduler_type": "transformers:TrainingArguments",
    "optimizers": "transformers:Trainer",
    "persistent": "torch.nn:Module.register_buffer",
    "vocabulary": "keras.layers:StringLookup",
    "generator": "torch.utils.data:DataLoader.__init__",
    "persistent_workers": "torch.utils.data:DataLoader.__init__",
}
"""Arguments of others that a message names, and whose."""


def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def text_of(node):
    """A literal's text; what is filled in counts as one word."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{}"
    return ""


def literals(tree):
    """Yield every text of a module that is no docstring and no part of another."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
    yield from (text for node in ast.walk(tree) if node not in skipped and (text := text_of(node)))


def messages(tree):
    """Yield the first text of every call that raises, warns or notes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if RAISING.search(called) and (text := text_of(node.args[0])):
                yield text


def arguments():
    """The names of all parameters and fields, of whatever has no underscore before its name."""
    names = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names.update(each.arg for each in every)
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                fields = [line.target for line in node.body if isinstance(line, ast.AnnAssign)]
                names.update(field.id for field in fields if isinstance(field, ast.Name))
    return names


def options():
    """What the command line takes, of all commands."""
    root = typer.main.get_command(app)
    every = [root, *root.commands.values()]
    found = {word for command in every for option in command.params for word in (*option.opts, *option.secondary_opts)}
    return found | {"--help"}


def named(pattern):
    return sorted(
        {
            (str(path.relative_to(ROOT)), name)
            for path, tree in trees().items()
            for text in literals(tree)
            for name in pattern.findall(text)
        }
    )


def test_every_option_that_a_message_names_exists():
    known, found = options(), named(OPTION)
    assert [each for each in found if each[1] not in known] == []
    assert {"--no-resume", "--data-dir", "--output", "--trust-model"} <= {name for _, name in found}


def test_every_argument_that_a_message_names_exists():
    known, found = arguments() | COUNTS, named(ARGUMENT)
    assert {name for _, name in found} - known <= FRAMEWORKS.keys()
    assert {"resume", "init"} <= {name for _, name in found}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_argument_of_a_framework_that_a_message_names_is_one_of_its(name):
    module, _, path = FRAMEWORKS[name].partition(":")
    owner = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    assert name in inspect.signature(owner).parameters


@pytest.mark.parametrize("path", sorted(ROOT.glob("snapcore/lab/**/*.py")), ids=lambda path: path.stem)
def test_a_message_of_the_application_is_one_line_of_at_most_thirty_words(path):
    found = list(messages(ast.parse(path.read_text(encoding="utf-8"))))
    assert [text for text in found if len(text.split()) > MOST_WORDS or "\n" in text] == []


def test_what_schedule_plans_train_can_do():
    commands = typer.main.get_command(app).commands
    planned, done = (
        {word for option in commands[name].params for word in option.opts} for name in ("schedule", "train")
    )
    assert planned - done == {"--steps", "--plot"}
