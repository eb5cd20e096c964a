"""On a GPU the networks, sampling and training give what they give on the CPU. Skipped where there is no GPU."""

import pytest
import torch

from bench.equal import CHECKS, difference

# float32 without TF32: sums are in another order, which over these networks and 4 + 4 steps adds up to some 1e-6
# between two ways to slice on the CPU. Forgotten layers or frames make 1e-2 and more.
# float16: its digits end at 1e-3, and on the CPU it comes to .002 for a prediction, and .008 for samples and
# gradients.
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2}

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is false"
)


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("check", CHECKS)
def test_a_gpu_gives_what_the_cpu_gives_in_float32(check, dtype):
    assert difference(check, torch.device("cuda", 0), dtype) < ALLOWED[dtype]
