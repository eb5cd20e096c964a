"""The pose editor: what its server refuses, and the page in a real browser, by mouse, finger and keyboard.

`EDITOR_PICTURE=docs/editor.png python -m pytest tests/test_editor.py -m slow -k screen_shows` draws that anew.
"""

import functools
import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_rooms import ROOT

import edit
import sample
from command import sampling_arguments
from demo.motion import motion
from demo.puppet import pose_of, random_puppet, render
from device import compute_device
from metrics.figures import find_and_compare, psnr
from openpose import load_openpose
from poses.behind import beside, closest_frames, draw_pictures
from poses.pose import load_poses, place_pose, save_poses
from poses.source import read_driver
from video import save_image, write_video

WIDTH, HEIGHT, FRAMES = 640, 480, 24
KEYS = ("pose_keypoints_2d", "face_keypoints_2d", "hand_left_keypoints_2d", "hand_right_keypoints_2d")
ELBOW, WRIST, SHOULDER = 3, 4, 2  # the right ones
FLAGS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync force-device-scale-factor=1"
)


@pytest.fixture(scope="module")
def dance() -> list:
    """The poses of a dancing puppet."""
    return [pose_of(random_puppet(0), state) for state in motion(1, FRAMES)]


@pytest.fixture
def file(tmp_path, dance) -> Path:
    """Poses with keys that nobody knows, and numbers written as nobody else writes them."""
    save_poses(tmp_path / "plain.json", dance, WIDTH, HEIGHT)
    frames = json.loads((tmp_path / "plain.json").read_text())
    for number, frame in enumerate(frames):
        frame |= {"proportions_of": "run 1", "number": number}
        frame["people"][0]["person_id"] = [-1]
    text = json.dumps(frames, indent=1)
    path = tmp_path / "dance.json"
    path.write_text(re.sub(r"(\d+\.\d+)", r"\g<1>00", text))
    return path


def points(path: Path, frame: int, key: str = KEYS[0]) -> np.ndarray:
    """The keypoints (K, 3) of the first person, as the file has them."""
    return np.reshape(json.loads(path.read_bytes())[frame]["people"][0][key], (-1, 3))


# ---- The server -------------------------------------------------------------------------------------


@contextmanager
def serving(*files: Path, pictures: list[Path] = ()):
    """A session, and a function that asks its server and gives the status and the answer."""
    session = edit.Session(list(files), (HEIGHT, WIDTH), pictures)
    session.read()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(edit.Page, session))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def ask(path: str, method: str = "GET", body: bytes = b"", **headers) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        path = path.replace("TOKEN", session.token)
        connection.request(method, path, body, {name.replace("_", "-"): headers[name] for name in headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    ask.port = server.server_port
    yield session, ask
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(file):
    with serving(file) as session_and_ask:
        yield session_and_ask


def test_the_page_is_given_to_those_with_the_token(served):
    _, ask = served
    status, page = ask("/TOKEN/")
    assert (status, page) == (200, (ROOT / "editor.html").read_text())
    status, content = ask("/TOKEN/poses")
    assert json.loads(content)["files"][0]["text"].startswith("[")


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/poses", {}),
        ("/wrong/poses", {}),
        ("/TOKEN/poses", {"Host": "attacker.example:80"}),
        ("/TOKENmore/save/0", {"method": "POST", "body": b"[]"}),
    ],
)
def test_strangers_are_refused(served, path, headers):
    assert served[1](path, **headers) == (403, "")


@pytest.mark.parametrize(
    "path", ["/TOKEN/save/1/v", "/TOKEN/save/../other.json", "/TOKEN/save/-1/v", "/TOKEN/../edit.py"]
)
def test_nothing_but_the_opened_file_is_written(served, path, file):
    before = sorted(file.parent.iterdir()), file.read_bytes()
    assert served[1](path, "POST", b"[]")[0] in (403, 404)
    assert (sorted(file.parent.iterdir()), file.read_bytes()) == before


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"not JSON", "not readable as JSON"),
        (b'[{"people": []}]', "has 24 frames, and what was to be saved 1"),
        (b'{"a": 1}', "not an OpenPose frame"),
    ],
)
def test_only_poses_are_saved(served, file, body, words):
    before = file.read_bytes()
    status, answer = served[1](f"/TOKEN/save/0/{edit.version_of(before)}", "POST", body)
    assert status == 409 and words in answer and str(file.parent) not in answer
    assert file.read_bytes() == before


