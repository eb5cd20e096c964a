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


def test_all_that_needs_no_network_is_measured_and_the_rest_named(work, capsys):
    options = ["--truth", work / "truth", "--poses", work / "poses.json", "--range", "2:7"]
    figures = run(work, *options, "--train", work / "frames")
    assert list(figures) == ["l1", "psnr", "ssim", "video_sim"]
    report = json.loads((work / "result.metrics.json").read_text())
    assert report["metrics"] == figures and report["frames"] == 5
    assert report["metrics"].keys() | report["left_out"].keys() == METRICS.keys()
    assert np.mean(report["by_frame"]["psnr"]) == pytest.approx(figures["psnr"])
    assert (work / "result.metrics.png").exists() and (work / "result.worst.png").exists()
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
    assert not (work / "result.worst.png").exists()


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
    left_out = json.loads((work / "result.metrics.json").read_text())["left_out"]
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
