"""The documentation's examples run as they stand, and its pictures are those that the code draws.

A page is read from top to bottom, in an empty folder and one namespace. Of its fenced blocks, `python` is executed or,
where it has prompts, checked as a doctest; of `console`, the `$ snapcore …` lines are run and what they print is
compared, if the page shows it. `<!-- example: torch -->` above a block gives it what its reader is taken to have.
"""

import contextlib
import doctest
import io
import re
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from snapcore import METHODS, program
from snapcore.lab.cli import app, run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- example: (\w+) -->\n)?^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def torch_scene():
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return {
        "epochs": 20,
        "loader": DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,))), batch_size=10),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss_fn": torch.nn.CrossEntropyLoss(),
    }


def jax_scene():
    import jax
    import jax.numpy as jnp
    import optax

    def apply_fn(params, x):
        return x @ params["w"]

    def train_step(tx, params, opt_state, x, y):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    x, y = jax.random.normal(jax.random.key(0), (40, 4)), jnp.arange(40) % 3
    return {
        "epochs": 20,
        "data": [(x[k : k + 10], y[k : k + 10]) for k in range(0, 40, 10)],
        "params": {"w": jnp.zeros((4, 3))},
        "train_step": train_step,
        "apply_fn": apply_fn,
    }


def keras_scene():
    import keras

    x, y = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32), np.arange(40) % 3
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    return {"epochs": 20, "updates_per_epoch": 4, "x": x, "y": y, "model": model}


def tensorflow_scene():
    import keras
    import tensorflow as tf

    scene = keras_scene()
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def make_train_step(model, optimizer):
        @tf.function
        def train_step(x, y):
            with tf.GradientTape() as tape:
                loss = loss_fn(y, model(x, training=True))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        return train_step

    data = tf.data.Dataset.from_tensor_slices((scene["x"], scene["y"])).batch(10)
    return {**scene, "data": data, "loss_fn": loss_fn, "make_train_step": make_train_step}


SCENES = {"torch": torch_scene, "jax": jax_scene, "keras": keras_scene, "tensorflow": tensorflow_scene}


def check_doctest(text, names, page, line):
    report = io.StringIO()
    test = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), line)
    doctest.DocTestRunner(optionflags=LENIENT).run(test, out=report.write, clear_globs=False)
    assert not report.getvalue(), report.getvalue()
    names.update(test.globs)


def check_console(text, page, line):
    for command in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        typed, _, shown = command.partition("\n")
        program_name, *arguments = shlex.split(typed)
        assert program_name == "snapcore", f"{page.name}:{line}: only snapcore can be run, not {typed}"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = run(arguments)
        assert code == 0, f"{page.name}:{line}: {typed} ended with {code}"
        if shown.strip():
            got = "".join(f"{row.rstrip()}\n" for row in printed.getvalue().splitlines())
            assert doctest.OutputChecker().check_output(shown.strip() + "\n", got.strip() + "\n", LENIENT), got


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_a_page_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "88")
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        scene, language, code = block.groups()
        line = text.count("\n", 0, block.start(3))
        names.update(SCENES[scene]() if scene else {})
        if language == "console":
            check_console(code, page, line)
        elif code.startswith(">>>"):
            check_doctest(code, names, page, line)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), names)


def test_every_fenced_block_of_a_page_is_closed_and_named():
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) % 2 == 0, page.name
        assert not any(fences[1::2]), page.name


def test_every_method_is_described_and_drawn():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for method in METHODS:
        assert f"\n### {method}\n" in text
        assert f"_build/made/{method}.svg" in text


def test_every_command_is_described_with_its_help():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert f"\n## {command.callback.__name__}\n" in text
        assert f"_build/made/help-{command.callback.__name__}.txt" in text


def test_the_pictures_that_are_committed_are_what_the_code_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw.py"))["committed_pictures"]()
    committed = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "_static").glob("*.svg")}
    assert committed == drawn, "run python docs/draw.py"


def test_the_picture_of_the_core_has_every_module_and_every_import_in_it_points_downwards():
    picture = ElementTree.parse(ROOT / "docs" / "_static" / "architecture.svg")
    height = {text.text: float(text.get("y")) for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    core = ROOT / "snapcore"
    files = {path.stem: [path] for path in core.glob("*.py") if path.stem != "__init__"}
    wings = {path.parent.name: list(path.parent.rglob("*.py")) for path in core.glob("*/__init__.py")}
    boxes = {**{name: f"{name}.py" for name in files}, **{name: f"{name}/" for name in wings}}
    assert set(boxes.values()) == {name for name in height if name.endswith((".py", "/"))} - {"backends/"}
    for name, sources in {**files, **wings}.items():
        text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
        for imported in set(re.findall(r"^ *(?:from|import) snapcore\.(\w+)", text, re.MULTILINE)) - {name}:
            assert height[boxes[name]] < height[boxes[imported]], (name, imported)


def test_the_page_on_the_architecture_walks_by_every_stage_and_every_door():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    stages = runpy.run_path(str(ROOT / "docs" / "draw.py"))["STAGES"]
    life = re.findall(r"^\*\*(\w+)\*\* \((.*?)\)\.", page, re.MULTILINE)
    assert {name: stage.lower() for stage, where in life for name in re.findall(r"`(\w+)", where)} == stages
    for path in (ROOT / "snapcore").glob("*/__init__.py"):
        assert f"door is `snapcore.{path.parent.name}`" in " ".join(page.split())


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_picture_has_a_number_for_every_member_and_a_start_for_every_fresh_one(method):
    drawn = program(method, lr=0.1, steps=60, cycles=3)
    picture = runpy.run_path(str(ROOT / "docs" / "draw.py"))["pictures"]()[f"{method}.svg"]
    shapes = list(ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}circle"))
    texts = [text.text for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    members = len(drawn.schedule.snapshot_steps)
    assert texts == [*(str(number) for number in range(1, members + 1)), f"{drawn.updates} updates"]
    open_circles = sum(shape.get("fill") == "none" for shape in shapes)
    assert open_circles == (members if drawn.between.source == "fresh" else 1)
