"""What each part of the method is worth, on puppets: `python demo/ablate.py --parts main`, hours on a laptop.

Trains on puppets that the demo model has never seen and has them dance another dance, with the parts of the method
added one by one, and beside three ways that need no diffusion. Other parts change the method's settings, one at a
time. Poses come from the renderer, so that the method is measured and not the pose finder.

Every trial of every puppet is kept in `runs/ablate/`: an interrupted command goes on where it stopped.
`demo/RESULTS.md` and the pictures beside it are made of what is there (`--only-report`: without computing more).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from beyond.pseudo import METHODS
from checkpoint import read_settings
from demo import cells
from demo.cells import FIGURES, cell_path, load_figures, shown
from demo.puppet import random_puppet
from demo.scene import REPAINTED, Trial, set_scene
from pictures.sheets import contact_sheet
from posecrafter import ddim_timesteps
from public.places import locate
from safe.files import replacing
from safe.process import keep_freed_memory, run_command
from video import save_image

# ---- What is compared ---------------------------------------------------------------------------

# By name: the fields of a `Trial`, or of its `Method`, that differ from the paper's full method.
Rows = dict[str, dict]


def crossing(outer: Rows, inner: Rows) -> Rows:
    """Every row of one table with every row of another."""
    return {f"{a}: {b}": outer[a] | inner[b] for a in outer for b in inner}


# fmt: off
NOISE, INVERSION, INSERTION = "noise start", "+ selection and inversion", "+ insertion"
FULL, BODY, HELD = "+ latent editing", "whole body", "held to the pseudo video"
COPY, WARP, MOVED, UNTRAINED = "copy", "warp", "pseudo video", "no fine-tuning"
MAIN = {
    COPY: {"way": cells.repeat_reference},
    WARP: {"way": cells.warp_reference},
    MOVED: {"way": cells.move_person},
    UNTRAINED: {"training_steps": 0},
    NOISE: {"parts": None, "insert": False, "start": "noise"},
    INVERSION: {"parts": None, "insert": False},
    INSERTION: {"parts": None},
    FULL: {},
    BODY: {"way": METHODS["body"], "replay": False},
    HELD: {"way": METHODS["held"], "replay": False},
}
MAIN_PAIRS = (
    (INVERSION, NOISE), (INSERTION, INVERSION), *((FULL, other) for other in (INSERTION, COPY, WARP, UNTRAINED)),
    (BODY, FULL), *((HELD, other) for other in (BODY, FULL, COPY, WARP, MOVED)),
)
HARDER = {
    "turning": {"dance": "turning"}, "crossed arms": {"dance": "crossed"},
    "another's poses": {"driver": "literal"}, "another's, retargeted": {"driver": "retargeted"},
}
KEY_FRAME = {  # how it gets back from noise, beyond the paper
    "as it is": {"replay": False}, "replay": {"replay": True},
    "fixed point": {"replay": False, "fixed_point": 2}, "both": {"replay": True, "fixed_point": 2},
}
KEY_FRAMES = crossing({name: {"way": method} for name, method in METHODS.items()}, KEY_FRAME)
WORDS = {
    "not told": {}, "told": {"guidance": 1},
    "guidance 3": {"guidance": 3, "guidance_until": read_settings(locate("demo"))["guidance_until"]},
    "guidance 3, to the end": {"guidance": 3},
}
PARTS: dict[str, Rows] = {  # rows are compared with the first one whose name begins with the same words
    "main": MAIN,
    "harder": crossing(HARDER, {row: MAIN[row] for row in (FULL, MOVED, HELD)}),
    **{f"replay-{n}": crossing({f"{n} steps": {"ddim_steps": n}}, KEY_FRAMES) for n in (10, 20, 50)},
    "replay-hard": crossing(
        {kind: HARDER[kind] | {"ddim_steps": 10} for kind in ("turning", "crossed arms")},
        {name: changes for name, changes in KEY_FRAMES.items() if name.endswith(("as it is", "both"))},
    ),
    "attributes": crossing({part: {"repainted": part} for part in REPAINTED}, WORDS),
    "alpha": {f"step {n} of 50": {"ddim_steps": 50, "edit_step": n} for n in (1, 5, 10, 20, 30, 40, 50)},
    "frames": {f"{n} of 72": {"training_frames": n, "clip_frames": 72} for n in (8, 2, 4, 16, 32, 64)},
    "rate": {"the model's own": {}} | {f"{rate:g}": {"learning_rate": rate} for rate in (3e-4, 3e-3, 1e-2)},
    "interpolation": {
        "bilinear": {}, "nearest pixel": {"editor": cells.edit_by_nearest}, "no editing": MAIN[INSERTION],
    },
    "steps": {f"{n} steps": {"ddim_steps": n} for n in (10, 20, 50)},
}
# fmt: on
TRIAL_OPTIONS = ("target_frames", "target_every", "ddim_steps", "training_steps")


def changed(full: Trial, changes: dict) -> Trial:
    """The trial with other fields, its own and those of its method."""
    own = {name: value for name, value in changes.items() if hasattr(full, name)}
    of_method = {name: value for name, value in changes.items() if name not in own}
    trial = replace(full, **own)
    return replace(trial, way=replace(trial.way, **of_method)) if of_method else trial


def plan(args: argparse.Namespace) -> dict[str, list[dict[str, Trial]]]:
    """For each part a list with one entry per puppet: its trials, by the names of the rows."""
    options = {name: getattr(args, name) for name in TRIAL_OPTIONS}
    fulls = [Trial(identity, **options) for identity in range(args.identities)]
    haired = [full for full in fulls if random_puppet(full.identity).hair_shape != "bald"]
    planned = {}
    for part in args.parts:
        subjects, rows = haired if part == "attributes" else fulls, PARTS[part].items()
        planned[part] = [{row: changed(full, changes) for row, changes in rows} for full in subjects]
    return planned


# ---- The report ---------------------------------------------------------------------------------

ABOUT = """# What each part of the method is worth, on puppets

