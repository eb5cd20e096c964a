"""Where networks are computed, and how memory is kept."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from device import compute_device

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


def test_a_torch_without_cuda_beside_a_card_says_so(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute_device()[0].type == "cpu"
    assert "built without CUDA" in capsys.readouterr().out
