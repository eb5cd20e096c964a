"""Clips of any length in bounded memory: a layer takes a few frames, or a few locations, at a time.

Every layer of the networks sees each frame by itself (convolutions), or each location by itself (temporal
attention, and all else in a transformer block once the key frame has been read), or needs two numbers per
channel of the whole clip (the clip-wide norms). So a clip's feature map can stay one buffer that layers read and
write slice by slice. The result is that of the whole clip at once, whatever the size of the slices.

This is for inference. Where gradients are recorded, everything below takes one slice: the whole clip.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slicing:
    """How large a slice is, and whether the UNet's skips wait outside the device's memory."""

    # in a slice of a layer's input; a frame of SD 1.5's finest maps has 1.3 million
    numbers: int = 2**21
    offload: bool = False
    share: Any = None  # a `beyond.ranks.Share`, where several processes have some of the frames each


current = Slicing()


@contextmanager
def slices(settings: Slicing) -> Iterator[None]:
    """Within it, slices are as `settings` say."""
    global current
    before, current = current, settings
    try:
        yield
    finally:
        current = before


def plans(
    device: torch.device,
    dtype: torch.dtype,
    finest: tuple[int, int, int, int],
    frames_per_slice: int | None = None,
    offload: str = "auto",
) -> list[Slicing]:
    """Ways to sample a clip, from the fastest to the one that needs the least memory.

    finest: shape (F, C, H, W) of the clip's feature maps at the UNet's finest level. A slice is as many
    numbers as `frames_per_slice` frames of those, so at coarser levels it has more frames.
    frames_per_slice: by default 8 on a CUDA card; elsewhere one, or a few if they are small.
    offload: "always", "never", or "auto": if the clip does not fit otherwise.
    """
    frame = prod(finest[1:])
    if device.type != "cuda":
        # One frame, whose maps stay in a processor's cache; of small ones more, as every call has its price.
        numbers = frame * frames_per_slice if frames_per_slice else max(frame, 2**20)
        return [Slicing(numbers, offload == "always")]
    per_slice = frames_per_slice or 8  # enough to keep a large card busy
    slow = [True] if offload == "always" else [False] if offload == "never" else [False, True]
    ways = [(per_slice, slow[0]), (max(1, per_slice // 8), slow[0]), (max(1, per_slice // 8), slow[-1])]
    if torch.cuda.is_available():  # start with what should fit
        torch.cuda.empty_cache()  # what earlier work left to PyTorch does not count as free
        free = torch.cuda.mem_get_info(device)[0] * 0.9 / (frame * dtype.itemsize)  # in finest maps
        # At most 7 whole maps of that size are in memory at a time (the decoder's first, twice as wide, the
        # result, three skips, the hint), 4 if skips and hint wait outside; and 25 times a slice's input.
        fits = [(4 if away else 7) * finest[0] + 25 * n < free for n, away in ways]
        ways = ways[fits.index(True) if any(fits) else -1 :]
    return [Slicing(frame * n, away) for n, away in dict.fromkeys(ways)]


def frugally(compute: Callable[[], Tensor], ways: list[Slicing]) -> Tensor:
    """`compute()` in the first of the ways that fits in memory; those that do not are struck off the list.

    Raises MemoryError when none does.
    """
    from safe.room import is_out_of_memory

    if ways[0].share:
        ways[0].share.settle(compute, ways)
    while True:
        try:
            with slices(ways[0]):
                return compute()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(ways) == 1:
                raise MemoryError(
                    "out of graphics memory with the smallest slices: give fewer frames (--range), leave "
                    "out --offload never if it was given, or train again with a smaller --size"
                ) from error
        ways.pop(0)  # here the exception is gone, and with it what it held in memory
        finish_fetching()
        torch.cuda.empty_cache()


def spans(length: int, numbers: int) -> Iterator[slice]:
    """Cuts `length` entries of `numbers` numbers each into slices."""
    step = length if torch.is_grad_enabled() else max(1, current.numbers // numbers)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def by_frames(
    layer: Callable, *maps: "Tensor | Offloaded", into: Tensor | None = None, whole: bool = False
) -> Tensor:
    """`layer(*maps)` for a layer to which every frame is an image by itself: maps (N, ...) -> (N, ...).

    into: one of the maps, whose memory may be used for the result.
    whole: take one slice in any case.
    """
    if whole:
        return layer(*(x[slice(0, len(x))] for x in maps))
    length = len(maps[0])
    for frames in spans(length, max(x[:1].numel() for x in maps if isinstance(x, Tensor))):
        part = layer(*(x[frames] for x in maps))
        if len(part) == length:
            return part
        if into is None:
            layout = torch.channels_last if part.ndim == 4 else torch.contiguous_format
            shape = length, *part.shape[1:]
            into = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
        into[frames] = part
    return into


def by_locations(layer: Callable[[Tensor], Tensor], tokens: Tensor, tracks: bool = True) -> Tensor:
    """`layer(tokens)` for a layer to which every location is a track by itself: (B, F, L, C) -> same.

    The tokens' memory may be used for the result. tracks: whether the layer looks along them, from frame to frame.
    """
    if tracks and current.share:
        return current.share.by_locations(layer, tokens)
    length = tokens.shape[2]
    for locations in spans(length, tokens[:, :, 0].numel()):
        part = layer(tokens[:, :, locations])
        if part.shape[2] == length:
            return part
        tokens[:, :, locations] = part
    return tokens


def key_frame(tokens: Tensor) -> Tensor:
    """The clip's first frame, which another process may have: (B, F, L, C) -> (B, L, C)."""
    return current.share.key_frame(tokens) if current.share else tokens[:, 0]


