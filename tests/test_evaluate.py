import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
from demo.puppet import clip
from evaluate import METRICS
from metrics.clip_images import ImageConfig, ImageEncoder
from metrics.figures import frame_l1, frame_psnr, pose_fidelity, psnr, ssim, video_sim
from metrics.flicker import frame_flicker, frame_warp_error
from metrics.pictures import plot, worst_frames
from poses.people import INTERPOLATED
from poses.pose import Pose, load_poses, place_pose, save_poses
from video import save_image


def noise(seed: int, frames: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 24, 32, 3), np.uint8)


def test_psnr_is_computed_by_hand():
    truth = np.full((1, 4, 4, 3), 100, np.uint8)
    assert psnr(truth + np.uint8(10), truth) == pytest.approx(20 * np.log10(255 / 10))


def test_psnr_does_not_wrap_around_where_uint8_would():
    darker, brighter = np.zeros((1, 4, 4, 3), np.uint8), np.ones((1, 4, 4, 3), np.uint8)
    assert psnr(darker, brighter) == psnr(brighter, darker) == pytest.approx(20 * np.log10(255))


def test_psnr_averages_frames_and_looks_at_masked_pixels_only():
    truth = np.full((2, 4, 4, 3), 100, np.uint8)
    result = truth.copy()
    result[0] += 10
    result[1] += 20
    each = [20 * np.log10(255 / 10), 20 * np.log10(255 / 20)]
    assert psnr(result, truth) == pytest.approx(np.mean(each))
    mask = np.zeros((2, 4, 4), bool)
    mask[0, :2] = True
    assert psnr(result, truth, mask) == pytest.approx(each[0])
    result[0, 2:] = 0
    assert psnr(result, truth, mask) == pytest.approx(each[0])


def test_ssim_equals_the_public_implementation():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a = noise(0)
    b = np.clip(a + np.random.default_rng(1).normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    theirs = [
        metrics.structural_similarity(
            x, y, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=255, full=True,
        )[1][5:-5, 5:-5].mean()
        for x, y in zip(a, b)
    ]  # fmt: skip
    assert ssim(a, b) == pytest.approx(np.mean(theirs), abs=1e-6)


def test_ssim_is_one_for_equal_frames_and_near_zero_for_unrelated_ones():
    assert ssim(noise(0), noise(0)) == pytest.approx(1)
    assert abs(ssim(noise(0), noise(1))) < 0.1


def test_frames_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="cannot compare"):
        psnr(noise(0, 1), noise(0, 2))
    with pytest.raises(ValueError, match="cannot compare"):
        ssim(noise(0, 1), noise(0, 2))


def test_l1_is_the_mean_difference_and_does_not_wrap_around():
    darker, brighter = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 51, np.uint8)
    np.testing.assert_allclose(frame_l1(darker, brighter), [0.2, 0.2])
    np.testing.assert_allclose(frame_l1(brighter, darker), [0.2, 0.2])


def test_psnr_of_a_frame_without_masked_pixels_is_no_number():
    mask = np.zeros((2, 24, 32), bool)
    mask[1] = True
    first, second = frame_psnr(noise(0), noise(1), mask)
    assert np.isnan(first) and second == frame_psnr(noise(0), noise(1))[1]


# ---- Poses --------------------------------------------------------------------------------------


def body(*points: tuple[float, float, float]) -> Pose:
    part = np.zeros((18, 3), np.float32)
    part[: len(points)] = points
    return Pose(body=part)


def test_pck_counts_keypoints_near_enough_and_the_error_is_in_units_of_the_box():
    asked = body((0.25, 0.25, 1), (0.75, 0.25, 1), (0.5, 0.5, 1), (0.5, 0.25, 1))
    # on 200x100 pixels the box is 100 wide: 5 pixels are within a tenth of it, 20 are not
    found = body((0.25, 0.3, 0.9), (0.65, 0.25, 0.9), (0, 0, 0), (0.5, 0.25, INTERPOLATED))
    pck, error = pose_fidelity([found], [asked], height=100, width=200)
    assert pck == pytest.approx(1 / 4)  # the third was not found, the fourth only guessed
    assert error == pytest.approx((5 + 20) / 2 / 100, rel=1e-5)


