"""What goes wrong around a run: numbers, disk, memory, signals, other processes, changed folders."""

# ruff: noqa: F811

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

# `workplace` and `trained` are its fixtures, taken from there.
from test_commands import SAMPLE, TRAIN, main, refusal, trained, workplace  # noqa: F401

import evaluate
import safe.files
import sample
import train
from command import sampling_arguments, training_arguments
from posecrafter import training_loss
from poses.pose import load_poses
from run import load_run
from safe.process import in_words, printable, run_command
from safe.results import verify
from safe.settings import FIELDS, read_run_settings
from safe.tensors import load_state
from video import write_video

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared" / "cases"
FOUR = (*TRAIN, "--frames", 4)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.fixture(scope="session")
def interrupted(workplace, trained) -> Path:
    """A run that was interrupted in its third step, with a checkpoint of the second."""
    folder, calls = workplace / "runs" / "interrupted_once", []

    def failing(*inputs):
        calls.append(1)
        if len(calls) == len(train.FIXED_TIMESTEPS) + 3:
            raise KeyboardInterrupt
        return training_loss(*inputs)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(train, "SAVE_EVERY", 0)
        patches.setattr(train, "training_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            main(workplace, *FOUR, "--run", folder)
    return folder


@pytest.fixture
def unfinished(workplace, interrupted) -> Iterator[Path]:
    folder = workplace / "runs" / "unfinished"
    shutil.copytree(interrupted, folder)
    yield folder
    shutil.rmtree(folder)


def same_weights(one: Path, other: Path) -> bool:
    one, other = (load_file(folder / "trained.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- Numbers ------------------------------------------------------------------------------------


def test_a_weight_that_is_not_finite_is_named_and_the_last_checkpoint_stays(workplace, unfinished, trained):
    before = (unfinished / "training_state.pt").read_bytes()
    step, done = torch.optim.AdamW.step, []

    def spoiling(optimizer, *rest):
        step(optimizer, *rest)
        done.append(1)
        optimizer.param_groups[0]["params"][1].data.view(-1)[0] = float("inf")

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(train, "SAVE_EVERY", 0)
        patches.setattr(torch.optim.AdamW, "step", spoiling)
        with pytest.raises(
            FloatingPointError, match=r"^after step 3, unet\.\S+ is not finite; .*--lr 0.0001$"
        ):
            main(workplace, *FOUR, "--run", unfinished)
    assert (unfinished / "training_state.pt").read_bytes() == before
    main(workplace, *FOUR, "--run", unfinished)
    assert same_weights(unfinished, trained)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.fill_(float("nan")), "has values that are not finite; train again"),
        (lambda t: t.index_fill_(0, torch.tensor([0]), float("inf")), "has values that are not finite"),
        (lambda t: t.int(), "has numbers of type torch.int32, not floats; train again"),
        (lambda t: t.to(torch.complex64), "has numbers of type torch.complex64, not floats"),
    ],
)
def test_trained_weights_must_be_finite_floats(workplace, trained, change, words):
    folder = workplace / "runs" / "spoilt"
    shutil.copytree(trained, folder)
    tensors = load_file(folder / "trained.safetensors")
    name = sorted(tensors)[3]
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "trained.safetensors")
    line = refusal(workplace, *SAMPLE, "--run", "runs/spoilt")
    assert line == f"runs/spoilt/trained.safetensors: {name} {words}" or (words in line and name in line)
    shutil.rmtree(folder)


def first_moment(state: dict) -> dict:
    return state["optimizer"]["state"][0]


