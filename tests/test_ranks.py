"""Several processes that share a clip's frames make of it what one process makes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from test_commands import SAMPLE, trained, workplace  # noqa: F401
from test_networks import filled, random, worst

import posecrafter
import sample
from beyond.pseudo import HELD
from beyond.ranks import Share, choose_card, evenly, in_ranks, share_frames
from checkpoint import load_model
from command import sampling_arguments
from controlnet import ControlNet
from demo.puppet import clip
from posecrafter import PAPER, generate, predict_noise
from safe.process import refuse_torchrun, run_command
from slicing import Slicing, frugally, slices
from unet import Context, UNet, UNetConfig
from video import read_frames

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def together(ranks: int, folder: Path, work: Callable[[], object]) -> list:
    """What `work()` returns in each of several processes, which find each other as those of torchrun do.

    Of a process that ends otherwise: its exit code. What they print is in the folder's `0.out` and so on.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "RANK": rank}
        os.environ.update({name: str(value) for name, value in place.items()})
        sys.stdout = sys.stderr = open(folder / f"{rank}.out", "w", buffering=1)
        torch.set_num_threads(1)  # a fork has no other threads
        try:
            torch.save(work(), folder / f"{rank}.pt")
        except Exception:
            traceback.print_exc()
            os._exit(1)

    folder.mkdir()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=(rank,)) for rank in range(ranks)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
    stuck = [each for each in processes if each.is_alive()]
    for each in stuck:
        each.kill()
    assert not stuck, "some wait for ever"
    files = [folder / f"{rank}.pt" for rank in range(ranks)]
    ended = zip(files, processes)
    return [
        torch.load(file, weights_only=False) if file.exists() else each.exitcode for file, each in ended
    ]


def sharing(frames: int, work: Callable[[Share], object]) -> Callable[[], object]:
    """`work` with the process's share of a clip of so many frames, for `together`."""
    result = []
    return lambda: (in_ranks(lambda args: result.append(work(share_frames(frames))))(None), *result)[-1]