def test_a_perfect_pose_has_pck_1_and_an_empty_one_no_error_to_tell():
    asked = body((0.2, 0.2, 1), (0.8, 0.9, 1))
    assert pose_fidelity([asked], [asked], 64, 64) == (1, 0)
    pck, error = pose_fidelity([Pose()], [asked], 64, 64)
    assert pck == 0 and np.isnan(error)
    assert np.isnan(pose_fidelity([asked], [Pose()], 64, 64)).all()


# ---- Flicker ------------------------------------------------------------------------------------


def test_an_error_that_stays_is_no_flicker_and_one_that_comes_and_goes_is():
    truth = noise(0, 4) // 2
    assert np.all(frame_flicker(truth + np.uint8(20), truth) == 0)
    blinking = truth + np.uint8([0, 51, 0, 51]).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(frame_flicker(blinking, truth), 0.2)


@pytest.fixture(scope="module")
def puppet() -> tuple[np.ndarray, list[Pose]]:
    frames, poses, _ = clip(identity_seed=1, motion_seed=2, frames=5, size=96)
    return frames, poses


@pytest.mark.parametrize("kind", ["noise", "brightness"])
def test_the_more_a_clip_flickers_the_larger_both_figures_are(puppet, kind):
    frames, poses = puppet
    random = np.random.default_rng(0)
    unit = (
        random.normal(size=frames.shape) if kind == "noise" else (-1.0) ** np.arange(5)[:, None, None, None]
    )
    clips = [(frames + strength * unit).clip(0, 255).astype(np.uint8) for strength in (0, 3, 8, 20)]
    for values in (
        [frame_flicker(c, frames).mean() for c in clips],
        [frame_warp_error(c, poses).mean() for c in clips],
    ):
        assert np.all(np.diff(values) > 0.004), values


def test_a_still_clip_has_no_warp_error_and_a_person_who_moves_as_the_poses_say_hardly_any(puppet):
    frames, poses = puppet
    still = np.repeat(frames[:1], 3, axis=0)
    assert np.all(frame_warp_error(still, poses[:1] * 3) == 0)
    moving, frozen = frame_warp_error(frames, poses), frame_warp_error(np.repeat(frames[:1], 5, 0), poses)
    assert moving.mean() < 0.02 < frozen.mean() / 2
    assert np.isnan(frame_warp_error(frames, [poses[0], Pose(), *poses[2:]])).tolist() == [1, 1, 0, 0]


# ---- Pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[20.0], [20.0, 20.0], [18.0, 30.0, 25.0]])
def test_a_plot_is_drawn_of_any_number_of_frames(values):
    picture = plot({"PSNR": np.array(values), "SSIM": np.array(values)}, width=300, panel=100)
    assert picture.size == (300, 200)


def test_the_worst_frames_come_first():
    truth = np.zeros((3, 20, 20, 3), np.uint8)
    result = np.stack([np.full((20, 20, 3), level, np.uint8) for level in (50, 250, 150)])
    quality = frame_psnr(result, truth)
    strip = np.asarray(worst_frames(result, truth, quality, count=2, height=20)).astype(int)
    levels = strip[-18, ::1, 0]  # a line through the results
    shown = [level for level in (50, 150, 250) if (np.abs(levels - level) < 3).sum() > 10]
    assert shown == [150, 250]
    assert np.abs(levels - 250).argmin() < np.abs(levels - 150).argmin()


# ---- The command line ---------------------------------------------------------------------------

SIZE = 48


