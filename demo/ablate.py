"""What each part of the method is worth, on puppets: `python demo/ablate.py`, a few hours on a laptop.

Trains on puppets that the demo model has never seen and has them dance another dance, with the parts of
the method added one by one, and beside two ways that need no diffusion. Then the method's settings, one
at a time. Poses come from the renderer, so that the method is measured and not the pose finder.

Every run of every puppet, a cell, is kept in `runs/ablate/`: an interrupted command goes on where it
stopped. `demo/RESULTS.md` and the pictures beside it are made of the cells that exist, and of nothing else
(`--only-report`: without computing any).
"""

import argparse
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from beyond.pseudo import METHODS
from checkpoint import locate, read_settings
from demo.cells import (
    FIGURES,
    REPAINTED,
    REPAINTING,
    SHOWN,
    SIZE,
    VIDEO_SIM,
    Cell,
    cell_path,
    compute,
    load_figures,
    load_strip,
    repaint,
    set_scene,
    shown,
)
from demo.dance import HELD_OUT, TRAINING_FRAMES
from demo.puppet import random_puppet
from metrics.pictures import FAINT, INK, LINE, PAPER
from posecrafter import ddim_timesteps, training_steps
from poses.pose import draw_pose
from video import contact_sheet, replacing, save_image

# ---- What is run --------------------------------------------------------------------------------

LONG_CLIP = 72  # frames, where the number of training frames varies: 36 are too few for 64
ALPHA_STEPS = 50  # DDIM steps of the sweep over the edit step, as in the paper
ALPHAS = (1, 5, 10, 20, 30, 40, 50)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DDIM_STEPS = (10, 20, 50)
PARTS = (
    "main",
    "harder",
    *(f"replay-{steps}" for steps in DDIM_STEPS),
    "replay-hard",
    "attributes",
    "alpha",
    "frames",
    "rate",
    "interpolation",
    "steps",
)
SETTINGS = read_settings(locate("demo"))


def full_method(identity: int, seed: int, args: argparse.Namespace) -> Cell:
    return Cell(
        identity=identity,
        seed=seed,
        source="inversion",
        training_frames=8,
        clip_frames=TRAINING_FRAMES,
        training_steps=args.training_steps or training_steps(8),
        learning_rate=SETTINGS["learning_rate"],
        insert=True,
        edit="face,hands",
        edit_step=1,
        hold=False,
        replay=False,
        fixed_point=0,
        interpolation="bilinear",
        dance="facing",
        driver="own",
        repainted="",
        guidance=0.0,
        guidance_until=0,
        ddim_steps=args.ddim_steps,
        target_frames=args.target_frames,
        target_every=args.target_every,
    )


COPY, WARP, MOVED, UNTRAINED = "copy", "warp", "pseudo video", "no fine-tuning"
NOISE, INVERSION, INSERTION, FULL, BODY = (
    "noise start",
    "+ selection and inversion",
    "+ insertion",
    "+ latent editing",
    "whole body",
)
HELD = "held to the pseudo video"
ROWS = {
    COPY: "the reference, the training frame that the method selects, repeated",
    WARP: "the reference's latent warped limb by limb to the pose, and decoded: no diffusion",
    MOVED: "the training frames' person cut out and put into the pose part by part: no diffusion either",
    UNTRAINED: "the full method with the base weights",
    NOISE: "fine-tuned, sampling from random noise: ControlVideo without true frames to start from",
    INVERSION: "from the inverted reference instead of noise",
    INSERTION: "and the reference in front, as key frame",
    FULL: "and face and hands moved in the first latent: the paper's full method",
    BODY: "beyond the paper: all parts of the body moved, after a fifth of the steps "
    "(`--method body --no-replay`)",
    HELD: "and from there on held to the pseudo video (`--method held --no-replay`)",
}
PAIRS = (
    (INVERSION, NOISE),
    (INSERTION, INVERSION),
    (FULL, INSERTION),
    (FULL, COPY),
    (FULL, WARP),
    (FULL, UNTRAINED),
    (BODY, FULL),
    (HELD, BODY),
    (HELD, FULL),
    (HELD, COPY),
    (HELD, WARP),
    (HELD, MOVED),
)