def test_more_than_poses_are_is_not_read(served, file):
    assert served[1]("/TOKEN/save/0/v", "POST", Content_Length=str(10**12))[0] == 413


def test_a_version_that_another_page_has_edited_meanwhile_is_not_replaced(served, file):
    first, changed = edit.version_of(file.read_bytes()), file.read_bytes().replace(b"run 1", b"run 2")
    status, second = served[1](f"/TOKEN/save/0/{first}", "POST", changed)
    assert (status, file.read_bytes()) == (200, changed)
    status, answer = served[1](f"/TOKEN/save/0/{first}", "POST", changed)
    assert status == 409 and "has changed since it was opened" in answer
    assert served[1](f"/TOKEN/save/0/{second}", "POST", changed)[0] == 200


def run_edit(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "edit.py", *map(str, arguments), "--no-browser"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_control_c_ends_in_one_line(file):
    process = run_edit(file)
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "edit.py: ended\n")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.json", None, "no such file"),
        ("dance.mp4", b"", "python openpose.py dance.mp4 makes poses"),
        ("dance.json", b"{", "not readable as JSON"),
    ],
)
def test_what_cannot_be_edited_is_told_in_one_line(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=words):
        edit.main(edit.parse_arguments([str(path), "--no-browser"]))


def test_json_that_is_no_utf_8_is_told(file):
    file.write_bytes(file.read_text().encode("utf-16"))
    with pytest.raises(ValueError, match="not UTF-8"):
        edit.main(edit.parse_arguments([str(file), "--no-browser"]))


def test_a_run_is_not_edited(tmp_path, file):
    (tmp_path / "settings.json").write_text("{}")
    file.rename(tmp_path / "frames.poses.json")
    with pytest.raises(ValueError, match="belongs to a run"):
        edit.files_of(tmp_path / "frames.poses.json")


def test_behind_the_poses_are_the_clip_beside_them_or_the_closest_frames_of_a_run(tmp_path, dance):
    frames = np.zeros((3, 48, 64, 3), np.uint8)
    frames[1] = 200
    write_video(tmp_path / "dance.mp4", frames, 24)
    for name in ("dance.poses.json", "dance.json"):
        assert beside(tmp_path / name) == tmp_path / "dance.mp4"
    (tmp_path / "read").mkdir()
    pictures = draw_pictures(tmp_path / "dance.mp4", tmp_path / "read")
    means = [np.asarray(Image.open(picture)).mean() for picture in pictures]
    assert np.allclose(means, [0, 200, 0], atol=3)

    (tmp_path / "run").mkdir()
    save_poses(tmp_path / "run" / "frames.poses.json", [dance[3], dance[20]], 64, 48)
    save_poses(tmp_path / "asked.json", [dance[19], dance[3], dance[4]], 64, 48)
    assert closest_frames(tmp_path / "run", read_driver(tmp_path / "asked.json")) == [1, 0, 0]


# ---- The page ---------------------------------------------------------------------------------------

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window, which keeps what it downloads in `browser.downloads`."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.downloads = downloads
    yield browser
    browser.quit()


