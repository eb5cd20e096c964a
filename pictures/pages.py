"""A page beside each result, and in each run: one HTML file that needs no network and no library.

A page is `page.html` with its data in it, as JSON. The page's script lays the data out, always as text.
"""

import argparse
import base64
import io
import json
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from poses.pose import HAND_EDGES, LIMBS, Pose, is_seen
from poses.source import Driver, uniform_frames
from safe.files import alone_with, finish_set, read_json, replacing, replacing_set
from safe.provenance import SYNTHETIC
from safe.results import REPORT, endings_of, not_ours, write_report
from safe.settings import FIELDS, inputs_of
from video import cover, fit_frame, read_frames, write_video

PAGE = ".html"
TEMPLATE = Path(__file__).with_name("page.html")
START, END = '<script type="application/json" id="data">', "</script>"
EMBEDDED = 24_000_000  # bytes: a larger video stays beside the page, which then needs it
MOST_FRAMES, THUMBNAIL = 24, 256  # training frames on a page, and how high they are in pixels


def fill(data: dict) -> str:
    """The page that shows this data. No text in it can end the script that it stands in."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text("utf-8").split("DATA", 1)
    return before + text + after


def read_data(page: Path) -> dict:
    """The data of a page that `fill` made. Raises OSError and ValueError."""
    _, _, rest = page.read_text("utf-8").partition(START)
    data = json.loads(rest.partition(END)[0] or "null")
    if not isinstance(data, dict):
        raise ValueError(f"{page}: no page of a result")
    return data


# ---- What is on a page --------------------------------------------------------------------------


def result_data(
    args: argparse.Namespace, video: Path, run, driver: Driver, poses: Sequence[Pose], report: dict
) -> dict:
    """What the page of a result shows: its video, what it follows, and the `Run` that it was made with."""
    height, width = run.frames.shape[1:3]
    manifest, kept = report["manifest"], {"manifest", "proportions", "edited_regions", "remarks"}
    facts = [f"{len(poses)} frames", f"{width} × {height}", f"{report['fps']:g} frames per second"]
    facts += [f"method {report['method']}", f"reference: training frame {report['reference']}"]
    rows = [[words(name), told(value)] for name, value in report.items() if name not in kept]
    if report["proportions"]:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in report["proportions"].items())
        rows.append(["the person's proportions by the driver's", ratios])
    if regions := report["edited_regions"]:
        counts = ", ".join(f"{words(part)} {count}" for part, count in regions.items())
        rows.append(["parts edited, in so many frames", counts])
    weights = [[f"weights of {name}", value] for name, value in manifest["weights"].items()]
    data = page_data(run.folder, run.settings, run.frames, run.poses) | {
        "kind": "result",
        "kicker": "PoseCrafter result · synthetic",
        "title": video.stem,
        "facts": facts,
        "fps": report["fps"],
        "frames": len(poses),
        "first": driver.within.start,
        "poses": [flat(pose) for pose in poses],
        "reference": report["reference"],
        "videos": [{"name": "result", "about": "what was made", **embedded(video)}],
        "commands": [["The command", args.command]],
        "settings": rows,
        "manifest": [[words(n), told(v)] for n, v in manifest.items() if n != "weights"] + weights,
        "footer": SYNTHETIC,
    }
    remarks = [f"{remark[0].upper()}{remark[1:]}." for remark in report["remarks"]]
    data["remarks"] = remarks + unedited(report, len(poses)) + data["remarks"]
    if footage := footage_of(args.poses, run, driver, report["fps"]):
        data["videos"].append(footage)
    return data


def run_data(folder: Path, settings: dict, frames: np.ndarray, poses: Sequence[Pose], command: str) -> dict:
    """What the page of a run shows, from its folder and what it was trained on."""
    height, width = frames.shape[1:3]
    facts = [f"{len(frames)} training frames", f"{width} × {height}", f"{settings['steps']} steps"]
    now = f"python sample.py --run {shlex.quote(str(folder))} --poses POSES"
    data = page_data(folder, settings, frames, poses) | {"kind": "run", "title": folder.resolve().name}
    return data | {
        "kicker": "PoseCrafter run",
        "facts": [*facts, f"learning rate {settings['learning_rate']:g}"],
        "commands": [["The command", command], ["Now", now]],
        "settings": [[words(name), told(settings[name])] for name in FIELDS if name in settings],
        "footer": f"Poses that do not fit the frames train a wrong model. Made from {settings['clip']}.",
    }


def page_data(folder: Path, settings: dict, frames: np.ndarray, poses: Sequence[Pose]) -> dict:
    """What both pages show: how a run was trained, on frames uint8 (N, H, W, 3)."""
    height, width = frames.shape[1:3]
    shown = uniform_frames(range(len(frames)), min(len(frames), MOST_FRAMES))
    loss, outcome = read_loss(folder / "loss.csv"), {}
    if (folder / "training.json").is_file():
        outcome = read_json(folder / "training.json")
    remarks = []
    if outcome.get("worse"):
        losses = " to ".join(f"{loss:.4f}" for _, loss in (loss["fixed"][0], loss["fixed"][-1]))
        worse = f"Training made the model worse: {losses} on fixed noises"
        remarks.append(f"{worse}. Train again with --lr {settings['learning_rate'] / 10:g}.")
    return {
        "width": width,
        "height": height,
        "limbs": LIMBS.tolist(),
        "hand_edges": HAND_EDGES.tolist(),
        "training": [
            {"number": settings["frames"][i], "image": thumbnail(frames[i]), "pose": flat(poses[i])}
            for i in shown
        ],
        "loss": loss,
        "remarks": remarks,
        "videos": [],
        "figures": [],
        "manifest": [],
        "reference": None,
    }


def flat(pose: Pose) -> list[list[float | None]]:
    """Body, face and hands as x, y, x, y, ... from 0 to 1, None for what is not seen."""
    parts = []
    for part in vars(pose).values():
        points = np.where(is_seen(part)[:, None], part[:, :2], np.nan).astype(float).round(4).ravel()
        parts.append([None if np.isnan(each) else each for each in points.tolist()])
    return parts


def thumbnail(frame: np.ndarray) -> str:
    """A frame uint8 (H, W, 3) as a small JPEG, in a data URL."""
    image, file = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((2 * THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def embedded(video: Path) -> dict[str, str]:
    """A video for the page's data: in base64, or, where it is too large, its name."""
    if video.stat().st_size > EMBEDDED:
        return {"file": video.name}
    return {"base64": base64.b64encode(video.read_bytes()).decode()}


