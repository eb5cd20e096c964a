"""Where networks are computed, and how memory is kept."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from command import sampling_arguments, training_arguments
from device import compute_device
from evaluate import parse_arguments
from posecrafter import widen
from safe.arguments import DEVICES
from safe.devices import choose_device
from safe.room import is_out_of_memory

ROOT = Path(__file__).parents[1]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(),
    reason="this machine gives no huge pages",
)
def test_large_buffers_of_the_commands_are_in_huge_pages():
    program = """
import safe.process
safe.process.keep_freed_memory()
import sample, torch
x = torch.zeros(50_000_000)
print(sum(int(l.split()[1]) for l in open("/proc/self/smaps") if l.startswith("AnonHugePages")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 100_000, "kB, of 200 MB"


def test_training_on_a_card_does_without_cudnns_attention(monkeypatch):
    """Its gradients are not always numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    try:
        assert compute_device(training=True) == (torch.device("cuda", 0), torch.bfloat16)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert compute_device() == (torch.device("cuda", 0), torch.float16)
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.set_float32_matmul_precision(before[1])


def test_cards_before_ampere_train_in_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert compute_device(training=True) == (torch.device("cuda", 0), dtype)
        assert compute_device() == (torch.device("cuda", 0), torch.float16)


@pytest.fixture
def machine(monkeypatch):
    """Makes torch believe that these devices are there."""

    def has(*kinds: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
        monkeypatch.setattr("shutil.which", lambda name: None)

    return has


@pytest.mark.parametrize(
    ("there", "name", "chosen"),
    [
        ((), "auto", "cpu"),
        (("mps",), "auto", "mps:0"),
        (("cuda", "mps"), "auto", "cuda:0"),
        (("cuda", "mps"), "mps", "mps:0"),
        (("cuda", "mps"), "cpu", "cpu"),
    ],
)
def test_the_best_device_is_taken_unless_one_is_named(machine, there, name, chosen):
    machine(*there)
    assert str(choose_device(name)) == str(compute_device(name)[0]) == chosen


@pytest.mark.parametrize(
    ("there", "name", "words"),
    [
        (("mps",), "cuda", "--device cuda: no CUDA card that this torch can use; leave it out"),
        (("cuda",), "mps", "--device mps: no Apple GPU that this torch can use, .*; leave it out"),
    ],
)
def test_a_device_that_is_not_there_is_refused(machine, there, name, words):
    machine(*there)
    with pytest.raises(ValueError, match=words):
        compute_device(name)


def test_apples_gpu_samples_in_float16_and_trains_in_float32(machine):
    machine("mps")
    assert compute_device() == (torch.device("mps", 0), torch.float16)
    assert compute_device("mps", training=True) == (torch.device("mps", 0), torch.float32)


def test_what_overflowed_in_float16_goes_on_in_float32_on_apples_gpu(monkeypatch):
    where = {"device": torch.device("mps", 0), "dtype": torch.float16}
    monkeypatch.setattr("posecrafter.network_inputs", lambda model: where)
    model = SimpleNamespace(unet=torch.nn.Linear(1, 1).half(), controlnet=torch.nn.Linear(1, 1).half())
    assert widen(model) == "float32" and model.unet.weight.dtype == torch.float32


def test_apples_gpu_says_in_its_own_words_that_it_has_no_memory_left():
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"))


def test_every_command_takes_a_device_by_the_same_names(tmp_path, machine):
    machine()
    commands = {
        training_arguments: ["clip.mp4"],
        sampling_arguments: ["--poses", "dance.mp4"],
        parse_arguments: ["result.mp4"],
    }
    for parse, command in commands.items():
        assert parse(command).device == "auto"
        assert [parse([*command, "--device", name]).device for name in DEVICES] == [*DEVICES]
        with pytest.raises(SystemExit):
            parse([*command, "--device", "tpu"])
    from demo.puppet import clip
    from video import save_image

    (tmp_path / "clip").mkdir()
    save_image(tmp_path / "clip" / "0.png", clip(1, 1, 1, 64)[0][0])
    command = [str(tmp_path / "clip"), "--frames", "1", "--device", "cuda", "--run", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="--device cuda: no CUDA card"):
        train.main(training_arguments([*command, "--model", "demo"]))
    assert not (tmp_path / "run" / "settings.json").exists()


@pytest.mark.parametrize("script", ["train", "sample", "evaluate", "openpose"])
def test_commands_let_the_cpu_do_what_apples_gpu_cannot_and_importing_them_changes_nothing(script):
    environment = os.environ.copy()
    for name in ("PYTORCH_ENABLE_MPS_FALLBACK", "THP_MEM_ALLOC_ENABLE"):  # which other tests may have set
        environment.pop(name, None)
    program = f"""
import os, runpy, sys
import safe.process
safe.process.run_command = lambda *_, **__: None
sys.argv = ["{script}.py", "--poses", "x.json"] if "{script}" == "sample" else ["{script}.py", "x.mp4"]
before = dict(os.environ)
runpy.run_path("{script}.py", run_name=NAME)
changed = {{name for name in os.environ if os.environ[name] != before.get(name)}}
print(*changed & {{"PYTORCH_ENABLE_MPS_FALLBACK", "THP_MEM_ALLOC_ENABLE"}})
"""
    for name, expected in (("__main__", 2), ("imported", 0)):
        done = subprocess.run(
            [sys.executable, "-c", program.replace("NAME", repr(name))],
            cwd=ROOT, capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        assert len(done.stdout.split()) == expected, done.stdout


def test_a_torch_without_cuda_beside_a_card_says_so(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute_device()[0].type == "cpu"
    assert "built without CUDA" in capsys.readouterr().out
