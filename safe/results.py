"""The files of a result: they replace only results of this program, and can be verified later."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from safe.files import alone_with, finish_set, read_json, replacing_set, write_json
from safe.process import Shown, in_words, printable
from safe.provenance import SYNTHETIC, VERSION, file_hash, read_manifest

REPORT = ".json"  # how a report's name ends
# What lies beside a video: the sheet, the poses, the page if there is one, and the report, which comes last.
BESIDE = (".png", ".poses.json", ".html", REPORT)
LONGEST_NAME = 200  # bytes of a video's name; systems allow 255, of which unfinished files take some


def endings_of(out: Path) -> tuple[str, ...]:
    return out.suffix, *BESIDE


@contextmanager
def claiming(out: Path, videos: tuple[str, ...], inputs: list[Path]) -> Iterator[None]:
    """Keeps the files of a result for this process.

    First moves a result to its place that a killed process had written, but not moved. Raises ValueError where a
    result cannot lie, or would replace an input or what this program did not write, and OSError where another
    process is making it.
    """
    check_place(out, videos, inputs)
    with alone_with(out):
        finish_set(out, endings_of(out))
        if wrong := not_ours(out):
            raise ValueError(f"{out}: would overwrite {wrong[0]}; move it away, or choose another --out")
        yield


def replacing_result(out: Path) -> AbstractContextManager[Path]:
    """A folder for the files of a result, as `replacing_set` has it; what others wrote meanwhile stays."""
    return replacing_set(out, endings_of(out), partial(not_ours, out))


def check_place(out: Path, videos: tuple[str, ...], inputs: list[Path]) -> None:
    """Raises ValueError where a result cannot lie, or would replace an input."""
    if not out.name:
        raise ValueError(f"{out}: is a folder; choose another --out")
    endings = endings_of(out)
    written = [out.with_suffix(ending).resolve() for ending in endings]
    wrong = [f"would overwrite {path}" for path in inputs if path.resolve() in written]
    folders = [path for path in inputs if path.is_dir() and path.resolve() == written[0].parent]
    wrong += [f"would lie among the frames in {folder}" for folder in folders]
    files = [folder for folder in out.parents if folder.exists() and not folder.is_dir()]
    wrong += [f"{folder} is a file, not a folder" for folder in files]
    if out.suffix.lower() not in videos:
        wrong.append(f"a video's name must end in {' or '.join(videos)}")
    if out.is_dir():
        wrong.append("is a folder")
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        wrong.append(f"a video's name may have {LONGEST_NAME} bytes at most")
    if wrong:
        raise ValueError(f"{out}: {wrong[0]}; choose another --out")


def not_ours(out: Path) -> list[str]:
    """Which files of a result that is to be replaced are not as this program wrote them."""
    endings = endings_of(out)
    files = [out.with_suffix(ending) for ending in endings if out.with_suffix(ending).exists()]
    report = out.with_suffix(REPORT)
    if not files:
        return []
    if report not in files:
        return [f"{files[0]}, beside which lies no report {report.name} of a result"]
    if not (hashes := read_hashes(report)):
        return [f"{report}, which is no report of a result, or was changed"]
    changed = (
        each for each in files[:-1] if not each.is_file() or file_hash(each) != hashes.get(each.name)
    )
    wrong = [f"{file}, which is not the file that {report.name} says was written" for file in changed]
    others = hashes.keys() - {out.with_suffix(ending).name for ending in endings}
    return wrong + [f"{report}, which is the report of {other}" for other in others]


def report_of(
    args: argparse.Namespace, run, prompt: str, method, k: int, guidance_until: int, files: dict[str, Path]
) -> dict:
    """How a result is made, from training frame k of a `Run` by a `Method`: the report's beginning.

    files: those that the networks were filled from. The manifest goes to strangers, so it names no folders.
    """
    told = {name: getattr(args, name) for name in ("guidance", "ddim_steps", "reuse", "seed")}
    told |= {name: getattr(method, name) for name in ("start", "replay", "fixed_point")} | {
        "prompt": prompt,
        "guidance_until": guidance_until,
        "method": method.name,
        "edit": method.parts and method.parts.__name__,
        "edit_step": method.step_of_edit(args.ddim_steps) if method.parts else None,
        "inserted": method.insert,
        "reference": run.settings["frames"][k],
    }
    hashes = {path: file_hash(path) for path in set(files.values())}
    manifest = {"version": VERSION, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    manifest |= {"model": Path(run.settings["model"]).name, "run": run.folder.resolve().name}
    manifest |= {"poses": args.poses.resolve().name} | told
    manifest["weights"] = {name: f"{path.name} {hashes[path]}" for name, path in files.items()}
    told |= {name: run.settings[name] for name in ("learning_rate", "learning_rate_from")}
    return told | {"run": str(run.folder), "poses": str(args.poses), "manifest": manifest}


def write_report(out: Path, report: dict) -> None:
    """Writes the report of a result with the hashes of its files, as far as they lie beside it, and of itself."""
    files = [file for ending in (out.suffix, *BESIDE[:-1]) if (file := out.with_suffix(ending)).exists()]
    report = report | {"files": report.get("files", {}) | {file.name: file_hash(file) for file in files}}
    write_json(out.with_suffix(REPORT), report | {"sha256": hash_of(report)})


def hash_of(report: dict) -> str:
    """The SHA-256 of what a report says, however it is laid out."""
    said = json.loads(json.dumps({name: value for name, value in report.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_hashes(report: Path) -> dict[str, str] | None:
    """The hashes of a result's files; None where this is no report, or was changed."""
    try:
        read = read_json(report)
    except (OSError, ValueError):
        return None
    ours = isinstance(read, dict) and isinstance(read.get("files"), dict)
    return read["files"] if ours and read.get("sha256") == hash_of(read) else None


def verify(path: Path) -> bool:
    """Prints how a file was made, and whether it is as it was written. Raises ValueError for one without marks."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a video or a sheet that sample.py wrote")
    if (manifest := read_manifest(path)) is None:
        raise ValueError(f"{path}: has no marks of PoseCrafter: made otherwise, or they were removed")
    print(f"{path}: {SYNTHETIC}")
    for name, value in manifest.items():
        for within, each in value.items() if isinstance(value, dict) else [("", value)]:
            text = each if isinstance(each, str) and each.isprintable() else json.dumps(each)
            print(f"{name} {within}".strip() + f": {text}")
    report = path.with_suffix(REPORT)
    hashes = read_hashes(report) if report.exists() else None
    same = bool(hashes) and hashes.get(path.name) == file_hash(path)
    if same:
        found = f"is the file that was written: {report.name} has its SHA-256"
    elif hashes:
        found = f"WAS CHANGED after it was written: {report.name} has another SHA-256"
    else:
        damaged, missing = (
            f"{report} is no report, or was changed itself",
            f"its report {report.name} is not beside it",
        )
        found = f"whether it was changed cannot be said: {damaged if report.exists() else missing}"
    print(f"{path}: {found}")
    return same


class Verify(argparse.Action):
    """An option that answers at once, as `--help` does: exit code 0 for a file as it was written, else 2."""

    def __call__(self, parser: argparse.ArgumentParser, _, path: Path, *__) -> None:
        try:
            with redirect_stdout(Shown(sys.stdout)):
                same = verify(path)
        except (OSError, ValueError) as error:
            parser.exit(2, f"{parser.prog}: {printable(in_words(error))}\n")
        parser.exit(0 if same else 2)