def channel_moments(x: "Tensor | Offloaded") -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over all frames and locations: (N, C, H, W) -> (C,) float32 twice.

    Each slice has a mean and a variance of its own; those of the whole follow without the cancellation
    that sums of squares suffer from (Chan et al., 1979).
    """
    means, variances, shares = [], [], []
    for frames in spans(len(x), x.shape[1:].numel()):
        pixels = x[frames].permute(0, 2, 3, 1).flatten(0, 2).float()  # a view if channels_last
        means.append(pixels.mean(dim=0))
        variances.append((pixels - means[-1]).square_().mean(dim=0))  # var_mean is six times slower
        shares.append((frames.stop - frames.start) / len(x))
    moments = means[0], variances[0]
    if len(shares) > 1:
        # All slices but the last are of one size. Filled, as a list's copy to a card would wait for the card.
        weight = torch.full((len(shares), 1), shares[0], device=means[0].device)
        weight[-1:].fill_(shares[-1])
        moments = merge_moments(torch.stack(means), torch.stack(variances), weight)
    return current.share.moments(*moments) if current.share else moments


def merge_moments(mean: Tensor, variance: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor]:
    """Moments of the union of sets (first axis) whose shares in it are `weight`."""
    whole = (weight * mean).sum(0)
    return whole, (weight * (variance + (mean - whole) ** 2)).sum(0)


# ---- Skips that wait in the host's memory -------------------------------------------------------


def stored(x: Tensor) -> "Tensor | Offloaded":
    """The map itself, or a copy of it in the host's memory where skips are to wait there."""
    return Offloaded(x) if current.offload and not torch.is_grad_enabled() else x


class Offloaded:
    """A feature map in the host's memory. `offloaded[a:b]` brings frames back, and starts on the next ones.

    The host never waits for the card here, unless its memory could not be pinned.
    """

    def __init__(self, x: Tensor, device: torch.device | None = None):
        self.shape, self.device = x.shape, device or x.device
        self.host, self.pinned = host_memory(x)
        self.ahead: tuple[slice, Tensor] | None = None
        # In turn with the computation, so that the memory of `x` is free right after. A copy beside what is
        # computed next would hold one more of the largest maps.
        self.host.copy_(x, non_blocking=self.pinned)

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, frames: slice) -> Tensor:
        if self.ahead is None or self.ahead[0] != frames:
            self.ahead = frames, self._fetch(frames)
        part = self.ahead[1]
        finish_fetching()
        following = slice(frames.stop, min(2 * frames.stop - frames.start, len(self)))
        self.ahead = None
        if following.start < following.stop:
            self.ahead = following, self._fetch(following)
        return part

    def _fetch(self, frames: slice) -> Tensor:
        part = torch.empty_like(self.host[frames], device=self.device)
        start_fetching(part, self.host[frames], self.pinned)
        return part


def host_memory(x: Tensor) -> tuple[Tensor, bool]:
    """Memory on the host for a copy of `x`, and whether it is pinned, as a card wants it to copy by itself."""
    global _can_pin
    if _can_pin and copying():
        try:
            return torch.empty_like(x, device="cpu", pin_memory=True), True
        except RuntimeError:  # systems limit how much can be pinned
            _can_pin = False
            print("no more memory can be pinned: skips wait in ordinary memory, which is slower")
    return torch.empty_like(x, device="cpu"), False


def start_fetching(part: Tensor, source: Tensor, pinned: bool) -> None:
    """`part.copy_(source)`, on a card beside the computation: before that reads it, call `finish_fetching`.

    PyTorch gives memory that nobody holds to the next tensor of the same stream, and knows nothing of copies on
    another one. So a part is held here until the computation was told to wait for its copy. Then its memory can
    be used again in the computation's order, however far the host runs ahead. (After `record_stream` it could be
    used only once the host sees the part's work done, so a host far ahead would pile up parts.)
    """
    global _in_flight
    if (stream := copying()) is None:
        part.copy_(source)
        return
    finish_fetching()
    stream.wait_stream(torch.cuda.current_stream())  # which may still read what was in this memory
    with torch.cuda.stream(stream):
        part.copy_(source, non_blocking=pinned)
    _in_flight = part, stream.record_event()


def finish_fetching() -> None:
    """Makes what is computed from now on wait for the part on its way, if there is one."""
    global _in_flight
    if _in_flight:
        torch.cuda.current_stream().wait_event(_in_flight[1])
    _in_flight = None


def copying() -> torch.cuda.Stream | None:
    """The stream that parts are fetched on; None where there is no graphics card."""
    global _copying
    if _copying is None and torch.cuda.is_available():
        _copying = torch.cuda.Stream()
    return _copying


_can_pin = True
_in_flight: tuple[Tensor, torch.cuda.Event] | None = None
_copying: torch.cuda.Stream | None = None
