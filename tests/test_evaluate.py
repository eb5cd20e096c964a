import numpy as np
import pytest

from evaluate import psnr, ssim


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