def ablation(full: Cell) -> dict[str, Cell]:
    """The rows of the main table, by name. What has no effect is 0, so that equal cells are one."""
    untrained = replace(full, training_steps=0, learning_rate=0.0)
    undrawn = replace(untrained, ddim_steps=0, insert=False, edit="none", edit_step=0)
    unedited = replace(full, edit="none", edit_step=0)
    uninserted = replace(unedited, insert=False)
    body = replace(full, edit="body", edit_step=METHODS["body"].edits_before(full.ddim_steps))
    return {
        COPY: replace(undrawn, source="copy"),
        WARP: replace(undrawn, source="warp"),
        MOVED: replace(undrawn, source="moved"),
        UNTRAINED: untrained,
        NOISE: replace(uninserted, source="noise"),
        INVERSION: uninserted,
        INSERTION: unedited,
        FULL: full,
        BODY: body,
        HELD: replace(body, hold=True),
    }


def harder(full: Cell) -> dict[str, Cell]:
    """Poses unlike any of the training clip's, each with the pseudo video, the paper's method and ours."""
    kinds = {
        "turning": replace(full, dance="turning"),
        "crossed arms": replace(full, dance="crossed"),
        "another's poses": replace(full, driver="literal"),
        "another's, retargeted": replace(full, driver="retargeted"),
    }
    ways = (MOVED, FULL, HELD)
    return {
        f"{kind}: {'full' if way == FULL else way}": ablation(cell)[way]
        for kind, cell in kinds.items()
        for way in ways
    }


AS_IT_IS, BOTH = "as it is", "both"
KEY_FRAME = {  # how the key frame gets back from noise, beyond the paper: replay, iterations of inversion
    AS_IT_IS: (False, 0),
    "replay": (True, 0),
    "fixed point": (False, 2),
    BOTH: (True, 2),
}
KEY_FRAME_FIGURES = {
    name: FIGURES[name]
    for name in ("psnr", "psnr_person", "psnr_face", "psnr_hands", "psnr_background", "ssim")
}
METHOD_ROWS = {"paper": FULL, "body": BODY, "held": HELD}


def key_frames(full: Cell, ways: Iterable[str] = KEY_FRAME) -> dict[str, Cell]:
    """Each method, with its key frame sampled as the paper does or in one of the other ways."""
    rows = ablation(full)
    return {
        f"{method}: {way}": replace(rows[row], replay=KEY_FRAME[way][0], fixed_point=KEY_FRAME[way][1])
        for method, row in METHOD_ROWS.items()
        for way in ways
    }


def hard_key_frames(full: Cell) -> dict[str, Cell]:
    """The same with poses unlike any of the training clip's, in 10 steps."""
    return {
        f"{dance}, {name}": cell
        for dance in ("turning", "crossed")
        for name, cell in key_frames(replace(full, dance=dance, ddim_steps=10), (AS_IT_IS, BOTH)).items()
    }


NOT_TOLD, GUIDED = "not told", "guidance 3"
WORDS = {  # guidance scales, and the timestep until which they count
    NOT_TOLD: (0.0, 0),
    "told": (1.0, 0),
    GUIDED: (3.0, SETTINGS["guidance_until"]),
    f"{GUIDED}, to the end": (3.0, 0),
}


def repainting(full: Cell) -> dict[str, Cell]:
    """Each of REPAINTED, without and with a prompt that tells the colour it should have."""
    return {
        f"{name}, {way}": replace(full, repainted=name, guidance=scale, guidance_until=until)
        for name in REPAINTED
        for way, (scale, until) in WORDS.items()
    }


