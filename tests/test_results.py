"""A result's files belong together: they replace nothing else, and can be verified."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import sampling_arguments
from safe.files import whole_folder
from safe.provenance import comment, mark_video, png_marks
from safe.results import BESIDE, claiming, replacing_result, verify, write_report
from video import save_image, write_video

ENDINGS = (".mp4", *BESIDE)
MANIFEST = {
    "version": "1",
    "prompt": "a person\x1b[31m",
    "weights": {"unet": "unet.safetensors " + "ab" * 32},
}


def write(out: Path, level: int = 0, page: bool = True, meanwhile: Path | None = None) -> None:
    """Writes a result; meanwhile somebody else writes another file."""
    with replacing_result(out) as folder:
        frames = np.full((2, 32, 32, 3), level, np.uint8)
        write_video(folder / out.name, frames, 8, comment(MANIFEST))
        mark_video(folder / out.name, MANIFEST)
        save_image((folder / out.name).with_suffix(".png"), frames[0], pnginfo=png_marks(MANIFEST))
        (folder / out.name).with_suffix(".poses.json").write_text("[]")
        if page:
            (folder / out.name).with_suffix(".html").write_text("<!DOCTYPE html>[]")
        write_report(folder / out.name, {"manifest": MANIFEST, "ddim_steps": 3})
        if meanwhile:
            meanwhile.write_text("mine")


def check_out(*given) -> None:
    """What `sample.py` says of its `--out` before it begins."""
    with claiming(*given):
        pass


@pytest.fixture
def out(tmp_path):
    write(tmp_path / "out.mp4")
    return tmp_path / "out.mp4"


def test_a_result_replaces_a_result(out):
    check_out(out, (".mp4",), [])
    before = out.read_bytes()
    write(out, 200)
    check_out(out, (".mp4",), [])
    assert out.read_bytes() != before and len(list(out.parent.iterdir())) == 5
    out.with_suffix(".png").unlink()  # what the user does not want
    check_out(out, (".mp4",), [])


def test_a_result_without_a_page_leaves_no_older_page_beside_it(out):
    check_out(out, (".mp4",), [])
    write(out, 200, page=False)
    assert not out.with_suffix(".html").exists() and verify(out)
    check_out(out, (".mp4",), [])
    out.with_suffix(".html").write_text("notes on this result")
    with pytest.raises(
        ValueError, match=r"would overwrite .*out\.html, which is not the file that out\.json"
    ):
        check_out(out, (".mp4",), [])


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_others_wrote_is_never_replaced(tmp_path, ending):
    (tmp_path / f"out{ending}").write_text("{}")
    with pytest.raises(ValueError, match=rf"would overwrite .*out{ending}, .* move it away, or choose"):
        check_out(tmp_path / "out.mp4", (".mp4",), [])


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_changed_since_is_not_replaced(out, ending):
    file = out.with_suffix(ending)
    file.write_bytes(
        file.read_bytes().replace(b'"ddim_steps": 3', b'"ddim_steps": 4').replace(b"[]", b"[ ]")
    )
    if ending in (".mp4", ".png"):
        file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=rf"would overwrite .*out{ending}, which is no.* move it away"):
        check_out(out, (".mp4",), [])


def test_the_report_of_another_video_is_not_replaced(out):
    with pytest.raises(ValueError, match=r"out\.json, which is the report of out\.mp4"):
        check_out(out.with_suffix(".mov"), (".mov",), [])


def test_a_report_that_only_looks_like_one_is_not_replaced(out):
    for content in ("[]", '{"files": 1}', '{"files": {}, "ddim_steps": 3}', "[" * 100_000):
        out.with_suffix(".json").write_text(content)
        with pytest.raises(ValueError, match=r"out\.json, which is no report"):
            check_out(out, (".mp4",), [])


def test_a_result_that_waits_is_moved_before_anything_is_judged(out):
    waiting = whole_folder(out)
    (out.parent / "other").mkdir()
    write(out.parent / "other" / "out.mp4", 200)
    (out.parent / "other").rename(waiting)
    out.with_suffix(".json").unlink()
    new = (waiting / "out.mp4").read_bytes()
    check_out(out, (".mp4",), [])
    assert out.read_bytes() == new and verify(out)
    assert len(list(out.parent.iterdir())) == 5


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_comes_while_a_result_is_made_stays_and_so_does_the_result(tmp_path, ending):
    out, kept = tmp_path / "out.mp4", tmp_path / "out_2" / "out.mp4"
    with claiming(out, (".mp4",), []):
        with pytest.raises(
            OSError, match=rf"would overwrite .*out{ending}, .*; the result lies in .*out_2 instead"
        ):
            write(out, meanwhile=out.with_suffix(ending))
    assert out.with_suffix(ending).read_text() == "mine" and verify(kept)
    assert {path.name for path in tmp_path.iterdir()} == {f"out{ending}", "out_2"}
    with pytest.raises(ValueError, match=r"would overwrite .* move it away"):
        check_out(out, (".mp4",), [])


def test_a_result_that_was_changed_while_its_successor_was_made_stays(out):
    with (
        claiming(out, (".mp4",), []),
        pytest.raises(OSError, match=r"would overwrite .*out\.mp4, which is not"),
    ):
        write(out, meanwhile=out)
    assert out.read_text() == "mine" and verify(out.parent / "out_2" / "out.mp4")


def test_one_result_is_made_by_one_process(out):
    with claiming(out, (".mp4",), []):
        for other in (out, out.with_suffix(".mov")):  # whose sheet and report have the same names
            with pytest.raises(
                OSError, match=r"out\.m.*: another process is making it; wait for it, or choose"
            ):
                check_out(other, (".mp4", ".mov"), [])
        check_out(out.with_name("else.mp4"), (".mp4",), [])
    assert len(list(out.parent.iterdir())) == 5
    check_out(out, (".mp4",), [])


def test_a_name_that_is_too_long_for_unfinished_files_is_told_before_anything_is_made(tmp_path):
    check_out(tmp_path / f"{'ü' * 98}.mp4", (".mp4",), [])
    with pytest.raises(ValueError, match="may have 200 bytes at most; choose another --out"):
        check_out(tmp_path / f"{'ü' * 99}.mp4", (".mp4",), [])


def test_places_that_are_none_are_told(tmp_path):
    (tmp_path / "file").touch()
    for out, words in (
        (Path("."), r"\.: is a folder"),
        (tmp_path / "file" / "a.mp4", "file is a file, not a folder"),
    ):
        with pytest.raises(ValueError, match=rf"{words}; choose another --out$"):
            check_out(out, (".mp4",), [])
    with pytest.raises(ValueError, match="/dev/null is a file, not a folder"):
        check_out(Path("/dev/null/a.mp4"), (".mp4",), [])


# ---- --verify -----------------------------------------------------------------------------------


def answer(*command: object, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        sampling_arguments([str(part) for part in command])
    return stopped.value.code, *capsys.readouterr()


@pytest.mark.parametrize("ending", [".mp4", ".png"])
def test_a_file_that_is_as_it_was_written_is_verified(out, capsys, ending):
    code, told, _ = answer("--verify", out.with_suffix(ending), capsys=capsys)
    assert code == 0 and f"out{ending}: is the file that was written" in told
    assert "version: 1\n" in told and f"weights unet: unet.safetensors {'ab' * 32}\n" in told
    assert "\x1b" not in told


@pytest.mark.parametrize("ending", [".mp4", ".png"])
def test_a_changed_file_is_named(out, capsys, ending):
    with out.with_suffix(ending).open("ab") as file:
        file.write(b"\0")
    code, told, _ = answer("--verify", out.with_suffix(ending), capsys=capsys)
    assert code == 2 and f"out{ending}: WAS CHANGED" in told


def test_without_its_report_nothing_is_promised(out, capsys):
    report = out.with_suffix(".json")
    report.write_text(report.read_text().replace('"ddim_steps": 3', '"ddim_steps": 4'))
    code, told, _ = answer("--verify", out, capsys=capsys)
    assert code == 2 and "cannot be said" in told and "was changed itself" in told
    report.unlink()
    code, told, _ = answer("--verify", out, capsys=capsys)
    assert code == 2 and "cannot be said: its report out.json is not beside it" in told


def test_files_of_others_are_one_line(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / "other.mp4").write_bytes(b"no video")
    (tmp_path / "broken.png").write_bytes((tmp_path / "other.png").read_bytes()[:30])
    for name in ("other.png", "other.mp4", "broken.png", "gone.mp4"):
        code, told, error = answer("--verify", tmp_path / name, capsys=capsys)
        assert code == 2 and not told and error.count("\n") == 1 and name in error


def test_verifying_needs_no_poses_and_no_torch(out):
    script = Path(__file__).parents[1] / "sample.py"
    program = f"""
import runpy, sys
sys.argv = ["sample.py", "--verify", {str(out)!r}]
try:
    runpy.run_path({str(script)!r}, run_name="__main__")
finally:
    assert not {{"torch", "numpy"}} & sys.modules.keys()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is the file that was written" in done.stdout


def test_the_report_says_its_own_hash(out):
    report = json.loads(out.with_suffix(".json").read_text())
    assert (
        report["files"].keys() == {f"out{ending}" for ending in ENDINGS[:-1]}
        and len(report["sha256"]) == 64
    )