DAMAGES = {
    "its step is not one of 0 to 3": [
        lambda s: s.update(step=4),
        lambda s: s.update(step=-1),
        lambda s: s.update(step=True),
        lambda s: s.update(step="2"),
    ],
    "is not finite": [
        lambda s: next(iter(s["parameters"].values())).fill_(float("nan")),
        lambda s: first_moment(s)["exp_avg"].fill_(float("inf")),
        lambda s: first_moment(s)["step"].fill_(float("nan")),
    ],
    "does not belong to this model": [
        lambda s: s["parameters"].update(more=torch.ones(2)),
        lambda s: s["parameters"].popitem(),
        lambda s: first_moment(s).update(exp_avg_sq=torch.ones(3)),
        lambda s: first_moment(s).update(exp_avg=torch.ones(1).expand(10**12)),
        lambda s: first_moment(s).update(more=torch.ones(2)),
        lambda s: first_moment(s).pop("step"),
    ],
    "is of type torch.float16": [
        lambda s: first_moment(s).update(exp_avg=first_moment(s)["exp_avg"].half())
    ],
    "it does not hold losses, optimizer,": [lambda s: s.update(more=1), lambda s: s.pop("losses")],
    "states of the optimizer for": [lambda s: s["optimizer"]["state"].update({99_999: {}})],
    "its losses are not those of 2 steps": [
        lambda s: s["losses"].pop(),
        lambda s: s["losses"].append((3, 5, 0.1)),
        lambda s: s["losses"].__setitem__(1, (1, 5, float("nan"))),
        lambda s: s["losses"].__setitem__(1, (1, "\x1b[2J", 0.1)),
    ],
    "its gradient scaler has other numbers": [lambda s: s.update(scaler={"scale": 1.0})],
    "damaged; delete it to begin anew": [
        lambda s: s.update(losses=7),
        lambda s: s.update(optimizer=[]),
        lambda s: s.update(parameters=None),
        lambda s: s["optimizer"].update(state={number: None for number in s["optimizer"]["state"]}),
        lambda s: s["optimizer"].update(state=s),
    ],
}


@pytest.mark.parametrize(
    ("words", "damage"), [(words, damage) for words, damages in DAMAGES.items() for damage in damages]
)
def test_a_checkpoint_is_checked_like_any_other_input(interrupted, tmp_path, words, damage):
    state, path = torch.load(interrupted / "training_state.pt", weights_only=True), tmp_path / "state.pt"
    parameters = dict(state["parameters"])
    torch.save(state, path)
    assert load_state(path, parameters, 3)["step"] == 2
    damage(state)
    torch.save(state, path)
    with pytest.raises(ValueError) as refused:
        load_state(path, parameters, 3)
    assert str(refused.value).startswith(f"{path}: damaged") and words in str(refused.value)
    assert str(refused.value).endswith("; delete it to begin anew") and str(refused.value).isprintable()


def test_a_checkpoint_that_is_none_stops_training_and_is_left_alone(workplace, unfinished):
    path = unfinished / "training_state.pt"
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[:2000], whole[:-100]):
        path.write_bytes(content)
        line = refusal(workplace, *FOUR, "--run", "runs/unfinished")
        assert line == "runs/unfinished/training_state.pt: damaged; delete it to begin anew"
        assert path.read_bytes() == content


# ---- Signals and other processes ----------------------------------------------------------------


def start(workplace: Path, program: str, *arguments: object) -> subprocess.Popen:
    """A script in a process of its own, from a program that may change it before."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=workplace, env=environment, **pipes)


def of_script(script: str, before: str = "") -> str:
    return f"""
import runpy, sys
sys.argv[0] = {script!r}
{before}
runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_is_one_line(workplace, script, number):
    at_once = f"""
import os, signal
class Interrupting:
    def find_spec(self, name, *rest):
        if name == "torch":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Interrupting())
"""
    arguments = ["clip.mp4"] if script == "train.py" else ["--poses", "clip.json"]
    process = start(workplace, of_script(script, at_once), *arguments)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", f"{script}: stopped\n")


