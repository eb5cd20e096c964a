"""The house: who may import whom, what importing costs, and how long the files are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from beyond.pseudo import METHODS
from command import METHOD_NAMES

ROOT = Path(__file__).parents[1]
ROOMS = ("poses", "public", "safe", "pictures", "beyond", "metrics", "demo", "bench")
FILES = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


OURS = {module_of(file): file for file in FILES}


def imports(file: Path) -> set[str]:
    """Our modules that a file imports when it is imported itself, not within a function."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & OURS.keys()


def reachable(module: str) -> set[str]:
    """All of our modules that importing this one imports."""
    seen, waiting = set(), [module]
    while waiting:
        for other in imports(OURS[waiting.pop()]) - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def test_no_import_goes_round_in_a_circle():
    assert not [module for module in OURS if module in reachable(module)]


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("slicing", ("",)),
        ("attention", ("",)),
        ("safe.files", ("",)),
        ("safe.process", ("",)),
        ("safe.tensors", ("",)),
        ("safe.provenance", ("",)),
        ("unet", ("poses", "video", "checkpoint", "posecrafter")),
        ("controlnet", ("poses", "video", "checkpoint", "posecrafter")),
        ("vae", ("poses", "video", "checkpoint", "posecrafter")),
        ("clip", ("poses", "video", "checkpoint", "posecrafter")),
        ("checkpoint", ("openpose", "poses", "posecrafter", "video")),
        ("posecrafter", ("beyond", "train", "sample", "checkpoint", "openpose")),
        ("sample", ("train", "metrics", "evaluate", "demo", "bench")),
        ("train", ("sample", "beyond", "metrics", "evaluate", "demo", "bench")),
        ("evaluate", ("train", "sample", "demo", "bench")),
        ("video", ("poses", "posecrafter", "unet", "pictures")),
        ("pictures.sheets", ("poses", "posecrafter", "run", "metrics", "beyond")),
        ("pictures.pages", ("posecrafter", "run", "metrics", "beyond", "openpose")),
        ("poses.source", ("openpose", "poses.drawn", "poses.maps")),  # JSON poses need none of them
        ("poses.maps", ("openpose",)),
    ],
)
def test_nobody_reaches_up_the_table(module, never):
    above = [other for other in reachable(module) if other.startswith(never) and other != module]
    assert not above


def test_nothing_but_the_demo_and_the_benches_imports_them():
    for module in OURS:
        if not module.startswith(("demo.", "bench.")):
            assert not [other for other in reachable(module) if other.startswith(("demo", "bench"))]


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_and_mistyped_options_do_not_wait_for_torch(script):
    program = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    assert not {{"torch", "numpy"}} & sys.modules.keys(), "loaded before the arguments were read"
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--poses" in done.stdout


def test_the_methods_of_the_command_line_are_those_there_are():
    assert tuple(METHODS) == METHOD_NAMES
