"""Draw schedules and programs as SVG, from the very values that a run follows, and the core from its import rules.

The documentation's build draws its pictures with this; `python docs/draw.py` draws those that are committed in
`_static`: `schedule.svg`, for the README, and `architecture.svg`. All colours are mid-tones, legible on a light and on
a dark page.
"""

import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from snapcore import METHODS, CosineCycles, CycleWarning, Program, Restart, Schedule, Snapshot, StepDecay, Stop, Train
from snapcore import program as program_of

BLUE, ORANGE, GREY, TEXT = "#3b82f6", "#e0690b", "#8b949e", "#6e7781"

WIDTH, HEIGHT = 330, 120
"""Of one panel, in pixels."""
MARGIN, TOP, FLAG = 30, 46, 24
"""The room beside and below it, the room above it, and what a flag takes of that, in pixels."""
SCALE, RATE, ROW = 3.6, 60, 28
"""Of a method's picture: pixels per update, the same in all, so that lengths compare as costs do; and heights."""

PAGE, LINE, GAP, WING = 700, 16, 10, 3
"""Of the picture of the core: its width, a line of text and the gap between boxes in pixels; a wing is this many times
as wide as a file."""
STAGES = {
    "schedule": "planned",
    "protocol": "planned",
    "run": "taken",
    "store": "kept",
    "ensemble": "averaged",
    "lab": "shown",
}
"""What happens to a member where."""

Scale = Callable[[float], float]


def main() -> None:
    """Write the pictures that are committed."""
    for name, picture in committed_pictures().items():
        path = Path(__file__).parent / "_static" / name
        path.write_text(picture, encoding="utf-8")
        print(f"wrote {path}")


def committed_pictures() -> dict[str, str]:
    """Draw the pictures that are committed, by file name."""
    return {"schedule.svg": readme_picture(), "architecture.svg": architecture_picture()}


def readme_picture() -> str:
    """Draw the two schedules that the project is about, side by side."""
    return chart(
        ("snapshot: six cosine cycles, six members", CosineCycles(lr=0.2, steps=300, cycles=6)),
        ("the usual step schedule, one model", StepDecay(lr=0.2, steps=300)),
    )