@pytest.fixture
def work(tmp_path) -> Path:
    """A puppet's clip of 8 frames, a result that shows frames 2 to 6 of it a little darker, training
    frames and poses."""
    frames, poses, _ = clip(identity_seed=1, motion_seed=2, frames=8, size=SIZE)
    for name, shown in (("truth", frames), ("result", frames[2:7] // 8 * 7), ("frames", frames[:2])):
        (tmp_path / name).mkdir()
        for i, frame in enumerate(shown):
            save_image(tmp_path / name / f"{i}.png", frame)
    save_poses(tmp_path / "poses.json", poses, SIZE, SIZE)
    save_poses(tmp_path / "frames.poses.json", poses[:2], SIZE, SIZE)
    return tmp_path


def run(work: Path, *options: object) -> dict[str, float]:
    command = [work / "result", *options]
    return evaluate.main(evaluate.parse_arguments([str(word) for word in command]))


def measurements(work: Path) -> list[dict]:
    return json.loads((work / "result.metrics.json").read_text())["measurements"]


def test_all_that_needs_no_network_is_measured_and_the_rest_named(work, capsys):
    options = ["--truth", work / "truth", "--poses", work / "poses.json", "--range", "2:7"]
    figures = run(work, *options, "--train", work / "frames")
    assert list(figures) == ["l1", "psnr", "ssim", "flicker", "warp_error", "video_sim"]
    (report,) = measurements(work)
    assert report["metrics"] == figures
    assert report["metrics"].keys() | report["left_out"].keys() == METRICS.keys()
    assert np.mean(report["by_frame"]["psnr"]) == pytest.approx(figures["psnr"])
    assert len(report["by_frame"]["psnr"]) == 5 and len(report["by_frame"]["flicker"]) == 4
    assert report["pictures"] == ["result.metrics.1.png", "result.worst.1.png"]
    assert all((work / name).exists() for name in report["pictures"])
    printed = capsys.readouterr().out
    for name, (title, *_, needs) in METRICS.items():
        (line,) = [line for line in printed.splitlines() if line.strip().startswith(f"{title}  ")]
        assert ("needs " + needs in line) == (name not in figures)


def test_the_poses_that_sampling_wrote_are_of_the_result_s_frames_alone(work):
    poses = load_poses(work / "poses.json")
    save_poses(work / "result.poses.json", poses[2:7], SIZE, SIZE)
    options = ["--range", "2:7", "--train", work / "frames"]
    asked = run(work, "--poses", work / "poses.json", *options)
    assert run(work, "--poses", work / "result.poses.json", *options) == asked
    (work / "elsewhere").mkdir()
    save_poses(work / "elsewhere" / "result.poses.json", poses, SIZE, SIZE)
    assert run(work, "--poses", work / "elsewhere" / "result.poses.json", *options) == asked


def test_without_a_truth_the_rest_is_still_measured(work):
    options = ["--poses", work / "poses.json", "--range", "2:7", "--train", work / "frames"]
    figures = run(work, *options)
    _, poses, _ = clip(identity_seed=1, motion_seed=2, frames=8, size=SIZE)
    assert figures["video_sim"] == pytest.approx(video_sim(poses[2:7], poses[:2]), rel=1e-3)
    assert not list(work.glob("*.png")) and not measurements(work)[0]["pictures"]


def test_other_inputs_are_measured_beside_the_earlier_and_the_same_again_replace_their_own(work):
    truth, poses = ("--truth", work / "truth"), ("--poses", work / "poses.json", "--range", "2:7")
    first = run(work, *truth, "--range", "2:7")
    run(work, *truth, "--range", "1:6")
    run(work, *poses)
    before = measurements(work)
    assert [each["inputs"].get("range") for each in before] == ["2:7", "1:6", "2:7"]
    assert [bool(each["pictures"]) for each in before] == [True, True, False]
    assert before[0]["metrics"] == first != before[1]["metrics"]
    save_image(work / "truth" / "2.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    again = run(work, *truth, "--range", "2:7")
    assert [each["metrics"] for each in measurements(work)] == [again, *(e["metrics"] for e in before[1:])]
    assert again["psnr"] < first["psnr"]
    assert (work / "result.worst.2.png").exists()


def test_figures_of_another_result_under_the_same_name_are_dropped(work):
    for of in ("2:7", "1:6"):
        run(work, "--truth", work / "truth", "--range", of)
    save_image(work / "result" / "0.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    run(work, "--truth", work / "truth", "--range", "3:8")
    assert [each["inputs"]["range"] for each in measurements(work)] == ["3:8"]
    assert {path.name for path in work.glob("*.png")} == {"result.metrics.1.png", "result.worst.1.png"}


@pytest.mark.parametrize("content", ["{}", "[]", '{"measurements": [1]}', "{", '{"metrics": {"psnr": 20}}'])
def test_a_file_of_somebody_else_s_is_not_replaced(work, content):
    (work / "result.metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"result\.metrics\.json: (holds no measurements|not readable)"):
        run(work, "--truth", work / "truth", "--range", "2:7")
    assert (work / "result.metrics.json").read_text() == content


def test_with_nothing_to_measure_it_says_what_to_give_and_writes_nothing(work, capsys):
    for options in ([], ["--train", work / "frames"]):
        with pytest.raises(ValueError, match="result: nothing was measured; give --truth, --poses"):
            run(work, *options)
        assert capsys.readouterr().out.count("left out") == len(METRICS)
    assert not list(work.glob("result.*"))


def test_full_leaves_out_what_has_no_file_and_says_why(work, monkeypatch):
    encoder = ImageEncoder(ImageConfig(28, 7, width=16, heads=2, layers=1, mlp_width=32, embedding=8))

    def load_network(kind, folder, device):
        if kind is ImageEncoder:
            return encoder.requires_grad_(False).to(device)
        raise OSError(f"{kind.__name__} is not here")

    monkeypatch.setattr(evaluate, "load_network", load_network)
    options = ["--truth", work / "truth", "--range", "2:7", "--train", work / "frames"]
    figures = run(work, *options, "--full")
    assert {"clip_i", "clip_t"} < figures.keys() and -1 <= figures["clip_i"] <= 1
    left_out = measurements(work)[0]["left_out"]
    assert left_out["lpips"] == "LPIPS is not here" and left_out["fid"] == "Inception is not here"
    assert left_out["fvd"] == "needs 20 frames or more, there are 5"


def test_poses_found_in_the_result_are_compared_with_those_asked_for(work, monkeypatch):
    _, poses, _ = clip(identity_seed=1, motion_seed=2, frames=8, size=SIZE)
    shifted = [place_pose(pose, 1, 1, 0.01, 0) for pose in poses[2:7]]
    monkeypatch.setattr(evaluate, "load_openpose", lambda *_: None)
    monkeypatch.setattr(evaluate, "network_figures", lambda *_: ({}, {}))
    monkeypatch.setattr("metrics.figures.find_poses", lambda *_, **__: shifted)
    options = ["--poses", work / "poses.json", "--range", "2:7", "--full"]
    figures = run(work, *options)
    assert figures["pck"] == 1 and 0.005 < figures["pose_error"] < 0.05

    def nobody(*_, **__):
        raise ValueError("no person")

    monkeypatch.setattr("metrics.figures.find_poses", nobody)
    figures = run(work, *options)
    assert figures["pck"] == 0 and "pose_error" not in figures


def test_the_truth_is_fitted_to_the_result_on_request(work):
    large, _, _ = clip(identity_seed=1, motion_seed=2, frames=8, size=2 * SIZE)
    for i, frame in enumerate(large):
        save_image(work / "truth" / f"{i}.png", frame)
    options = ["--truth", work / "truth", "--range", "2:7"]
    with pytest.raises(ValueError, match=r"96x96 pixels, but .* has 48x48; --fit"):
        run(work, *options)
    assert run(work, *options, "--fit")["psnr"] > 15


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--truth", "truth"], "8 frames, but .* has 5 frames; say with --range"),
        (["--truth", "truth", "--range", "5:10"], "has 8 frames .*, so no frame 8"),
        (["--poses", "poses.json"], "8 poses, but .* has 5 frames; say with --range"),
        (["--poses", "poses.json", "--range", "5:10"], "has 8 frames, so no frames 5:10"),
        (["--truth", "nowhere"], "no such video, image or folder"),
        (["--weights", "nowhere"], "no such folder, given as --weights"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(work, options, reason):
    options = [word if word.startswith("-") or ":" in word else work / word for word in options]
    with pytest.raises((OSError, ValueError), match=reason) as refused:
        run(work, *options)
    assert "\n" not in str(refused.value)
    assert not (work / "result.metrics.json").exists()


def test_a_missing_result_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, Path(evaluate.__file__), tmp_path / "nothing.mp4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("evaluate.py: ") and done.stderr.count("\n") == 1
