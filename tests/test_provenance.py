"""Results say that they are synthetic, in the way that other programs read."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from safe.provenance import SOURCE_TYPE, SYNTHETIC, boxes, mark_video, png_marks, read_manifest
from video import read_frames, write_video

MANIFEST = {"version": "1", "prompt": 'a <person> & "friend"', "seed": 3, "weights": {"unet": "ab" * 32}}


@pytest.fixture
def video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "made.mp4", frames, 8)
    mark_video(tmp_path / "made.mp4", MANIFEST)
    return tmp_path / "made.mp4"


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "made.png", pnginfo=png_marks(MANIFEST))
    return tmp_path / "made.png"


def test_marks_are_read_back(video, picture):
    assert read_manifest(video) == read_manifest(picture) == MANIFEST


def test_a_marked_video_is_still_a_video(video):
    frames, fps = read_frames(video)
    assert len(frames) == 4 and fps == 8


def test_files_of_others_have_no_manifest(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    write_video(tmp_path / "other.mp4", np.zeros((2, 32, 32, 3), np.uint8), 8)
    assert read_manifest(tmp_path / "other.png") is None
    assert read_manifest(tmp_path / "other.mp4") is None


def test_damaged_marks_are_named(video):
    video.write_bytes(video.read_bytes().replace(b"</rdf:RDF>", b"</rdf:RDX>"))
    with pytest.raises(ValueError, match=r"made\.mp4: its marks are damaged"):
        read_manifest(video)


@pytest.mark.parametrize("tail", [b"", b"\0\0\0\3uuid", b"\xff\xff\xff\xffuuid", b"\0\0\0\1uuid\xff"])
def test_lying_boxes_end_the_search(tmp_path, tail):
    (tmp_path / "lying.mp4").write_bytes(b"\0\0\0\x0cfree1234" + tail)
    assert [kind for kind, *_ in boxes(tmp_path / "lying.mp4")] == [b"free"]
    assert read_manifest(tmp_path / "lying.mp4") is None


@pytest.mark.skipif(not shutil.which("exiftool"), reason="needs exiftool")
def test_exiftool_finds_the_marks(video, picture):
    for file in (video, picture):
        done = subprocess.run(["exiftool", "-j", file], capture_output=True, text=True, check=True)
        (found,) = json.loads(done.stdout)
        assert found["DigitalSourceType"] == SOURCE_TYPE
        assert found["CreatorTool"].startswith("PoseCrafter")
        if file == picture:
            assert found["Comment"].startswith(SYNTHETIC)