class Editor:
    """The page, and what a user does in it."""

    def __init__(self, browser, width: int = 1280, height: int = 800):
        self.browser, self.js = browser, browser.execute_script
        browser.get_log("browser")  # which empties it
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open_served(self, session, port: int) -> "Editor":
        self.browser.get(f"http://127.0.0.1:{port}/{session.token}/")
        return self.opened()

    def open_from_disk(self, *files: Path) -> "Editor":
        self.browser.get((ROOT / "editor.html").as_uri())
        self.find("open").send_keys("\n".join(map(str, files)))
        return self.opened()

    def opened(self) -> "Editor":
        self.wait(lambda: self.js("return frames.length && $('welcome').hidden"))
        self.js("window.onbeforeunload = null")
        self.settle()
        return self

    def find(self, name: str):
        return self.browser.find_element("id", name)

    def wait(self, true, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"waited in vain; the page says: {self.find('status').text}"
            time.sleep(0.02)

    def settle(self) -> None:
        """Waits until the page has drawn."""
        self.browser.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => setTimeout(done))"
        )

    def pose(self, frame: int) -> np.ndarray:
        """All 130 points (130, 3), in pixels of the canvas."""
        return np.reshape(self.js("return [...poseAt(arguments[0])]", frame), (-1, 3))

    def set(self, name: str, value: object) -> None:
        self.js("$(arguments[0]).value = arguments[1]; $(arguments[0]).oninput?.()", name, value)

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        chain = ActionChains(self.browser)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()
        self.settle()

    def on_page(self, spot: np.ndarray) -> tuple[int, int]:
        """Where a point of the canvas (x, y) is on the page."""
        place = self.js(
            "const box = $('canvas').getBoundingClientRect(), at = onScreen(arguments[0]);"
            "return [box.left + at[0], box.top + at[1]]",
            list(map(float, spot)),
        )
        return tuple(round(value) for value in place)

    def drag(
        self, start: np.ndarray, to: np.ndarray, kind: str = "mouse", key: str | None = None
    ) -> np.ndarray:
        """Drags from one point of the canvas to another; returns how far that was (x, y), in its pixels."""
        from selenium.webdriver.common.action_chains import ActionBuilder, ActionChains
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        a, b = self.on_page(start), self.on_page(to)
        if key:
            ActionChains(self.browser).key_down(key).perform()
        actions = ActionBuilder(self.browser, mouse=PointerInput(kind, kind), duration=0)
        pointer = actions.pointer_action
        pointer.move_to_location(*a).pointer_down()
        for share in (0.25, 0.5, 0.75, 1):
            pointer.move_to_location(*(round(p + share * (q - p)) for p, q in zip(a, b)))
        pointer.pointer_up()
        actions.perform()
        if key:
            ActionChains(self.browser).key_up(key).perform()
        self.settle()
        return np.subtract(b, a) / self.js("return view.zoom")

    def save(self) -> None:
        self.find("save").click()
        self.wait(lambda: self.find("status").text.startswith("Saved"))


@pytest.fixture
def editor(browser, served, file) -> Editor:
    session, ask = served
    return Editor(browser).open_served(session, ask.port)


def turn_of(before: np.ndarray, after: np.ndarray, start: int, end: int) -> float:
    """By how many degrees the bone between two points has turned."""
    angles = [np.arctan2(*(pose[end] - pose[start])[1::-1]) for pose in (before, after)]
    return (np.degrees(angles[1] - angles[0]) + 180) % 360 - 180