def footage_of(path: Path, run, driver: Driver, fps: float) -> dict[str, str] | None:
    """The frames that the poses are of, if any, on the run's canvas; the training clip's are the truth."""
    own = path.resolve() in inputs_of(run.settings)
    if not own and driver.fps is None:
        return None
    source = Path(run.settings["clip"]) if own else path
    height, width = run.frames.shape[1:3]
    try:
        frames, _ = read_frames(source, driver.within)
    except (OSError, ValueError) as error:
        print(f"{source}: not shown on the page: {error}")
        return None
    placing = cover(*frames.shape[1:3], height, width)
    names = ("truth", "the training clip itself") if own else ("driver", "whose poses are followed")
    return encoded(*names, (fit_frame(frame, placing) for frame in frames), fps)


def encoded(name: str, about: str, frames: Iterable[np.ndarray], fps: float) -> dict[str, str] | None:
    """Frames uint8 (H, W, 3) as a video of a page's data; None where it would be too large."""
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "video.mp4"
        write_video(video, frames, fps)
        data = embedded(video)
    return {"name": name, "about": about, **data} if "base64" in data else None


def read_loss(path: Path) -> dict[str, list]:
    """What `train.py` logged: `steps` as [step, loss], and `fixed` likewise, of the loss on fixed noises."""
    loss = {"steps": [], "fixed": []}
    try:
        for row in path.read_text().splitlines()[1:]:
            step, timestep, value = row.split(",")
            loss["fixed" if timestep == "fixed" else "steps"].append([int(step), float(value)])
    except (OSError, ValueError):  # of a run from elsewhere, or changed: the page goes without
        return {"steps": [], "fixed": []}
    return loss


def unedited(report: dict, frames: int) -> list[str]:
    """Says which parts were left as sampling makes them, in how many frames."""
    if not report["edit"]:
        return []
    regions = dict.fromkeys(("face", "left_hand", "right_hand"), 0) | report["edited_regions"]
    missed = {words(part): frames - n for part, n in regions.items() if n < frames}
    told = ", ".join(f"{part} in {n} of {frames} frames" for part, n in missed.items())
    why = "they are not seen in both poses, or turned too far"
    return [f"Parts left unedited, because {why}: {told}."] if missed else []


def words(name: str) -> str:
    return name.replace("_", " ")


def told(value: object) -> str:
    """A value of a report for people."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


# ---- Writing ------------------------------------------------------------------------------------


def write_page(path: Path, data: dict) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(fill(data), "utf-8")


def add_figures(result: Path, titles: dict[str, str], truth: np.ndarray | None = None) -> Path | None:
    """Shows what `evaluate.py` measured on the page of a result, and the true frames uint8 (F, H, W, 3) if given.

    titles: of the metrics, by name. Page and report are replaced together. Returns the page; None where there is
    none, or where one of the result's files is not as it was written.
    """
    page, report = result.with_suffix(PAGE), result.with_suffix(REPORT)
    with alone_with(result):
        finish_set(result, endings_of(result))
        if not (page.is_file() and report.is_file()) or not_ours(result):
            return None
        data = read_data(page)
        data["figures"] = []
        for each in read_json(result.with_suffix(".metrics.json"))["measurements"]:
            rows = [[titles.get(name, name), f"{value:.4g}"] for name, value in each["metrics"].items()]
            data["figures"].append({"title": compared(each), "rows": rows})
        if truth is not None and (video := encoded("truth", "the true frames", truth, data["fps"])):
            data["videos"] = [each for each in data["videos"] if each["name"] != "truth"] + [video]
        with replacing_set(result, (PAGE, REPORT)) as folder:
            write_page(folder / page.name, data)
            write_report(folder / result.name, read_json(report))
    return page


def compared(measurement: dict) -> str:
    """What a result was compared with, such as "truth: dance.mp4, range: 0:48"."""
    inputs = measurement["inputs"]
    values = (Path(each).name if isinstance(each, str) else told(each) for each in inputs.values())
    return ", ".join(f"{name}: {value}" for name, value in zip(inputs, values))
