"""Scaled dot-product attention: torch's, or ours where torch's is slow, which is bfloat16 on some CPUs."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Where a CPU multiplies matrices in units of their own (Intel's AMX), torch's attention is faster than ours.
HAS_AMX = torch.cpu.get_capabilities().get("amx_bf16", False)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention: (B, heads, L, d) and (B, heads, S, d) twice -> (B, heads, L, d)."""
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    if on_cpu and not HAS_AMX and k.shape[-2] >= 64:
        return attend_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, scores_at_once: int = 2**20) -> Tensor:
    """The same for bfloat16 on a CPU, where torch's kernel is held up by its exponentials; as exact as that.

    A few heads, or a few of a head's queries, at a time, so that their scores stay in the caches. Scores and
    weights are float32, multiplied in bfloat16 with float32 sums. Queries and keys have no more digits than that;
    scaled keys would, so scores are scaled. Exponentials are of two, faster than of e. A column of ones beside the
    values sums up the weights.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    q, k, v, result = (x.flatten(0, 1) for x in (q, k, v, out))  # (B * heads, L or S, d)
    (_, queries, dim), keys = q.shape, k.shape[1]
    scale = dim**-0.5 * math.log2(math.e)
    heads_at_once = max(1, scores_at_once // (queries * keys))
    queries_at_once = max(1, scores_at_once // keys)
    nothing = torch.zeros(1)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        for first in range(0, len(q), heads_at_once):
            heads = slice(first, first + heads_at_once)
            ask, keyed, values = q[heads].float(), k[heads].float(), v[heads].float()
            # No score exceeds the norms' product; small ones need no shift to keep 2**score in range.
            shifted = scale * ask.norm(dim=-1).max() * keyed.norm(dim=-1).max() > 100
            keyed, values = keyed.transpose(1, 2).contiguous(), F.pad(values, (0, 1), value=1.0)
            for start in range(0, queries, queries_at_once):
                block = slice(start, start + queries_at_once)
                scores = torch.baddbmm(nothing, ask[:, block], keyed, beta=0, alpha=scale)
                if shifted:
                    scores -= scores.amax(dim=-1, keepdim=True)
                sums = scores.exp2_() @ values
                result[heads, block] = sums[..., :dim] / sums[..., dim:]
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    return out
