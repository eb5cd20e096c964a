"""How close a result is to the truth: PSNR and SSIM of frames."""

import numpy as np
import torch
import torch.nn.functional as F


def psnr(result: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of frames uint8 (F, H, W, 3), per frame, then averaged.

    `mask`, booleans (F, H, W), limits it to some pixels; frames where it is empty do not count.
    Equal frames are given 100 dB. Raises ValueError for shapes that differ.
    """
    if result.shape != truth.shape:
        raise ValueError(f"cannot compare frames {result.shape} with {truth.shape}")
    # As floats: a difference of uint8 wraps around, and 1 - 2 would count as 255.
    error = ((result.astype(np.float64) - truth) ** 2).mean(axis=-1)  # (F, H, W)
    if mask is None:
        mask = np.ones(error.shape, bool)
    errors = [e[m].mean() for e, m in zip(error, mask) if m.any()]
    return float(np.mean([-10 * np.log10(max(e, 1e-10 * 255**2) / 255**2) for e in errors]))


def ssim(result: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of frames uint8 (F, H, W, 3), up to 1 for equal frames.

    Wang et al. 2004: a Gaussian window of 11x11 with deviation 1.5, on each colour channel in the
    range [0, 1], where the window fits; averaged over channels, pixels and frames. Raises
    ValueError for shapes that differ or frames below 11 pixels.
    """
    if result.shape != truth.shape:
        raise ValueError(f"cannot compare frames {result.shape} with {truth.shape}")
    if min(truth.shape[1:3]) < 11:
        raise ValueError(f"frames of {truth.shape[2]}x{truth.shape[1]} pixels are below SSIM's 11x11")
    bell = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, window)

    values = []
    for a, b in zip(result, truth):  # channels as a batch: (3, 1, H, W)
        a, b = (torch.tensor(x).permute(2, 0, 1)[:, None].double() / 255 for x in (a, b))
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        values.append((similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item())
    return float(np.mean(values))
