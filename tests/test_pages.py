"""The pages beside results and in runs, opened in a real browser."""

import json
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from demo.motion import motion
from demo.puppet import pose_of, random_puppet
from pictures.pages import EMBEDDED, add_figures, fill, read_data, result_data, run_data, write_page
from poses.pose import draw_pose, save_poses
from poses.source import Driver
from safe.files import replacing_set
from safe.results import BESIDE, claiming, write_report
from video import save_image, write_video

pytest_plugins = "browser"
FRAMES, HEIGHT, WIDTH, FPS, FIRST = 12, 96, 128, 12.5, 3
NASTY = '</script><script>document.title = "broken out"</script><img src=x onerror=alert(1)> & "quoted"'
REPORT = {
    "method": "held",
    "reference": 4,
    "edit": "body_parts",
    "proportions": None,
    "edited_regions": {"face": 12, "left_hand": 12, "right_hand": 9},
    "remarks": ["retargeted to the person's proportions: thigh x1.21"],
    "prompt": NASTY,
    "fps": FPS,
    "manifest": {"prompt": NASTY, "weights": {"unet": "unet.safetensors abc"}},
}


def numbered(frames: range, plus: int = 0) -> list[np.ndarray]:
    """Frames whose grey is their number times 16."""
    return [np.full((HEIGHT, WIDTH, 3), max(0, 16 * frame + plus), np.uint8) for frame in frames]


@pytest.fixture
def result(tmp_path) -> Path:
    """A result with its page, made of frames that tell their numbers; the poses are of frames 3 on of a video."""
    poses = [pose_of(random_puppet(0), state) for state in motion(0, FRAMES)]
    folder = tmp_path / "runs" / NASTY.replace("/", "-")
    folder.mkdir(parents=True)
    (folder / "loss.csv").write_text(
        "step,timestep,loss\n0,fixed,0.2\n1,400,0.3\n2,10,0.04\n2,fixed,0.25\n"
    )
    (folder / "training.json").write_text('{"worse": true}')
    settings = {"clip": "clip.mp4", "poses": None, "frames": [0, 4], "learning_rate": 1e-3, "steps": 2}
    frames = np.stack(numbered(range(2)))
    run = SimpleNamespace(folder=folder, settings=settings, frames=frames, poses=poses[:2])
    write_page(folder / "run.html", run_data(folder, settings, frames, poses[:2], "python train.py"))
    driver = Driver(poses, range(FIRST, FIRST + FRAMES), 15, (HEIGHT, WIDTH), FPS)
    write_video(tmp_path / "driver.mp4", numbered(range(-FIRST, 15 - FIRST), 8), FPS)

    out = tmp_path / "out.mp4"
    with replacing_set(out, (out.suffix, *BESIDE)) as place:
        write_video(place / "out.mp4", numbered(range(FRAMES)), FPS)
        save_image(place / "out.png", frames[0])
        save_poses(place / "out.poses.json", poses, WIDTH, HEIGHT)
        args = Namespace(poses=tmp_path / "driver.mp4", command=f"python sample.py {NASTY}")
        write_page(place / "out.html", result_data(args, place / "out.mp4", run, driver, poses, REPORT))
        write_report(place / "out.mp4", REPORT)
    return out


GREY = """
const canvas = document.createElement("canvas"), ink = canvas.getContext("2d");
ink.drawImage(arguments[0], 0, 0, 8, 8);
return ink.getImageData(4, 4, 1, 1).data[0];
"""


def shown(browser, frame: int) -> list[int]:
    """The numbers that both videos' pixels tell, once both say that they show `frame`."""
    videos = browser.find_elements("css selector", "video")
    end = time.monotonic() + 20
    while {video.get_attribute("data-frame") for video in videos} != {str(frame)}:
        assert time.monotonic() < end, [video.get_attribute("data-frame") for video in videos]
        time.sleep(0.05)
    return [round((browser.execute_script(GREY, video) - plus) / 16) for video, plus in zip(videos, (0, 8))]


def test_both_videos_and_the_poses_step_together(browser, result):
    browser.get(result.with_suffix(".html").as_uri())
    assert shown(browser, 0) == [0, 0]
    for _ in range(5):
        browser.find_element("id", "next").click()
    assert shown(browser, 5) == [5, 5]
    assert browser.find_element("id", "count").text == "frame 5 of 0 to 11, the poses' 8"
    page = browser.find_element("css selector", "body")
    page.send_keys("\ue012")  # the left arrow
    assert shown(browser, 4) == [4, 4]
    assert browser.find_element("id", "poses").get_attribute("data-frame") == "4"
    browser.execute_script("slider.value = 11; slider.dispatchEvent(new Event('input'))")
    assert shown(browser, 11) == [11, 11]
    browser.find_element("id", "play").click()  # from the beginning
    time.sleep(0.5)
    page.send_keys(" ")
    frame = int(browser.find_element("id", "poses").get_attribute("data-frame"))
    assert shown(browser, frame) == [frame, frame]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_flicker_shows_one_of_two_pictures_in_the_same_place(browser, result):
    browser.get(result.with_suffix(".html").as_uri())
    page = browser.find_element("css selector", "body")

    def visible() -> list[tuple]:
        figures = browser.find_elements("css selector", "#stage figure")
        boxes = [(f.find_element("tag name", "b").text, f.location) for f in figures if f.is_displayed()]
        return boxes

    assert [name for name, _ in visible()] == ["result", "poses", "driver"]
    page.send_keys("f")
    (first,) = visible()
    page.send_keys("x")
    (second,) = visible()
    assert (first[0], second[0]) == ("result", "driver") and first[1] == second[1]
    page.send_keys("f")
    assert len(visible()) == 3