@pytest.mark.slow
def test_sigterm_stops_training_as_control_c_does(workplace):
    folder = workplace / "runs" / "terminated"
    process = start(workplace, of_script("train.py"), *FOUR[1:-3], 100_000, "--frames", 4, "--run", folder)
    log = folder / "loss.csv"
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    other = start(workplace, of_script("train.py"), *FOUR[1:], "--run", folder)
    line = f"train.py: {folder}: another process works there; wait for it, or choose another --run\n"
    assert other.communicate(timeout=60)[1].endswith(line) and other.returncode == 2
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "train.py: stopped; the same command goes on from the last checkpoint"
    assert not hidden(folder)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_training_that_is_killed_twenty_times_ends_as_if_it_had_not_been(workplace):
    """Each process is killed at a random moment, from its start to the end of its work."""
    saving = of_script(
        "train.py",
        """
import functools, time
monotonic, calls = time.monotonic, [0]
def rushing():  # two minutes pass at every look, so that every step is saved
    calls[0] += 1
    return monotonic() + 200 * calls[0]
time.monotonic = rushing
""",
    )
    command = [*TRAIN[1:-1], 60, "--frames", 4]
    straight = start(workplace, saving, *command, "--run", "runs/straight")
    begun = time.monotonic()
    _, err = straight.communicate()
    assert straight.returncode == 0, err
    whole_time, folder, kills = time.monotonic() - begun, workplace / "runs" / "killed", 0
    moments = random.Random(0)
    while kills < 20:
        process = start(workplace, saving, *command, "--run", "runs/killed")
        try:
            process.communicate(timeout=moments.uniform(0.3, 0.9) * whole_time)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        else:  # it was done before; what it left is as good, and the rest are killed anew
            assert same_weights(folder, workplace / "runs" / "straight")
            shutil.rmtree(folder)
    process = start(workplace, saving, *command, "--run", "runs/killed")
    _, err = process.communicate()
    assert process.returncode == 0 or "finished run" in err, err
    assert same_weights(folder, workplace / "runs" / "straight")
    names = [
        {str(path.relative_to(run)) for path in run.rglob("*")}
        for run in (folder, workplace / "runs/straight")
    ]
    assert names[0] == names[1] and not hidden(folder)
    shutil.rmtree(folder)


def test_the_second_of_two_that_make_one_video_says_so_and_stops(workplace, trained, monkeypatch):
    command = *SAMPLE, "--run", "runs/first", "--out", "twice.mp4"
    generate, lines = sample.generate, []

    def meanwhile(*given, **options):
        other = start(workplace, of_script("sample.py"), *command[1:])
        _, err = other.communicate(timeout=120)
        lines.append((other.returncode, err.splitlines()[-1]))
        return generate(*given, **options)

    monkeypatch.setattr(sample, "generate", meanwhile)
    main(workplace, *command)
    told = "twice.mp4: another process is making it; wait for it, or choose another --out"
    assert lines == [(2, f"sample.py: {told}")]
    assert verify(workplace / "twice.mp4") and not hidden(workplace)


def test_a_run_is_not_mixed_with_files_of_others(workplace, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    line = refusal(workplace, *FOUR, "--run", tmp_path)
    assert line == f"{tmp_path}: holds notes.txt, so it is no run; choose another with --run"
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 12}')
    line = refusal(workplace, *FOUR, "--run", tmp_path)
    assert line.endswith(f"if it is a run, delete {tmp_path} and train again")
    line = refusal(workplace, *FOUR, "--run", tmp_path / "notes.txt")
    assert (
        line == f"{tmp_path}/notes.txt: {tmp_path}/notes.txt is a file, not a folder; choose another --run"
    )
    assert len(list(tmp_path.iterdir())) == 2


# ---- The disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                pass


def filling(disk: Path, name: str):
    """`safe.files.naming` on a disk that is filled as soon as the file `name` is to be written."""
    naming = safe.files.naming

    @contextmanager
    def wrapper(path: Path):
        with naming(path):
            # A video's name is also that of its lock, which is taken before.
            if path.name == name and (path.suffix != ".mp4" or any(disk.glob(".*.lock"))):
                fill(disk)
            yield

    return wrapper


WRITTEN = "settings.json 00000.png frames.poses.json preview.png loss.csv training.json trained.safetensors"
SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in WRITTEN.split()]