def test_only_processes_that_compute_on_cards_need_one_each(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    choose_card(SimpleNamespace(device="cpu"))
    with pytest.raises(ValueError, match="give --nproc-per-node 1 at most"):
        choose_card(SimpleNamespace(device="auto"))


# ---- The same result ----------------------------------------------------------------------------


def tiny_networks(**sizes) -> SimpleNamespace:
    sizes = {"widths": (8, 16, 16), "layers_per_block": 1, "context_dim": 16, "heads": 2, "norm_groups": 4}
    config = UNetConfig(**sizes)
    networks = UNet(config), ControlNet(config, (4, 4, 4))
    return SimpleNamespace(unet=filled(networks[0], "unet."), controlnet=filled(networks[1], "controlnet."))


@torch.inference_mode()
def noises_in_slices(share: Share | None) -> list[torch.Tensor]:
    """In one slice and in many, of latents that only the first process knows; 7 x 5 locations, then 4 x 3."""
    model, frames = tiny_networks(), 5
    latents, hints, context = random(frames, 4, 7, 5), random(frames, 8, 7, 5), Context(random(7, 16))
    found = []
    for numbers in (2**40, 500):
        own = latents
        if share:
            own, hints = share.own(latents.clone() if share.rank == 0 else latents * 9), hints[share.frames]
        with slices(Slicing(numbers, share=share)):
            noise = predict_noise(model, own, 501, context, hints)
        found.append(share.whole(noise) if share else noise)
        hints = random(frames, 8, 7, 5)
    return found


def fallback(share: Share) -> tuple[int, list[int]]:
    """Which slices are left where one process has too little memory for the largest."""

    def compute() -> int:
        if current_numbers() > 10 and share.rank == 1:
            raise torch.OutOfMemoryError
        return current_numbers()

    ways = [Slicing(numbers, share=share) for numbers in (40, 20, 10, 5)][share.rank == 2 :]
    return frugally(compute, ways), [way.numbers for way in ways]


def current_numbers() -> int:
    import slicing

    return slicing.current.numbers


@pytest.fixture(scope="module")
def model(workplace):  # noqa: F811
    """A tiny one, whose temporal layers do something, as after training."""
    model = load_model(workplace / "model")
    for name, parameter in model.unet.named_parameters():
        if "conv_temp" in name:
            parameter.data += 0.3 * random(*parameter.shape)
    return model


def test_what_processes_share_is_what_one_makes(model, tmp_path):
    frames, poses, _ = clip(3, 6, 8, 64)
    run, targets = SimpleNamespace(frames=frames[::4], poses=poses[::4]), clip(3, 7, 8, 64)[1][::2]
    cases = [
        (PAPER, {}),
        (replace(PAPER, replay=True, fixed_point=1), {"guidance": 3, "prompt": "a person, red hair"}),
        (replace(PAPER, start="noise", parts=None), {"seed": 5, "frames_per_slice": 1}),
        (HELD, {}),
    ]

    def work(share: Share | None) -> tuple:
        made = [generate(model, run, targets, m, 0, 2, share=share, **options) for m, options in cases]
        clips = [each.latents for each in made] + [each.reconstruction for each in made]
        return (
            [*clips, *noises_in_slices(share)],
            [each.regions for each in made],
            share and fallback(share),
        )

    ((alone, regions, _),) = together(1, tmp_path / "1", sharing(len(targets) + 1, work))
    for ranks in (2, 3):  # of 5 frames: 3 and 2; 2, 2 and 1
        found = together(ranks, tmp_path / f"{ranks}", sharing(len(targets) + 1, work))
        for tensors, counted, left in found:
            errors = list(map(worst, tensors, alone))
            assert max(errors) < 1e-5 and counted == regions, errors
            assert all(torch.equal(ours, first) for ours, first in zip(tensors, found[0][0]))
            assert left == (10, [10])


@pytest.mark.parametrize(
    ("length", "parts", "each"), [(5, 3, [2, 2, 1]), (4, 2, [2, 2]), (1, 3, [1, 0, 0])]
)
def test_shares_are_even(length, parts, each):
    assert evenly(length, parts) == each


# ---- The command line ---------------------------------------------------------------------------


def command(*options: object) -> Callable[[], object]:
    """`sample.py`, for `together`: what the first process returns; the frames."""

    def work() -> np.ndarray | None:
        made, args = [], sampling_arguments([str(option) for option in (*SAMPLE[1:], *options)])
        with contextlib.chdir(workplace_of(args)):
            run_command("sample.py", in_ranks(lambda args: made.append(sample.main(args))), args)
        return made[0] if made else None

    return work


def workplace_of(args) -> Path:
    return args.run.parents[1]


def told(folder: Path) -> list[str]:
    """What the processes printed, without progress bars."""
    return [
        [
            line
            for line in path.read_text().splitlines()
            if "it/s" not in line and "s/it" not in line and line
        ]
        for path in sorted(folder.glob("*.out"))
    ]


def test_the_first_process_writes_the_frames_of_all(trained, tmp_path):  # noqa: F811
    common = "--run", trained, "--no-retarget"
    alone = command(*common, "--out", tmp_path / "alone.mp4")()
    first, *others = together(3, tmp_path / "ranks", command(*common, "--out", tmp_path / "three.mp4"))
    assert others == [None, None] and first.shape == alone.shape
    assert np.abs(first.astype(int) - alone).max() <= 1
    ends = ".mp4", ".png", ".json", ".poses.json", ".html"
    written = {f"{name}{end}" for name in ("alone", "three") for end in ends}
    assert {path.name for path in tmp_path.iterdir()} == written | {"ranks"}
    assert len(read_frames(tmp_path / "three.mp4")[0]) == len(alone)
    words = told(tmp_path / "ranks")
    assert "3 processes share 6 frames: 2, 2, 2" in words[0]
    assert words[1:] == [[], []], "only the first one speaks"


def test_more_processes_than_frames_are_refused(trained, tmp_path):  # noqa: F811
    options = "--run", trained, "--range", "2:3", "--out", tmp_path / "out.mp4"
    codes = together(3, tmp_path / "ranks", command(*options))
    line = "sample.py: 3 processes cannot share 2 frames; give --nproc-per-node 2 at most"
    assert told(tmp_path / "ranks") == [[line], [], []]
    assert codes[0] == 2 and list(tmp_path.iterdir()) == [tmp_path / "ranks"]


def test_a_plan_needs_one_process(trained, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sample, "print_plan", lambda *arguments: print("planned"))
    options = "--run", trained, "--plan"
    assert together(2, tmp_path / "ranks", command(*options)) == [None, None]
    assert told(tmp_path / "ranks") == [["planned"], []]


@pytest.mark.parametrize("killed", [True, False])
def test_a_process_that_dies_ends_the_others_with_one_line(trained, tmp_path, monkeypatch, killed):  # noqa: F811
    steps, ddim_step = [], posecrafter.ddim_step

    def dying(latents, *rest):
        steps.append(len(latents))
        if os.environ.get("RANK") == "1" and steps[-2:] == [6, 6]:  # in the second step of sampling
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("this card fell off the bus")
        return ddim_step(latents, *rest)

    monkeypatch.setattr(posecrafter, "ddim_step", dying)
    codes = together(2, tmp_path / "ranks", command("--run", trained, "--out", tmp_path / "out.mp4"))
    words = told(tmp_path / "ranks")
    assert codes == [2, -signal.SIGKILL if killed else 2]
    assert list(tmp_path.iterdir()) == [tmp_path / "ranks"], "nothing is written"
    lost = "sample.py: another of the processes ended or hangs; nothing was written"
    assert (words[0][-1] == lost) == killed
    assert words[1] == ([] if killed else ["sample.py: this card fell off the bus"])


def test_training_is_refused_to_torchrun(monkeypatch, capsys):
    for rank, line in (
        ("0", "train.py: uses one graphics card; start it with python, not torchrun\n"),
        ("1", ""),
    ):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as refused:
            refuse_torchrun("train.py")
        assert refused.value.code == 2 and capsys.readouterr().err == line


@pytest.mark.slow
def test_torchrun_makes_the_video_of_one_process(trained, tmp_path):  # noqa: F811
    options = [str(each) for each in (*SAMPLE[1:], "--run", trained)]
    launchers = {"alone": [], "two": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]}
    for name, launcher in launchers.items():
        line = [sys.executable, *launcher, ROOT / "sample.py", *options, "--out", tmp_path / f"{name}.mp4"]
        folder = workplace_of(sampling_arguments(options))
        done = subprocess.run(list(map(str, line)), cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    alone, two = (read_frames(tmp_path / f"{name}.mp4")[0].astype(int) for name in launchers)
    assert np.abs(alone - two).max() <= 8, "both are compressed"
    assert done.stdout.count("frames, from training frame") == 1