def plan(args: argparse.Namespace) -> dict[str, list[dict[str, Cell]]]:
    """For each part a list with one entry per puppet and seed: what is compared there, by name."""
    subjects = [(identity, seed) for seed in range(args.seeds) for identity in range(args.identities)]
    swept = [full_method(identity, 0, args) for identity in range(args.sweep_identities)]
    moved = [full_method(identity, 0, args) for identity in range(args.identities)]
    haired = [one for one in swept if random_puppet(one.identity).hair_shape != "bald"]

    def trained_on(full: Cell, frames: int) -> Cell:
        steps = args.training_steps or training_steps(frames)
        return replace(full, training_frames=frames, clip_frames=LONG_CLIP, training_steps=steps)

    sweeps = {
        "alpha": lambda full: {
            str(step): replace(full, ddim_steps=ALPHA_STEPS, edit_step=step) for step in ALPHAS
        },
        "frames": lambda full: {str(n): trained_on(full, n) for n in args.training_frames},
        "rate": lambda full: {f"{rate:g}": replace(full, learning_rate=rate) for rate in RATES},
        "interpolation": lambda full: {
            "none": replace(full, edit="none", edit_step=0),
            "nearest": replace(full, interpolation="nearest"),
            "bilinear": full,
        },
        "steps": lambda full: {str(n): replace(full, ddim_steps=n) for n in DDIM_STEPS},
    }
    parts = {
        "main": [ablation(full_method(*subject, args)) for subject in subjects],
        "harder": [harder(full) for full in moved],
        "replay-hard": [hard_key_frames(full) for full in moved],
        "attributes": [repainting(full) for full in haired],
    }
    for steps in DDIM_STEPS:
        several = [replace(full, ddim_steps=steps) for full in moved]
        parts[f"replay-{steps}"] = [key_frames(full) for full in several]
    parts |= {part: [points(full) for full in swept] for part, points in sweeps.items()}
    return {part: parts[part] for part in PARTS if part in args.parts}


# ---- The report ---------------------------------------------------------------------------------

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; more have the last one's, which is on the safe side.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of (n,) values and half the width of its 95 % interval; not a number for one value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    t = T[min(len(values) - 1, len(T)) - 1]
    return float(values.mean()), float(t * values.std(ddof=1) / np.sqrt(len(values)))


Values = dict[str, dict[str, np.ndarray]]  # by name in a part, then by figure: (identities,)


def gather(work: Path, points: Sequence[dict[str, Cell]]) -> tuple[Values, list[dict[str, Cell]]]:
    """The figures of a part, seeds averaged, and which puppets and seeds they are from.

    Only puppets and seeds of which all cells exist: every name's mean is over the same ones.
    """
    done = [cells for cells in points if all(cell_path(work, c).exists() for c in cells.values())]
    values: Values = {}
    for name in done[0] if done else ():
        by_identity: dict[int, list[dict]] = {}
        for cells in done:
            found = load_figures(work, cells[name])
            by_identity.setdefault(cells[name].identity, []).append(found)
        values[name] = {
            figure: np.array(
                [np.mean([f.get(figure, np.nan) for f in each]) for each in by_identity.values()]
            )
            for figure in FIGURES | VIDEO_SIM | REPAINTING
        }
    return values, done


def pairs(values: Values) -> Values:
    """The main table's differences, puppet by puppet."""
    return {
        " − ".join("full" if name == FULL else name for name in (a, b)): {
            figure: values[a][figure] - values[b][figure] for figure in FIGURES
        }
        for a, b in PAIRS
    }


def gained(values: Values) -> Values:
    """What each way of KEY_FRAME adds to its method as it is, puppet by puppet."""
    gains = {}
    for name, row in values.items():
        method, _, way = name.partition(": ")
        if way != AS_IT_IS:
            before = values[f"{method}: {AS_IT_IS}"]
            gains[f"{method}: {way}"] = {f: row[f] - before[f] for f in KEY_FRAME_FIGURES}
    return gains


def markdown_table(values: Values, first: str, figures: dict, signed: bool = False) -> str:
    """Means with 95 % intervals; differences are signed, and bold where the interval excludes 0."""
    lines = [f"| {first} | " + " | ".join(title for title, _, _ in figures.values()) + " |"]
    lines += ["| --- |" + " ---: |" * len(figures)]
    for name, row in values.items():
        entries = []
        for figure, (_, form, _) in figures.items():
            mean, half = interval(row[figure])
            text = f"{mean:{'+' if signed else ''}{form}}"
            text += f" ± {half:{form}}" if np.isfinite(half) else ""
            entries.append(f"**{text}**" if signed and abs(mean) > half else text)
        lines += [f"| {name} | " + " | ".join(entries) + " |"]
    return "\n".join(lines)