@pytest.mark.parametrize("name", ["training_state.pt", *SLOWLY])
def test_a_full_disk_is_one_line_and_no_harm(
    workplace, trained, interrupted, small_disk, monkeypatch, name
):
    run = small_disk / "run"
    shutil.copytree(interrupted, run)
    kept = contents(run)
    state = run / "training_state.pt"
    with monkeypatch.context() as patches:
        patches.setattr(train, "SAVE_EVERY", 0)
        patches.setattr(train, "require_space_for_training", lambda *_: None)
        patches.setattr(safe.files, "naming", filling(small_disk, name))
        with pytest.raises(OSError) as refused:
            main(workplace, *FOUR, "--run", run)
    assert str(refused.value).endswith(f"{name}: could not be written: the disk is full")
    assert str(refused.value).startswith(str(run))
    assert not hidden(run) and contents(run).keys() >= kept.keys()
    torch.load(state, weights_only=True)
    (small_disk / "filler").unlink()
    main(workplace, *FOUR, "--run", run)
    assert same_weights(run, trained) and not hidden(run)


def test_a_read_only_disk_is_one_line(workplace, interrupted, small_disk):
    run = small_disk / "run"
    shutil.copytree(interrupted, run)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=r"run/settings\.json: could not be written: read-only file system$"):
        main(workplace, *FOUR, "--run", run)
    with pytest.raises(OSError, match=r"new: could not be written: read-only file system$"):
        main(workplace, *FOUR, "--run", small_disk / "new")


def test_training_asks_for_room_before_it_begins(workplace, small_disk):
    (small_disk / "other").write_bytes(bytes(1_900_000))
    with pytest.raises(
        OSError, match=r"run: needs 0\.\d MB, but only 0\.\d MB are free; make room"
    ) as refused:
        main(workplace, *FOUR, "--run", small_disk / "run")
    assert "\n" not in str(refused.value)
    assert [path.name for path in small_disk.iterdir()] == ["other"]


@pytest.fixture
def result(workplace, trained, small_disk) -> Path:
    """A result on a small disk."""
    main(workplace, *SAMPLE, "--run", trained, "--out", small_disk / "out.mp4")
    return small_disk / "out.mp4"


# By the names of the files: while the first is written nothing lies there, while the last is all others do.
@pytest.mark.parametrize(
    "ending", [pytest.param(".mp4", marks=pytest.mark.slow), ".poses.json", ".png", ".html", ".json"]
)
def test_a_full_disk_leaves_the_old_result_whole(
    workplace, trained, small_disk, result, monkeypatch, ending
):
    before = contents(small_disk)
    with monkeypatch.context() as patches:
        patches.setattr(safe.files, "naming", filling(small_disk, f"out{ending}"))
        with pytest.raises(OSError) as refused:
            main(workplace, *SAMPLE, "--run", trained, "--out", result, "--seed", 1)
    line = str(refused.value)
    assert line.startswith(f"{small_disk}/out{ending}: could not be written") and "full" in line
    assert "\n" not in line and not hidden(small_disk)
    (small_disk / "filler").unlink()
    assert contents(small_disk) == before and verify(result)
    main(workplace, *SAMPLE, "--run", trained, "--out", result, "--seed", 1)
    assert (
        verify(result) and contents(small_disk).keys() == before.keys() and contents(small_disk) != before
    )


def test_a_disk_that_fills_up_while_poses_are_kept_is_one_line(workplace, trained, small_disk, monkeypatch):
    import openpose

    run, found = small_disk / "run", load_poses(workplace / "clip.json")
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("samples"))
    before = contents(small_disk)
    monkeypatch.setattr(openpose, "find_in_footage", lambda *_, **__: fill(small_disk) or found)
    with pytest.raises(
        OSError, match=r"run/poses/clip\.\w+\.poses\.json: could not be written: the disk is full$"
    ):
        main(workplace, "sample.py", "--poses", "clip.mp4", "--poses-are", "video", "--run", run)
    (small_disk / "filler").unlink()
    assert contents(small_disk) == before and not hidden(small_disk)


@pytest.mark.parametrize("kind", ["out.metrics.json", "out.metrics*.png", "out*worst*.png"])
def test_a_full_disk_leaves_old_figures_whole(small_disk, monkeypatch, kind):
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    write_video(small_disk / "out.mp4", frames, 8)
    write_video(small_disk / "truth.mp4", frames[::-1], 8)
    command = [str(small_disk / "out.mp4"), "--truth", str(small_disk / "truth.mp4")]
    evaluate.main(evaluate.parse_arguments(command))
    before = contents(small_disk)
    (written,) = small_disk.glob(kind)
    monkeypatch.setattr(safe.files, "naming", filling(small_disk, written.name))
    with pytest.raises(OSError) as refused:
        evaluate.main(evaluate.parse_arguments(command))
    assert str(refused.value) == f"{written}: could not be written: the disk is full"
    (small_disk / "filler").unlink()
    assert contents(small_disk) == before and not hidden(small_disk)