def test_names_and_prompts_are_text_and_never_html(browser, result):
    browser.get(result.with_suffix(".html").as_uri())
    assert browser.title == "out"
    text = browser.find_element("css selector", "body").text
    assert f"python sample.py {NASTY}" in text and not browser.find_elements("css selector", "img[src=x]")
    assert "Retargeted to the person's proportions: thigh x1.21." in text
    assert "right hand in 3 of 12 frames" in text
    assert "Training made the model worse: 0.2000 to 0.2500 on fixed noises" in text
    assert "not recorded by a camera" in text
    assert browser.find_element("css selector", "figure.reference b").text == "4"


def test_a_run_shows_its_frames_with_their_poses(browser, result):
    (page,) = result.parent.glob("runs/*/run.html")
    browser.get(page.as_uri())
    canvases = browser.find_elements("css selector", "#training canvas")
    assert len(canvases) == 2 and all(canvas.is_displayed() for canvas in canvases)
    assert len(browser.find_elements("css selector", "#curve circle")) == 4
    assert not browser.find_element("id", "player").is_displayed()
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_poses_are_drawn_as_the_model_sees_them(browser, result):
    browser.get(result.with_suffix(".html").as_uri())
    shown(browser, 0)
    pixels = browser.execute_script(
        "return Array.from(poses.getContext('2d').getImageData(0, 0, poses.width, poses.height).data)"
    )
    height, width = 384, 512
    drawn = np.array(pixels, np.uint8).reshape(height, width, 4)[..., :3]
    ours = draw_pose(pose_of(random_puppet(0), motion(0, FRAMES)[0]), height, width)
    small = [np.asarray(Image.fromarray(each).reduce(4)).astype(int) for each in (drawn, ours)]
    difference = np.abs(small[0] - small[1])
    assert ours.max() == 255 and difference.mean() < 1 and np.quantile(difference, 0.99) < 40


def test_a_page_is_one_file_and_data_in_it_cannot_end_its_script(tmp_path):
    page = tmp_path / "page.html"
    write_page(page, {"title": NASTY})
    assert read_data(page) == {"title": NASTY}
    assert fill({"title": NASTY}).count("</script>") == 2
    assert "http:" not in fill({}).replace("http://www.w3.org", "") and "https:" not in fill({})


def test_a_video_too_large_for_a_page_lies_beside_it(result, monkeypatch):
    monkeypatch.setattr("pictures.pages.EMBEDDED", 100)
    from pictures.pages import embedded, encoded

    assert EMBEDDED > 100 and embedded(result) == {"file": "out.mp4"}
    assert encoded("driver", "", numbered(range(3)), 8) is None


# ---- What evaluate.py adds ----------------------------------------------------------------------

MEASURED = {"measurements": [{"inputs": {"truth": "/clips/truth.mp4"}, "metrics": {"psnr": 27.7123}}]}


def test_figures_come_onto_the_page_and_the_result_is_still_whole(browser, result):
    result.with_suffix(".metrics.json").write_text(json.dumps(MEASURED))
    truth = np.stack(numbered(range(FRAMES), 8))
    assert add_figures(result, {"psnr": "PSNR, dB"}, truth) == result.with_suffix(".html")
    assert add_figures(result, {"psnr": "PSNR, dB"}, truth)  # once more, which replaces
    with claiming(result, (".mp4",), []):  # nothing but files of this program
        pass
    browser.get(result.with_suffix(".html").as_uri())
    text = browser.find_element("css selector", "body").text
    assert "truth: truth.mp4" in text and "PSNR, dB" in text and "27.71" in text
    names = [each.text for each in browser.find_elements("css selector", "#stage b")]
    assert names == ["result", "poses", "driver", "truth"]


def test_what_was_changed_since_gets_no_figures(result):
    result.with_suffix(".metrics.json").write_text(json.dumps(MEASURED))
    page = result.with_suffix(".html")
    page.write_text(page.read_text() + "<!-- a note -->")
    before = page.read_bytes(), result.with_suffix(".json").read_bytes()
    assert add_figures(result, {}) is None
    assert before == (page.read_bytes(), result.with_suffix(".json").read_bytes())
    page.unlink()
    assert add_figures(result, {}) is None and not page.exists()


def test_a_result_from_before_there_were_pages_can_be_replaced(result):
    page, report = result.with_suffix(".html"), json.loads(result.with_suffix(".json").read_text())
    page.unlink()
    del report["files"][page.name]
    write_report(result, report)
    assert page.name not in json.loads(result.with_suffix(".json").read_text())["files"]
    with claiming(result, (".mp4",), []):  # nothing but files of this program
        pass