`demo/ablate.py` wrote this; [docs/RESULTS.md](../docs/RESULTS.md) explains the rows. The demo model has not seen
these puppets. Frames have 128x128 pixels. The renderer gives the poses, of another dance than the training clip's.
Means are over puppets, with 95 % intervals (Student's t). ↑: higher is better, ↓: lower is better."""

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; more have the last one's, which is on the safe side.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
Table = dict[str, np.ndarray]  # by row: all FIGURES of all puppets, (puppets, figures)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of (N,) values and half the width of its 95 % interval; not a number for one value."""
    if len(values) == 1:
        return float(values[0]), float("nan")
    t = T[min(len(values) - 1, len(T)) - 1]
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(len(values)))


def differences(values: Table, pairs: Sequence[tuple[str, str]] = ()) -> Table:
    """Puppet by puppet: by default from the first row whose name begins with the same words up to a colon."""
    first = {row.rpartition(": ")[0]: row for row in reversed(values)}
    pairs = pairs or [(row, first[row.rpartition(": ")[0]]) for row in values if row not in first.values()]
    return {f"{a} − {b}": values[a] - values[b] for a, b in pairs}


def markdown_table(values: Table, signed: bool = False) -> str:
    """Means with 95 % intervals; differences are signed, and bold where the interval excludes 0."""
    measured = np.isfinite(next(iter(values.values()))).all(axis=0)
    titles, forms, _ = zip(*(figure for figure, there in zip(FIGURES.values(), measured) if there))
    lines = [f"|  | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    for row, found in values.items():
        entries = []
        for form, (mean, half) in zip(forms, map(interval, found.T[measured])):
            text = f"{mean:{'+' if signed else ''}{form}}"
            text += f" ± {half:{form}}" if np.isfinite(half) else ""
            entries.append(f"**{text}**" if signed and abs(mean) > half else text)
        lines.append(f"| {row} | {' | '.join(entries)} |")
    return "\n".join(lines)


def draw_sheet(path: Path, work: Path, done: Sequence[dict[str, Trial]]) -> None:
    """The first two puppets: truth and all rows."""
    clips = {}
    for row, trial in [named for trials in done[:2] for named in trials.items()]:
        clips[f"{trial.identity}: {trial.dance}, truth"] = shown(set_scene(trial).truth)
        clips[f"{trial.identity}: {row}"] = np.load(cell_path(work, trial))["frames"]
    save_image(path, contact_sheet(clips, height=128))


def report(args: argparse.Namespace) -> None:
    """Writes RESULTS.md and its pictures from the puppets that have all cells of a part."""
    text = []
    for part, subjects in plan(args).items():
        done = [each for each in subjects if all(cell_path(args.work, t).exists() for t in each.values())]
        if not done:
            continue
        values = {row: np.stack([load_figures(args.work, each[row]) for each in done]) for row in done[0]}
        gains = differences(values, MAIN_PAIRS if part == "main" else ())
        args.out.mkdir(parents=True, exist_ok=True)
        draw_sheet(args.out / f"sheet_{part}.png", args.work, done)
        text += [f"## {part}", f"{len(done)} of {len(subjects)} puppets.", markdown_table(values)]
        text += ["Differences, puppet by puppet; bold where the interval excludes 0:"]
        text += [markdown_table(gains, signed=True), f"![Truth and all rows](sheet_{part}.png)"]
    if not text:
        print(f"{args.work}: no puppet has all cells of a part yet, so there is nothing to report")
        return
    given = {name: getattr(args, name) for name in ("identities", *TRIAL_OPTIONS)}
    options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None]
    command = f"    python demo/ablate.py {' '.join(options)} --parts {' '.join(args.parts)}"
    meanings = "\n".join(f"- {title}: {meaning}." for title, _, meaning in FIGURES.values())
    with replacing(args.out / "RESULTS.md") as unfinished:
        unfinished.write_text("\n\n".join([ABOUT, command, meanings, *text]) + "\n")
    print(f"Look at {args.out / 'RESULTS.md'}; the pictures are beside it.")


# ---- The command line ---------------------------------------------------------------------------


def parse_arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--identities", type=int, default=8, help="puppets 0, 1, ... (default: 8)")
    parser.add_argument("--target-frames", type=int, default=24, help="default: 24")
    parser.add_argument("--target-every", type=int, default=1, help="of the dance's frames (default: 1)")
    parser.add_argument("--ddim-steps", type=int, default=20, help="default: 20")
    parser.add_argument("--training-steps", type=int, help="default: the paper's, 100 for 8 frames")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--only-report", action="store_true", help="compute nothing; report what there is")
    parser.add_argument("--work", type=Path, default=Path("runs/ablate"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: demo")
    return parser.parse_args(command)


def main(args: argparse.Namespace) -> None:
    if min(args.identities, args.target_every, args.target_frames - 1) < 1:
        raise ValueError("give 1 or more --identities and --target-every, and 2 or more --target-frames")
    ddim_timesteps(args.ddim_steps)  # refuses a number that makes no schedule
    wanted = [trial for subjects in plan(args).values() for trials in subjects for trial in trials.values()]
    missing = [trial for trial in dict.fromkeys(wanted) if not cell_path(args.work, trial).exists()]
    if missing and not args.only_report:
        cells.compute(missing, args.work)
    report(args)


if __name__ == "__main__":
    keep_freed_memory()
    run_command("ablate.py", main, parse_arguments(), stopped="stopped; the same command goes on from here")