@pytest.mark.parametrize("ending", ["mp4", "png"])
def test_videos_and_pictures_on_a_full_disk_are_named(small_disk, ending):
    frames = np.random.default_rng(0).integers(0, 255, (40, 256, 256, 3), dtype=np.uint8)
    out = small_disk / f"out.{ending}"
    fill(small_disk)
    with pytest.raises(OSError) as refused:
        if ending == "mp4":
            write_video(out, frames, 8)
        else:
            with safe.files.replacing(out) as unfinished:
                Image.fromarray(frames[0]).save(unfinished)
    assert str(refused.value).startswith(f"{out}: ") and "Errno" not in str(refused.value)
    assert "full" in str(refused.value) and "\n" not in str(refused.value)
    assert not hidden(small_disk)


# ---- Memory -------------------------------------------------------------------------------------


def test_a_size_that_memory_cannot_hold_is_refused_before_anything_is_allocated(workplace):
    line = refusal_of_memory(workplace, "--size", 90_000)
    assert line.startswith("8 frames of 89984x89984 need at least ") or line.startswith("8 frames of 9")
    assert "GB of memory, but only " in line and line.endswith("give a smaller --size")


def refusal_of_memory(workplace: Path, *options: object) -> str:
    before = sorted(workplace.rglob("*"))
    with pytest.raises(MemoryError) as refused:
        main(workplace, *TRAIN, "--run", "runs/huge", *options)
    assert sorted(workplace.rglob("*")) == before
    return str(refused.value)


# ---- Run folders as input -----------------------------------------------------------------------


@pytest.fixture
def copied(workplace, trained) -> Iterator[Path]:
    folder = workplace / "runs" / "copied"
    shutil.copytree(trained, folder)
    yield folder
    shutil.rmtree(folder)


def set_fields(folder: Path, **fields: object) -> None:
    path = folder / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_says_which_program_and_layout_it_is_of(trained):
    settings = json.loads((trained / "settings.json").read_text())
    assert settings.keys() == FIELDS.keys()
    assert settings["layout"] == 1 and settings["version"] == "1.0.0"
    load_run(trained)


WRONG = [
    None,
    True,
    -1,
    0,
    1e400,
    float("nan"),
    2**64,
    "",
    "\0",
    "\ud800",
    [],
    [[]],
    {},
    [True],
    [3, 1],
    ["0"],
]


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_of_the_settings_is_checked_and_named(copied, name):
    _, fits = FIELDS[name]
    wrong = [value for value in WRONG if not fits(value)]
    assert len(wrong) >= 8
    for value in wrong:
        set_fields(copied, **{name: value})
        with pytest.raises(ValueError) as refused:
            load_run(copied)
        line = str(refused.value)
        assert (
            line.startswith(f"{copied}/settings.json: {name} is ") and "\n" not in line and len(line) < 400
        )
        assert printable(line).isprintable()


def test_fields_that_are_not_ours_are_left_out(copied):
    set_fields(copied, note="mine")
    assert "note" not in load_run(copied).settings


@pytest.mark.skipif(not CASES.exists(), reason="needs the small inputs that went wrong")
@pytest.mark.parametrize(
    ("case", "words"),
    [("u1", r"controlnet is '\ud800'"), ("x1", "poses is 18446744073709551616, not text or null")],
)
def test_settings_that_once_ended_in_pages_of_traceback(tmp_path, case, words):
    shutil.copy(CASES / f"fuzz_settings_{case}.txt", tmp_path / "settings.json")
    with pytest.raises(ValueError) as refused:
        read_run_settings(tmp_path)
    assert f"settings.json: {words}" in printable(str(refused.value))