def pictures() -> dict[str, str]:
    """Draw what the documentation shows, by file name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CycleWarning)  # a cycle that is cut short is what one picture is about
        charts = {
            "cycles": chart(("", CosineCycles(lr=0.2, steps=300, cycles=6)), width=600),
            "remainders": chart(
                ('remainder="paper"', CosineCycles(lr=0.2, steps=100, cycles=8)),
                ('remainder="even"', CosineCycles(lr=0.2, steps=100, cycles=8, remainder="even")),
            ),
            "options": chart(
                ("warmup_steps=60", CosineCycles(lr=0.2, steps=300, cycles=4, warmup_steps=60)),
                ("lr_min=0.05", CosineCycles(lr=0.2, steps=300, cycles=4, lr_min=0.05)),
            ),
            "decay": chart(
                ("snapshots=1", StepDecay(lr=0.2, steps=300)),
                ("snapshots=6", StepDecay(lr=0.2, steps=300, snapshots=6)),
            ),
        }
    methods = {method: program_picture(program_of(method, lr=0.1, steps=60, cycles=3)) for method in METHODS}
    return {f"{name}.svg": picture for name, picture in {**charts, **methods}.items()}


def chart(*panels: tuple[str, Schedule], width: int = WIDTH) -> str:
    """Draw titled schedules beside each other: the rate of every update, and a flag at every snapshot."""
    parts: list[str] = []
    for index, (title, schedule) in enumerate(panels):
        parts += _panel(title, schedule, MARGIN + index * (width + MARGIN), width)
    name = "; ".join(title for title, _ in panels if title) or "learning rate over the updates"
    return _svg(MARGIN + len(panels) * (width + MARGIN), TOP + HEIGHT + MARGIN, name, parts)


def program_picture(program: Program) -> str:
    """Draw a program: above its rates and snapshots, below its weights, in a new row wherever they start afresh."""
    x, base = _linear(MARGIN, SCALE), TOP + RATE
    y = _linear(base, -RATE / program.schedule.lr)
    row, begun, branch = base + ROW, 0, (0.0, 0)
    parts = [*_rates(program.schedule, x, y), _start(x(0), row)]
    for instruction in program:
        match instruction:
            case Train(start, stop):
                begun = stop
                parts.append(_line(f"M{x(start) + 5:.1f} {row}H{x(stop):.1f}", BLUE, 2.5))
            case Snapshot(index, step):
                branch = (x(step), row) if index == 1 else branch
                parts += _member(x(step), row, index)
            case Restart("fresh"):
                row += ROW
                parts.append(_start(x(begun), row))
            case Restart("first"):
                row += ROW
                parts.append(_line(f"M{branch[0]:.1f} {branch[1] + 9}V{row}H{x(begun) + 5:.1f}", GREY, 1.5, "4 3"))
            case Stop():
                parts.append(_line(f"M{x(begun) + 14:.1f} {row - 8}v16", GREY, 3))
    parts.append(_text(MARGIN, 14, f"{program.updates} updates"))
    return _svg(round(x(program.updates)) + MARGIN, row + ROW // 2 + 4, f"the program of {program.method}", parts)


def architecture_picture() -> str:
    """Draw who may import whom in the core: the layers that import-linter checks, the topmost first.

    A wing, which is a folder, lists its own layers. The adapters are drawn beside the application: neither imports the
    other.
    """
    rules = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    layers = {
        container: [re.split(r" *[|:] *", layer) for layer in contract["layers"]]
        for contract in rules["contracts"]
        if contract["type"] == "layers"
        for container in contract["containers"]
    }
    core, *adapters = rules["root_packages"]
    parts, y = [], 8
    for layer in layers[core]:
        boxes = [(name, [" · ".join(inner) for inner in layers.get(f"{core}.{name}", [])]) for name in layer]
        if "lab" in layer:
            boxes.append(("backends", adapters))
        height = LINE * max(len(inner) for _, inner in boxes) + LINE + GAP
        shares = [WING if inner else 1 for _, inner in boxes]
        share, x = (PAGE - GAP * (len(boxes) - 1)) / sum(shares), float(MARGIN)
        for (name, inner), weight in zip(boxes, shares, strict=True):
            parts += _box(x, y, share * weight, height, name, inner)
            x += share * weight + GAP
        y += height + GAP
    parts.append(_line(f"M16 8V{y - GAP}m-4 -7l4 7l4 -7", GREY, 1.5))
    parts.append(_text(11, y / 2, "imports", "middle", turned=True))
    return _svg(MARGIN + PAGE + GAP, y, "who may import whom in snapcore, and what happens to a member where", parts)


def _box(x: float, y: float, width: float, height: float, name: str, inner: list[str]) -> Iterator[str]:
    """Draw a file, or a folder with the lines that list what is in it."""
    colour, dashes = (GREY, "none") if not inner else (BLUE, "4 3" if name == "backends" else "none")
    size = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" rx="5"'
    yield f'<rect {size} fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dashes}"/>'
    yield _text(x + GAP, y + LINE + 1, f"{name}/" if inner else f"{name}.py", weight="600")
    if name in STAGES:
        yield _text(x + width - GAP, y + height - GAP + 1, STAGES[name], "end", colour=ORANGE)
    for row, text in enumerate(inner, 2):
        yield _text(x + GAP, y + row * LINE + 1, text)


def _panel(title: str, schedule: Schedule, left: int, width: int) -> Iterator[str]:
    bottom = TOP + HEIGHT
    yield _text(left, 14, title, weight="600")
    yield _text(left - 9, TOP + HEIGHT / 2, "learning rate", "middle", turned=True)
    yield _text(left + width, bottom + 17, f"{schedule.steps} updates", "end")
    yield from _rates(schedule, _linear(left, width / schedule.steps), _linear(bottom, -HEIGHT / schedule.lr))


def _linear(offset: float, factor: float) -> Scale:
    return lambda value: offset + factor * value


def _rates(schedule: Schedule, x: Scale, y: Scale) -> Iterator[str]:
    """Draw the axes, the rate of each update as a tread of its width, and a flag on every snapshot's last rate."""
    yield _line(f"M{x(0):.1f} {y(schedule.lr):.1f}V{y(0):.1f}H{x(schedule.steps):.1f}", GREY, 1)
    rates = [f"{y(schedule(step)):.1f}" for step in range(schedule.steps)]
    changes = [step for step in range(1, schedule.steps) if rates[step] != rates[step - 1]]
    treads = "".join(f"H{x(step):.1f}V{rates[step]}" for step in changes)
    yield _line(f"M{x(0):.1f} {rates[0]}{treads}H{x(schedule.steps):.1f}", BLUE, 1.8)
    yield from (_flag(x(step), rates[step - 1]) for step in schedule.snapshot_steps)


def _flag(x: float, foot: str) -> str:
    """Plant a flag; it flies to the left, where a cycle's rate is low."""
    return (
        f'<path d="M{x:.1f} {foot}v-{FLAG}l-11 4.5l11 4.5" fill="{ORANGE}" stroke="{ORANGE}" stroke-width="1.5" '
        'stroke-linejoin="round"/>'
    )


def _start(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="none" stroke="{BLUE}" stroke-width="1.8"/>'


def _member(x: float, y: float, index: int) -> Iterator[str]:
    yield f'<circle cx="{x:.1f}" cy="{y}" r="8.5" fill="{ORANGE}"/>'
    yield _text(x, y + 4, str(index), "middle", weight="600", colour="#ffffff")


def _line(path: str, colour: str, width: float, dashes: str = "none") -> str:
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    *,
    weight: str = "400",
    colour: str = TEXT,
    turned: bool = False,
) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{colour}"{turn}>'
        f"{escaped}</text>"
    )


def _svg(width: int, height: int, name: str, parts: Iterable[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    font = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">'
    title = name.replace('"', "")
    return "\n".join((head, f"<title>{title}</title>", *parts, "</svg>")) + "\n"


if __name__ == "__main__":
    main()