def draw(path: Path, values: Values, x_title: str, figures: dict) -> None:
    """One panel per figure, under each other: its mean and 95 % interval at each point, evenly spaced.

    Puppets differ more than settings do, so the intervals are of what differs within puppets.
    """
    double, width, panel = 2, 720, 210  # drawn twice as large and averaged down
    font = ImageFont.load_default(size=13 * double)
    left, right, top, bottom = (double * side for side in (70, 30, 36, 34))
    width, panel = width * double, panel * double
    image = Image.new("RGB", (width, panel * len(figures)), PAPER)
    pen = ImageDraw.Draw(image)
    x = np.linspace(left + 20 * double, width - right, len(values))
    for row, (figure, (title, form, _)) in enumerate(figures.items()):
        found = np.array([point[figure] for point in values.values()])  # (points, puppets)
        within = found - found.mean(axis=0) + found.mean()
        spans = np.array([interval(point) for point in within])  # (points, 2)
        means, halves = spans[:, 0], np.nan_to_num(spans[:, 1])
        low, high = (means - halves).min(), (means + halves).max()
        ceiling, floor = row * panel + top, (row + 1) * panel - bottom

        def height(value, low=low, span=(high - low) or 1, ceiling=ceiling, floor=floor):
            return floor - (floor - ceiling) * (value - low) / span

        pen.text((left, ceiling - top // 2), title[:-2], INK, font, anchor="lm")
        for value in (low, high):
            pen.line((left, height(value), width - right, height(value)), FAINT, double)
            pen.text((left - 6 * double, height(value)), f"{value:{form}}", INK, font, anchor="rm")
        for i, name in enumerate(values):
            ends = height(means[i] - halves[i]), height(means[i] + halves[i])
            pen.line((x[i], ends[0], x[i], ends[1]), INK, double)
            pen.text((x[i], floor + bottom // 2), name, INK, font, anchor="mm")
        pen.line(list(zip(x, height(means))), LINE, 2 * double, joint="curve")
        pen.text((width - right, ceiling - top // 2), x_title, INK, font, anchor="rm")
    save_image(path, image.reduce(double))


def draw_sheet(path: Path, work: Path, done: Sequence[dict[str, Cell]]) -> None:
    """Two puppets in their first seed: pose, truth and every row."""
    rows = {}
    for cells in [cells for cells in done if cells[FULL].seed == done[0][FULL].seed][:2]:
        scene, who = set_scene(cells[FULL]), cells[FULL].identity
        drawn = [draw_pose(pose, SIZE, SIZE) for pose in scene.targets]
        rows |= {f"{who}: pose": shown(drawn), f"{who}: truth": shown(scene.truth)}
        rows |= {f"{who}: {name}": load_strip(work, cell) for name, cell in cells.items()}
    save_image(path, contact_sheet(rows, cell_height=SIZE))


def draw_words(path: Path, work: Path, done: Sequence[dict[str, Cell]]) -> None:
    """All puppets: truth, and what guided words made of it."""
    rows = {}
    for cells in done:
        told = [cells[f"{name}, {GUIDED}"] for name in REPAINTED]
        who = told[0].identity
        rows[f"{who}: truth"] = shown(set_scene(told[0]).truth)
        rows |= {f"{who}: {repaint(cell)[1]}": load_strip(work, cell) for cell in told}
    save_image(path, contact_sheet(rows, cell_height=SIZE))


WITHIN = "The bars are 95 % intervals of what differs within puppets."
SWEEPS = {  # each part's heading, first column, and what was done
    "alpha": (
        "When to edit",
        "edit step",
        f"Latent editing before this one of {ALPHA_STEPS} DDIM steps; later ones take the inversion's "
        "latent of that step.",
    ),
    "frames": (
        "How many training frames",
        "frames",
        f"Uniformly from a clip of {LONG_CLIP} frames, trained for {{steps}} steps. (By the paper's "
        "formula, and never fewer than 50, unless the command above says otherwise.)",
    ),
    "rate": ("Learning rate", "rate", "Of AdamW; the demo model's own is {rate:g}."),
    "interpolation": (
        "How latent editing reads the reference",
        "read",
        "None: no editing. Averaging neighbours, as bilinear reading does, takes variance from noise.",
    ),
    "steps": ("DDIM steps", "steps", "Of inversion and sampling alike."),
}
HARDER = (
    "Dances of which the training clip shows nothing: a body that turns to its sides, arms crossed over the "
    "chest; and the poses of another puppet, of 100 held-out ones the one whose build differs most. It does "
    "the same dance, so the truth is the puppet's own; PCK asks for the poses that were followed."
)
REPLAY = (
    "The key frame is sampled like the others (as it is); replayed: at every step it is the latent that inversion "
    "passed; fixed point: each inversion step has two further iterations; or both."
)
ATTRIBUTES = (
    "The prompt names another colour, with several guidance scales, which count down to timestep "
    f"{SETTINGS['guidance_until']}, or to the end. The truth is the puppet as it is, and repainted."
)
PLOTTED = {
    "alpha": ("edit step", ("psnr_person", "ssim", "psnr_face", "psnr_hands", "temporal")),
    "frames": ("training frames", ("psnr", "psnr_person", "video_sim")),
}


def explain(figures: dict) -> str:
    return "\n".join(f"- {title[:-2]}: {meaning}." for title, _, meaning in figures.values())


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))


def describe(done: Sequence[dict[str, Cell]]) -> str:
    """The puppets, seeds and settings of a part's cells."""
    cells = [cell for row in done for cell in row.values()]
    clips = listed(cell.clip_frames for cell in cells)
    counts = {
        "puppets": listed(cell.identity for cell in cells),
        "seeds": listed(cell.seed for cell in cells),
        "target frames": listed(cell.target_frames for cell in cells),
        "training frames": f"{listed(c.training_frames for c in cells)} of {clips}",
        "training steps": listed(c.training_steps for c in cells if c.training_steps),
        "DDIM steps": listed(c.ddim_steps for c in cells if c.ddim_steps),
    }
    text = "; ".join(f"{name} {numbers}" for name, numbers in counts.items())
    return f"Clips in each row: {len(done)} ({text})."


def command(args: argparse.Namespace, parts: Sequence[str]) -> str:
    """The command that computes what is reported."""
    options = ["target_frames", *(["target_every"] if args.target_every > 1 else []), "ddim_steps"]
    options += ["training_steps"] if args.training_steps else []
    swept = {part for part in parts if not part.startswith(("main", "hard", "replay"))}
    options += ["identities"] if set(parts) - swept else []
    options += ["seeds"] if "main" in parts else []
    options += ["sweep_identities"] if swept else []
    words = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in options]
    if "frames" in parts:
        words += [f"--training-frames {' '.join(map(str, args.training_frames))}"]
    return f"python demo/ablate.py {' '.join(words)} --parts {' '.join(parts)}"


def report(args: argparse.Namespace) -> None:
    """Writes RESULTS.md and its pictures from the cells that exist, and says so where none do."""
    gathered = {part: gather(args.work, points) for part, points in plan(args).items()}
    gathered = {part: found for part, found in gathered.items() if found[1]}
    if not gathered:
        print(f"{args.work}: no puppet has all cells of a part yet, so there is nothing to report")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    text = [
        "# What each part of the method is worth, on puppets",
        "Written by `demo/ablate.py`, from its own runs alone. The puppets are new to the demo model, "
        f"which was trained on those from {HELD_OUT:,} on; frames are {SIZE}x{SIZE} pixels, fewer than the "
        "demo's. The poses asked for are those of another dance than the training clip's, and come from the "
        "renderer. A seed changes training, noise and both dances. Means are over puppets, seeds averaged "
        "first, with 95 % intervals (Student's t over puppets).",
        f"    {command(args, list(gathered))}",
        "Figures (↑: higher is better, ↓: lower is better):\n\n" + explain(FIGURES),
    ]
    if "main" in gathered:
        values, done = gathered["main"]
        draw_sheet(args.out / "results_sheet.png", args.work, done)
        rows = "\n".join(f"- `{name}`: {meaning}." for name, meaning in ROWS.items())
        text += [
            "## The method, part by part",
            describe(done),
            rows,
            markdown_table(values, "", FIGURES),
            "Paired differences, puppet by puppet; bold where the interval excludes 0:",
            markdown_table(pairs(values), "", FIGURES, signed=True),
            "![Pose, truth and every row of two puppets](results_sheet.png)",
            f"Up to {SHOWN} frames of each clip, evenly spaced; the numbers count them.",
        ]
    if "harder" in gathered:
        values, done = gathered["harder"]
        kinds = dict.fromkeys(name.split(":")[0] for name in values)
        gains = {
            f"{kind}: {HELD} − full": {
                figure: values[f"{kind}: {HELD}"][figure] - values[f"{kind}: full"][figure]
                for figure in FIGURES
            }
            for kind in kinds
        }
        text += ["## Harder poses", HARDER, describe(done), markdown_table(values, "", FIGURES)]
        text += ["Paired differences:", markdown_table(gains, "", FIGURES, signed=True)]
    replays = {f"replay-{steps}": f"The key frame, {steps} steps" for steps in DDIM_STEPS}
    for part, heading in (replays | {"replay-hard": "The key frame, harder poses"}).items():
        if part not in gathered:
            continue
        values, done = gathered[part]
        text += [f"## {heading}", REPLAY, describe(done), markdown_table(values, "", KEY_FRAME_FIGURES)]
        gains = markdown_table(gained(values), "", KEY_FRAME_FIGURES, signed=True)
        text += ["Paired differences from the same method as it is:", gains]
    if "attributes" in gathered:
        values, done = gathered["attributes"]
        text += ["## Words", ATTRIBUTES, describe(done), explain(REPAINTING)]
        draw_words(args.out / "results_words.png", args.work, done)
        text += [
            markdown_table(values, "", REPAINTING),
            f"With {GUIDED}:",
            "![True frames, and other hair, shirts and lower garments](results_words.png)",
        ]
    for part, (heading, first, meaning) in SWEEPS.items():
        if part not in gathered:
            continue
        values, done = gathered[part]
        figures = FIGURES | VIDEO_SIM if part == "frames" else FIGURES
        steps = ", ".join(str(cell.training_steps) for cell in done[0].values())
        meaning = meaning.format(steps=steps, rate=SETTINGS["learning_rate"])
        text += [f"## {heading}", meaning, describe(done)]
        text += [explain(VIDEO_SIM)] if part == "frames" else []
        text += [markdown_table(values, first, figures)]
        if part in PLOTTED:
            x_title, names = PLOTTED[part]
            picture = f"results_{part}.png"
            draw(args.out / picture, values, x_title, {name: figures[name] for name in names})
            text += [f"![Means over the {x_title}]({picture})", WITHIN]
    with replacing(args.out / "RESULTS.md") as unfinished:
        unfinished.write_text("\n\n".join(text) + "\n")
    print(f"Look at {args.out / 'RESULTS.md'}; the pictures are beside it.")


# ---- The command line ---------------------------------------------------------------------------


def parse_arguments(command: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--identities", type=int, default=8, help="puppets 0, 1, ... (default: 8)")
    parser.add_argument("--seeds", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--sweep-identities", type=int, default=4, help="of sweeps (default: 4)")
    parser.add_argument("--target-frames", type=int, default=24, help="(default: 24)")
    parser.add_argument(
        "--target-every", type=int, default=1, help="of the dance's frames, every so many (default: 1)"
    )
    parser.add_argument("--ddim-steps", type=int, default=20, help="(default: 20)")
    parser.add_argument("--training-steps", type=int, help="(default: the paper's, 100 for 8 frames)")
    parser.add_argument(
        "--training-frames",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16, 32, 64],
        help=f"of the frames sweep, up to {LONG_CLIP} (default: 2 4 8 16 32 64)",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--processes", type=int, default=1, help="that share the work (default: 1)")
    parser.add_argument("--only-report", action="store_true", help="compute nothing; report what there is")
    parser.add_argument("--work", type=Path, default=Path("runs/ablate"), help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder of the report (default: demo)"
    )
    return parser, parser.parse_args(command)


def main(args: argparse.Namespace) -> None:
    if not 1 <= args.identities <= 500 or not 1 <= args.sweep_identities <= 500:
        raise ValueError("1 to 500 puppets: more would dance the next seed's dances")
    if (
        args.seeds < 1
        or args.target_frames < 2
        or args.target_every < 1
        or (args.training_steps is not None and args.training_steps < 1)
    ):
        raise ValueError(
            "give 1 or more --seeds, --training-steps, --target-every, and 2 or more --target-frames"
        )
    ddim_timesteps(args.ddim_steps)  # refuses a number that makes no schedule
    if not all(1 <= frames <= LONG_CLIP for frames in args.training_frames):
        raise ValueError(f"--training-frames: there are {LONG_CLIP} to choose from")
    wanted = [cell for rows in plan(args).values() for row in rows for cell in row.values()]
    missing = [c for c in dict.fromkeys(wanted) if not cell_path(args.work, c).exists()]
    if missing and not args.only_report:
        compute(missing, args.work, args.processes)
    report(args)


if __name__ == "__main__":
    parser, args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end as by Ctrl-C, workers too
    try:
        main(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"ablate.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "ablate.py: stopped; the same command goes on from here\n")