def rotated(points: np.ndarray, pivot: np.ndarray, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return (points - pivot) @ np.array([[c, s], [-s, c]]) + pivot


@slow
def test_a_dragged_wrist_turns_the_forearm_and_the_hand_and_nothing_else(editor, file):
    text, before = file.read_text(), points(file, 0)
    hand = points(file, 0, KEYS[3])
    editor.find("reach").click()
    wrist, elbow = before[WRIST, :2], before[ELBOW, :2]
    moved = editor.drag(wrist, elbow + np.array([-10, -60]))
    editor.save()
    after = points(file, 0)
    degrees = turn_of(before, after, ELBOW, WRIST)
    wanted = wrist + moved - elbow
    reached = elbow + wanted * np.linalg.norm(wrist - elbow) / np.linalg.norm(wanted)
    assert np.abs(after[WRIST, :2] - reached).max() < 1e-3
    assert abs(degrees) > 20
    assert np.abs(points(file, 0, KEYS[3])[:, :2] - rotated(hand[:, :2], elbow, degrees)).max() < 2e-3
    # All else is as it was, to the last digit: what is put back gives the file as it was.
    was = iter(re.findall(r"-?\d+\.\d+", text))
    changed = [
        (old, new) for old, new in zip(was, re.findall(r"-?\d+\.\d+", file.read_text())) if old != new
    ]
    assert len(changed) == 2 * (1 + 21)
    restored = json.loads(file.read_text())
    restored[0]["people"][0] |= {key: json.loads(text)[0]["people"][0][key] for key in (KEYS[0], KEYS[3])}
    assert restored == json.loads(text)


@slow
def test_a_wrist_reaches_with_the_whole_arm_whose_bones_keep_their_length(editor, file):
    before = points(file, 0)
    goal = before[SHOULDER, :2] + np.array([-40, -50])
    moved = editor.drag(before[WRIST, :2], goal)
    after = editor.pose(0)[:18]
    assert np.abs(after[WRIST, :2] - before[WRIST, :2] - moved).max() < 1e-3
    for a, b in ((SHOULDER, ELBOW), (ELBOW, WRIST)):
        lengths = [np.linalg.norm(pose[a, :2] - pose[b, :2]) for pose in (before, after)]
        assert lengths[0] == pytest.approx(lengths[1], abs=1e-6)
    others = [j for j in range(18) if j not in (ELBOW, WRIST)]
    assert np.array_equal(after[others], before[others])


@slow
def test_with_shift_a_point_moves_alone_and_undo_and_redo_go_back_and_on(editor, file):
    from selenium.webdriver import Keys

    before = editor.pose(0)
    moved = editor.drag(before[ELBOW, :2], before[ELBOW, :2] + 30, key=Keys.SHIFT)
    after = editor.pose(0)
    assert np.abs(after[ELBOW, :2] - before[ELBOW, :2] - moved).max() < 1e-6
    assert np.array_equal(np.delete(after, ELBOW, 0), np.delete(before, ELBOW, 0))
    editor.press(Keys.CONTROL, "z")
    assert np.array_equal(editor.pose(0), before)
    assert not editor.find("save").is_enabled() and not editor.find("undo").is_enabled()
    editor.press(Keys.CONTROL, Keys.SHIFT, "z")
    assert np.array_equal(editor.pose(0), after)
    editor.find("undo").click()
    assert editor.js("return textOf(files[0])") == file.read_text()


@slow
def test_arrow_keys_move_the_chosen_point_and_commas_and_points_the_frame(editor):
    from selenium.webdriver import Keys

    before = editor.pose(1)
    editor.press(".")
    editor.find("rigid").click()
    editor.find("canvas").click()
    editor.js("$('point').value = 3; $('point').onchange()")
    editor.press(Keys.ARROW_RIGHT)
    editor.press(Keys.SHIFT, Keys.ARROW_UP)
    assert np.allclose(editor.pose(1)[ELBOW, :2] - before[ELBOW, :2], [1, -10])
    editor.press(Keys.CONTROL, "z")
    editor.press(Keys.CONTROL, "z")
    assert np.array_equal(editor.pose(1), before)
    editor.press(",")
    assert editor.js("return state.frame") == 0


@slow
def test_an_edit_holds_and_fades_over_the_chosen_frames(editor):
    poses = [editor.pose(frame) for frame in range(FRAMES)]
    editor.js("go(10)")
    editor.set("hold", 2)
    editor.set("fade", 3)
    editor.settle()
    editor.drag(poses[10][ELBOW, :2], rotated(poses[10][ELBOW, :2], poses[10][SHOULDER, :2], 50))
    turns = [turn_of(poses[f], editor.pose(f), SHOULDER, ELBOW) for f in range(FRAMES)]
    full = turns[10]
    assert abs(full) == pytest.approx(50, abs=1)
    shares = {8: 1, 9: 1, 11: 1, 12: 1, 13: 0.8536, 14: 0.5, 15: 0.1464, 7: 0.8536, 6: 0.5, 5: 0.1464}
    for frame in set(range(FRAMES)) - {10}:
        assert turns[frame] == pytest.approx(shares.get(frame, 0) * full, abs=0.01)
    for frame in range(FRAMES):
        others = [j for j in range(130) if j not in (ELBOW, WRIST) and j < 109]
        assert np.array_equal(editor.pose(frame)[others], poses[frame][others])  # to the last bit
        # The hand hangs on the arm in each frame.
        assert turn_of(poses[frame], editor.pose(frame), 109, 121) == pytest.approx(turns[frame], abs=0.01)
    editor.find("undo").click()
    assert all(np.array_equal(editor.pose(frame), poses[frame]) for frame in range(FRAMES))


@slow
def test_an_arm_that_is_raised_beyond_half_a_circle_goes_the_same_way_in_all_frames(editor):
    poses = [editor.pose(frame) for frame in range(FRAMES)]
    editor.set("fade", 3)
    editor.js(
        """go(10);
        const edit = beginEdit(), pivot = place(edit.before, arguments[0]);
        const arm = minus(place(edit.before, arguments[1]), pivot);
        for (let degrees = 0; degrees <= 200; degrees += 10) {
          const to = plus(pivot, turned(arm, degrees * Math.PI / 180));
          edit.show(dragged(edit.before, arguments[1], to, { rigid: true }));
        }""",
        SHOULDER,
        ELBOW,
    )
    turns = [turn_of(poses[frame], editor.pose(frame), SHOULDER, ELBOW) for frame in (10, 11, 12, 13)]
    assert np.allclose(turns, [-160, 200 * 0.8536, 100, 200 * 0.1464], atol=0.01)


@slow
def test_between_key_poses_bones_turn_and_keep_their_length(editor):
    before, end = editor.pose(4), editor.pose(12)
    goal = rotated(end[ELBOW, :2], end[SHOULDER, :2], 80)
    editor.js("go(12)")
    editor.settle()
    editor.drag(end[ELBOW, :2], goal)
    for frame in (4, 12):
        editor.js("go(arguments[0])", frame)
        editor.press("k")
    editor.press("i")
    end = editor.pose(12)
    whole = turn_of(before, end, SHOULDER, ELBOW)
    for frame, share in {4: 0, 6: 0.1464, 8: 0.5, 10: 0.8536, 12: 1}.items():
        assert turn_of(before, editor.pose(frame), SHOULDER, ELBOW) == pytest.approx(
            share * whole, abs=0.01
        )
        bone = np.linalg.norm(np.subtract(*editor.pose(frame)[[SHOULDER, ELBOW], :2]))
        low, high = sorted(
            np.linalg.norm(np.subtract(*pose[[SHOULDER, ELBOW], :2])) for pose in (before, end)
        )
        assert low - 1e-6 <= bone <= high + 1e-6
    # An edit of a frame between them spreads to neither.
    editor.set("hold", 20)
    editor.js("go(8)")
    editor.settle()
    editor.drag(editor.pose(8)[1, :2], editor.pose(8)[1, :2] + 20)
    assert np.array_equal(editor.pose(4), before) and np.array_equal(editor.pose(12), end)
    assert not np.array_equal(editor.pose(5), before)


@slow
def test_edits_that_cannot_be_saved_are_kept_as_a_download(editor, file):
    before = editor.pose(0)
    editor.drag(before[1, :2], before[1, :2] + 20)
    file.write_bytes(changed := file.read_bytes().replace(b"run 1", b"run 2"))
    editor.find("save").click()
    editor.wait(lambda: "has changed since it was opened here. A copy is" in editor.find("status").text)
    assert file.read_bytes() == changed and editor.find("save").is_enabled()
    copy = editor.browser.downloads / file.name
    editor.wait(copy.exists)
    assert np.abs(points(copy, 0)[:, :2] - before[:18, :2]).min() > 1


@slow
def test_hands_and_points_are_hidden_deleted_brought_back_mirrored_and_pasted(editor):
    from selenium.webdriver import Keys

    before = editor.pose(0)
    editor.press("4")
    editor.press("h")
    hidden = editor.pose(0)
    assert not hidden[109:, 2].any() and np.array_equal(hidden[109:, :2], before[109:, :2])
    editor.press("r")
    assert np.array_equal(editor.pose(0), before)
    editor.press(Keys.DELETE)
    assert not editor.pose(0)[109:].any()
    editor.press("3")
    editor.press(Keys.CONTROL, "c")
    editor.press("4")
    editor.press(Keys.CONTROL, "v")
    pasted, left = editor.pose(0)[109:, :2], before[88:109, :2]
    lengths = [np.linalg.norm(hand - hand[0], axis=1) for hand in (pasted, left)]
    assert np.allclose(*lengths) and np.allclose(
        pasted[0] - before[4, :2], (left[0] - before[7, :2]) * 0, atol=2
    )
    editor.press("1")
    editor.press("m")
    assert not np.array_equal(editor.pose(0)[:18], before[:18])
    assert np.allclose(editor.pose(0)[4, 1], before[7, 1])
    editor.press("m")
    assert np.allclose(editor.pose(0)[:88], before[:88], atol=1e-9)


@slow
def test_a_finger_on_a_narrow_screen_moves_the_box_of_a_hand(browser, file):
    editor = Editor(browser, 390, 844).open_from_disk(file)
    assert editor.js("return document.documentElement.scrollWidth") == 390
    small = editor.js(
        "return [...document.querySelectorAll('button, select, input[type=number], label')]"
        ".filter((each) => each.offsetParent && each.offsetHeight < 44).map((each) => each.outerHTML)"
    )
    assert not small
    before = editor.pose(0)
    nearer = before[WRIST, :2] + 0.3 * (before[SHOULDER, :2] - before[WRIST, :2])
    wrist = editor.drag(before[WRIST, :2], nearer, "touch")
    assert np.abs(editor.pose(0)[WRIST, :2] - before[WRIST, :2] - wrist).max() < 1e-3
    editor.js("choosePart('left')")
    editor.settle()
    before = editor.pose(0)
    corner = before[88:109, :2].max(axis=0) + 14 / editor.js("return view.zoom")
    moved = editor.drag(corner, corner + (corner - before[88, :2]) * 0.5, "touch")
    after = editor.pose(0)
    ratio = np.linalg.norm(corner + moved - before[88, :2]) / np.linalg.norm(corner - before[88, :2])
    assert np.allclose(
        after[88:109, :2] - before[88, :2], (before[88:109, :2] - before[88, :2]) * ratio, atol=0.5
    )
    assert np.array_equal(np.delete(after, range(88, 109), 0), np.delete(before, range(88, 109), 0))


def one_frame(file: Path) -> str:
    return json.dumps(json.loads(file.read_text())[0])


def as_body_25(file: Path) -> str:
    """A frame of OpenPose's own: BODY_25, a face of 68, hands missing, in fractions."""
    person = json.loads(file.read_text())[0]["people"][0]
    scale = (1 / WIDTH, 1 / HEIGHT, 1)
    body = np.reshape(person[KEYS[0]], (-1, 3)) * scale
    body = np.concatenate([body[:8], (body[8:9] + body[11:12]) / 2, body[8:], body[:6]])
    face = np.reshape(person[KEYS[1]], (-1, 3))[:68] * scale
    other = {KEYS[0]: (body * (0.2, 0.2, 1)).ravel().tolist()}
    people = [
        other,
        {KEYS[0]: body.ravel().tolist(), KEYS[1]: face.ravel().tolist(), KEYS[2]: [], KEYS[3]: None},
    ]
    return json.dumps({"version": 1.3, "people": people, "canvas_width": WIDTH, "canvas_height": HEIGHT})


def as_windows(file: Path) -> str:
    """With a byte order mark, and lines that end as Windows ends them."""
    return "\ufeff" + file.read_text().replace("\n", "\r\n")


def as_signed(file: Path) -> str:
    """From -1 to 1, as with OpenPose's keypoint_scale 4."""
    frames = json.loads(file.read_text())
    for frame in frames:
        for key in KEYS:
            points = np.reshape(frame["people"][0][key], (-1, 3)) * (2 / WIDTH, 2 / HEIGHT, 1) - (1, 1, 0)
            frame["people"][0][key] = points.ravel().tolist()
    return json.dumps(frames)


def as_other_editor(file: Path) -> str:
    """Bodies alone, of points that may have no score."""
    frames = []
    for frame in json.loads(file.read_text()):
        points = np.reshape(frame["people"][0][KEYS[0]], (-1, 3)).tolist()
        points = [[*point[:2]] if point[2] else None for point in points]
        frames.append({"keypoints": [points]})
    return json.dumps({"width": WIDTH, "height": HEIGHT, "frames": frames})


@slow
@pytest.mark.parametrize("kind", [one_frame, as_body_25, as_windows, as_signed, as_other_editor])
def test_from_the_disk_every_kind_of_json_is_edited_and_downloaded(browser, file, tmp_path, kind):
    path, text = tmp_path / f"{kind.__name__}.json", kind(file)
    path.write_bytes(text.encode())
    editor = Editor(browser).open_from_disk(path)
    assert editor.js("return textOf(files[0])").encode() == text.encode()
    (asked,) = read_driver(path).poses[:1]
    shown = editor.pose(0) / (WIDTH, HEIGHT, 1)
    assert np.allclose(shown[:18], asked.body, atol=1e-5) and np.allclose(
        shown[18:88], asked.face, atol=1e-5
    )

    place = editor.pose(0)[1, :2]
    moved = editor.drag(place, place + [20, 10]) / (WIDTH, HEIGHT)
    editor.save()
    editor.wait(lambda: (browser.downloads / path.name).exists())
    (after,) = read_driver(browser.downloads / path.name).poses[:1]
    for name, part in vars(asked).items():
        there = part[:, 2] > 0
        assert np.allclose(getattr(after, name)[there, :2], part[there, :2] + moved, atol=1e-5), name
        assert np.array_equal(getattr(after, name)[:, 2], part[:, 2])


@slow
def test_poses_are_pasted_where_nobody_was(browser, file, tmp_path):
    frames = json.loads(file.read_text())[:3]
    frames[1]["people"] = []
    frames[2]["people"] = [{"person_id": [7]}]
    path = tmp_path / "gaps.json"
    path.write_text(json.dumps(frames))
    editor = Editor(browser).open_from_disk(path)
    editor.js("copy()")
    for frame in (1, 2):
        editor.js("go(arguments[0]); paste()", frame)
    saved = json.loads(editor.js("return textOf(files[0])"))
    assert saved[0] == frames[0] and saved[2]["people"][0]["person_id"] == [7]
    for frame in (1, 2):
        for key in KEYS:
            assert np.allclose(saved[frame]["people"][0][key], frames[0]["people"][0][key], atol=1e-3)


@slow
def test_a_face_that_nobody_had_is_brought_back_in_the_units_of_the_body(browser, file, tmp_path):
    (frame, *_) = json.loads(file.read_text())
    frame = {"people": [{KEYS[0]: frame["people"][0][KEYS[0]]}]}
    path = tmp_path / "body.json"
    path.write_text(json.dumps(frame))
    editor = Editor(browser).open_from_disk(path)
    editor.press("2")
    editor.press("r")
    (person,) = json.loads(editor.js("return textOf(files[0])"))["people"]
    face, nose = np.reshape(person[KEYS[1]], (-1, 3)), person[KEYS[0]][:2]
    assert person[KEYS[0]] == frame["people"][0][KEYS[0]] and face.shape == (70, 3)
    assert (face[:, 2] == 1).all() and np.abs(face[:, :2] - nose).max() < 150


@slow
def test_a_layout_without_a_place_for_faces_says_so(browser, file, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(as_other_editor(file))
    editor = Editor(browser).open_from_disk(path)
    editor.press("2")
    editor.press("r")
    editor.find("save").click()
    editor.wait(lambda: "other.json: has no place for faces" in editor.find("status").text)
    assert editor.find("save").is_enabled()


@slow
def test_of_openposes_own_folder_only_the_frame_that_was_edited_is_written(browser, file, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(json.loads(file.read_text())[:11]):
        (folder / f"dance_{number}_keypoints.json").write_text(json.dumps(frame))
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    with serving(*edit.files_of(folder)) as (session, ask):
        editor = Editor(browser).open_served(session, ask.port)
        editor.press(".")
        editor.js("go(10)")
        editor.settle()
        editor.drag(editor.pose(10)[1, :2], editor.pose(10)[1, :2] + 20)
        editor.save()
    changed = [path.name for path in folder.iterdir() if path.read_text() != texts[path.name]]
    assert changed == ["dance_10_keypoints.json"]


@slow
def test_who_is_clicked_on_is_edited_through_all_frames_and_nobody_else(browser, file, tmp_path):
    frames = json.loads(file.read_text())[:4]
    for number, frame in enumerate(frames):
        other = {
            key: (np.reshape(frame["people"][0][key], (-1, 3)) * (0.5, 0.5, 1)).ravel().tolist()
            for key in KEYS
        }
        frame["people"].insert(number % 2, other)  # smaller, and in any order
    path = tmp_path / "two.json"
    path.write_text(json.dumps(frames))
    editor = Editor(browser).open_from_disk(path)
    assert editor.js("return frames.map((frame) => frame.chosen)") == [1, 0, 1, 0]
    editor.js("go(0)")
    small = np.reshape(frames[0]["people"][0][KEYS[0]], (-1, 3))
    editor.drag(small[10, :2], small[10, :2])
    assert editor.js("return frames.map((frame) => frame.chosen)") == [0, 1, 0, 1]
    editor.set("hold", 9)
    editor.drag(editor.pose(0)[1, :2], editor.pose(0)[1, :2] + 20)
    saved = json.loads(editor.js("return textOf(files[0])"))
    for number, (frame, was) in enumerate(zip(saved, frames)):
        assert frame["people"][1 - number % 2] == was["people"][1 - number % 2]
        assert frame["people"][number % 2] != was["people"][number % 2]


@slow
def test_what_is_no_poses_is_told_and_the_page_goes_on(browser, file, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('[{"peple": []}]')
    editor = Editor(browser).open_from_disk(file)
    editor.find("reopen").send_keys(str(bad))
    editor.wait(lambda: "not an OpenPose frame" in editor.find("status").text)
    assert editor.js("return frames.length") == FRAMES
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


@slow
def test_the_screen_shows_picture_pose_and_tools_without_scrolling_sideways(browser, tmp_path):
    """Also leaves a picture of the wide page where EDITOR_PICTURE says."""
    puppet, states = random_puppet(0), motion(1, 36)
    save_poses(
        tmp_path / "dance.poses.json",
        [place_pose(pose_of(puppet, state), 1, 4 / 3, 0, 0) for state in states],
        960,
        720,
    )
    save_image(tmp_path / "12.jpg", render(puppet, states[12], 960)[0][:720], quality=90)
    for name, size in {"wide": (1280, 800), "narrow": (390, 844)}.items():
        with serving(tmp_path / "dance.poses.json", pictures=[tmp_path / "12.jpg"] * 36) as (session, ask):
            editor = Editor(browser, *size).open_served(session, ask.port)
            editor.set("hold", 2)
            editor.set("fade", 6)
            for key in (3, 24):
                editor.js("go(arguments[0]); toggleKey()", key)
            editor.js("go(12)")
            editor.wait(lambda editor=editor: editor.js("return pictureOf(12).complete"))
            editor.settle()
            wrist, shoulder = editor.pose(12)[[WRIST, SHOULDER], :2]
            editor.drag(wrist, shoulder + [-110, -190])
            assert editor.js("return document.documentElement.scrollWidth") == size[0]
            assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
            shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            few = shot.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            save_image(tmp_path / f"{name}.png", few, optimize=True)
    if "EDITOR_PICTURE" in os.environ:
        shutil.copy(tmp_path / "wide.png", os.environ["EDITOR_PICTURE"])


RAISED = range(18, 31)  # the frames of the demo's dance that get the whole edit; ten on each side fade


@slow
def test_an_arm_that_was_raised_in_the_editor_is_raised_in_the_result(browser, tmp_path):
    """Samples once more with the run that `make demo` leaves, which takes minutes."""
    run = Path(os.environ.get("DEMO_RUN", ROOT / "runs" / "demo"))
    if not (run / "result.poses.json").exists():
        pytest.skip(f"{run}: no demo; make one with: make demo")
    edited = tmp_path / "edited.json"
    shutil.copy(run / "poses.json", edited)
    with serving(edited) as (session, ask):
        editor = Editor(browser).open_served(session, ask.port)
        editor.set("hold", 6)
        editor.set("fade", 4)
        editor.js("go(24)")
        editor.settle()
        wrist, shoulder = editor.pose(24)[[WRIST, SHOULDER], :2]
        editor.drag(wrist, shoulder + [-25, -60])
        editor.save()

    options = "--no-retarget", "--ddim-steps", 10, "--fps", 12, "--out", tmp_path / "result.mp4"
    video = sample.main(sampling_arguments(list(map(str, ("--run", run, "--poses", edited, *options)))))
    asked, before = load_poses(tmp_path / "result.poses.json"), load_poses(run / "result.poses.json")
    height, width = video.shape[1:3]
    turns = [[], []]
    for frame, (pose, old) in enumerate(zip(asked, before)):
        bodies = [each.body[:, :2] * (width, height) for each in (pose, old)]
        others = np.delete(np.arange(18), [ELBOW, WRIST])
        assert np.abs(bodies[0] - bodies[1])[others].max() <= 0.5
        assert frame not in RAISED or bodies[0][WRIST, 1] < bodies[0][SHOULDER, 1] - 40
        for of_bone, bone in zip(turns, ((SHOULDER, ELBOW), (ELBOW, WRIST))):
            of_bone.append(np.radians(turn_of(*bodies[::-1], *bone)))

    # The true frames: the puppet's arm turns as its pose did.
    puppet, truth, masks = random_puppet(0), [], []
    for state, upper, lower in zip(motion(1, len(asked)), *turns):
        shoulder = state.shoulder[0] + upper, state.shoulder[1]
        elbow = state.elbow[0] + lower - upper, state.elbow[1]
        frame, _, mask = render(puppet, replace(state, shoulder=shoulder, elbow=elbow), width)
        truth.append(frame[:height])
        masks.append(mask[:height])
    pck, _ = find_and_compare(load_openpose("demo", compute_device()[0]), video, asked)
    person = psnr(video, np.stack(truth), np.stack(masks))
    unedited = json.loads((run / "metrics.json").read_text())["psnr_person"]
    print(f"PCK {pck:.4f}; PSNR of the person {person:.2f} dB, unedited {unedited:.2f} dB")
    assert pck >= 0.98
    assert person >= unedited - 1