def test_changed_frames_and_poses_are_refused(workplace, copied):
    first = sorted((copied / "frames").iterdir())[0]
    frame, poses = first.read_bytes(), (copied / "frames.poses.json").read_text()
    changed = (
        "runs/copied: its frames/ or frames.poses.json were changed after training; put back what was there"
    )
    picture = np.array(Image.open(first))
    picture[0, 0, 0] ^= 1
    Image.fromarray(picture).save(first)
    assert refusal(workplace, *SAMPLE, "--run", "runs/copied").startswith(changed)
    first.write_bytes(frame)
    load_run(copied)
    (copied / "frames.poses.json").write_text(poses.replace("1.0", "0.9", 1))
    assert refusal(workplace, *SAMPLE, "--run", "runs/copied").startswith(changed)


def test_runs_of_older_and_newer_programs(workplace, copied):
    settings = json.loads((copied / "settings.json").read_text())
    older = {name: value for name, value in settings.items() if name not in ("version", "layout")}
    (copied / "settings.json").write_text(
        json.dumps(older | {"inputs": "ab" * 32})
    )  # it was of something else
    load_run(copied)
    del older["prompt"]
    (copied / "settings.json").write_text(json.dumps(older))
    line = refusal(workplace, *SAMPLE, "--run", "runs/copied")
    assert (
        "lacks prompt (made by PoseCrafter before 1.0.0); if it is a run, delete runs/copied and train again"
        in line
    )
    (copied / "settings.json").write_text(json.dumps(settings | {"layout": 2, "version": "3.1"}))
    line = refusal(workplace, *SAMPLE, "--run", "runs/copied")
    assert "made by PoseCrafter 3.1, which this one (1.0.0) cannot read" in line


def test_an_unfinished_run_of_an_older_program_is_not_gone_on_with(workplace, unfinished):
    settings = json.loads((unfinished / "settings.json").read_text())
    del settings["version"], settings["layout"]
    (unfinished / "settings.json").write_text(json.dumps(settings))
    line = refusal(workplace, *FOUR, "--run", "runs/unfinished")
    assert line.startswith("runs/unfinished: an unfinished run, made by PoseCrafter before 1.0.0; choose")


def test_a_checkpoint_left_beside_a_finished_run_is_removed(workplace, copied):
    (copied / "training_state.pt").write_bytes(b"of a process that was killed before it removed this")
    with pytest.raises(ValueError, match="finished run already"):
        main(workplace, *FOUR, "--run", copied)
    assert not (copied / "training_state.pt").exists()


# ---- Messages -----------------------------------------------------------------------------------


def last_words(error: BaseException, capsys) -> str:
    def failing(_):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command("script.py", failing, None)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err[:-1].isprintable()
    return err[:-1]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_what_a_command_prints_is_shown_by_any_terminal(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    run_command("script.py", lambda _: print("a\x1b[31m\udcff\x9b 漢.mp4\nis there"), None)
    sys.stdout.flush()
    shown = "漢" if encoding == "utf-8" else "\\u6f22"
    assert raw.getvalue().decode(encoding).split() == [
        r"a\x1b[31m\udcff\x9b",
        f"{shown}.mp4",
        "is",
        "there",
    ]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\x1b[2J\x1b]0;x\x07: no\nsuch\ud800"), r"\x1b[2J\x1b]0;x\x07: no\nsuch\ud800"),
        (OSError(28, "No space left on device"), "writing or reading: no space left on device"),
        (PermissionError(13, "Permission denied", "a\x1b.txt"), r"a\x1b.txt: permission denied"),
        (MemoryError(), "out of memory: give smaller or fewer frames"),
    ],
)
def test_last_words_are_one_line_that_a_terminal_shows(error, line, capsys):
    assert last_words(error, capsys) == f"script.py: {line}"


def test_reasons_are_in_words():
    with pytest.raises(OSError) as failed:
        open("/nowhere/at/all")
    assert in_words(failed.value) == "/nowhere/at/all: no such file or directory"


@pytest.mark.parametrize(
    ("parse", "options", "words"),
    [
        (
            training_arguments,
            ["clip.mp4", "--poses", "a\0b"],
            "argument --poses: 'a\\x00b' is no name of a file",
        ),
        (training_arguments, ["clip.mp4", "--run", ""], "argument --run: '' is no name of a file"),
        (
            training_arguments,
            ["clip.mp4", "--seed", "9" * 20],
            "not a whole number above -1,000,000,000,000 and",
        ),
        (training_arguments, ["clip.mp4", "--seed", "-" + "9" * 5000], "is not a whole number above"),
        (training_arguments, ["clip.mp4", "--steps", "9" * 20], "above 0 and below 10,000,000"),
        (training_arguments, ["clip.mp4", "--size", "9" * 400], "above 0 and below 10,000,000"),
        (training_arguments, ["clip.mp4", "--person", "0"], "'0' is not a whole number above 0"),
        (sampling_arguments, ["--poses", "https://a.b/c.mp4"], "is an address; download the file first"),
        (sampling_arguments, ["--poses", os.devnull], "is neither a file nor a folder"),
        (sampling_arguments, ["--verify", os.devnull], "is neither a file nor a folder"),
        (training_arguments, [os.devnull], "argument clip: '/dev/null' is neither a file nor a folder"),
        (training_arguments, ["a", "--vae", os.devnull], "argument --vae: '/dev/null' is neither"),
        (sampling_arguments, ["--poses=a", "--prompt", "\udcff"], "is no text in UTF-8"),
        (training_arguments, ["a", "--prompt", "a" * 2001], "a prompt of 2001 characters: at most 2000"),
        (sampling_arguments, ["--poses=a", "--fps=1e-9"], "is not a number above 0.1 and below 1,000"),
        (sampling_arguments, ["--poses=a", "--fps=1e9"], "is not a number above 0.1 and below 1,000"),
        (sampling_arguments, ["--poses", "\0"], "argument --poses: '\\x00' is no name of a file"),
        (
            sampling_arguments,
            ["--poses=a", "--canvas", "1x" + "9" * 400],
            "is not a size such as 1920x1080",
        ),
        (sampling_arguments, ["--poses=a", "--range", "0:" + "9" * 400], "is not a range such as 0:36"),
        (sampling_arguments, ["--poses=a", "--range", "0:" + "9" * 5000], "is not a range such as 0:36"),
    ],
)
def test_arguments_beyond_all_measure_are_refused(parse, options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(options)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_seeds_up_to_the_last_that_is_taken_make_numbers():
    for seed in (10**12 - 1, -(10**12) + 1):
        taken = training_arguments(["clip.mp4", f"--seed={seed}"]).seed
        assert taken == seed
        # As `train.train` makes a step's noise of it, up to the last step that can be asked for.
        random = torch.Generator().manual_seed(taken * 1_000_003 + 10_000_000)
        assert torch.randn(2, generator=random).isfinite().all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_links_to_themselves_are_told_at_once(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for name, words in (("pipe.mp4", "is neither a file"), ("loop.mp4", "is a symbolic link to itself")):
        for parse, options in ((training_arguments, []), (sampling_arguments, ["--poses"])):
            with pytest.raises(SystemExit):
                parse([*options, str(tmp_path / name)])
            assert f"{name}' {words}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model", "--controlnet", "--vae"])
@pytest.mark.parametrize("case", ["cyclic.pth", "a web page"])
def test_a_file_without_weights_is_told_before_anything_is_downloaded(
    workplace, tmp_path, monkeypatch, option, case
):
    path = tmp_path / "weights.pth"
    if case == "cyclic.pth":
        cyclic = {}
        cyclic["state_dict"] = cyclic
        torch.save(cyclic, path)
    else:
        path.write_text("<!DOCTYPE html><html>not found</html>")
    for name in ("checkpoint.public_files", "train.read_training_frames"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("something was begun"))
    line = refusal(workplace, "train.py", "clip.mp4", "--model", "model", option, path)
    assert line.startswith(f"{path}: ") and ("no tensors by name" in line or "a web page" in line)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_evaluation_does_not_wait_for_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.mp4")
    for options in ([str(tmp_path / "pipe.mp4")], ["a.mp4", "--truth", str(tmp_path / "pipe.mp4")]):
        with pytest.raises(SystemExit):
            evaluate.parse_arguments(options)
        assert "pipe.mp4' is neither a file nor a folder" in capsys.readouterr().err
