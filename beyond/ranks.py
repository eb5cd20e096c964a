"""Several processes share the frames of a clip, a GPU each: `torchrun --nproc-per-node 4 -- sample.py ...`.

Every process does by itself what is cheap: it reads run and poses, inverts the reference, and edits and moves the
latents of the whole clip. It predicts noise and decodes frames for its share alone. The first one also looks for
poses, prints and writes.

Three things in the networks look across frames (see `unet.py`), and here the processes exchange

- the two moments of each channel, which merge as those of slices do;
- the key frame's tokens, which the first process has;
- the tokens that temporal attention reads: each process swaps its frames for all frames of some locations, and
  after the transformer block the other way round.

So the result is that of one process, up to the rounding of sums in another order.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from posecrafter import decode_latents
from safe.room import is_out_of_memory
from slicing import Slicing, finish_fetching, merge_moments, slices, spans

STARTING = timedelta(minutes=2)  # until all processes have found each other
POSES = timedelta(days=7)  # while the first one looks for poses
EXCHANGE = timedelta(minutes=10)  # until all have come to the same point

# ---- Sampling -----------------------------------------------------------------------------------


def evenly(length: int, parts: int) -> list[int]:
    """How many entries each part gets, the first ones one more where they do not divide: 5 in 3 -> [2, 2, 1]."""
    return [length // parts + (i < length % parts) for i in range(parts)]


@dataclass(frozen=True)
class Share:
    """A process's share of a clip of F frames. All processes call the same methods in the same order.

    Shapes below write f for this process's frames, `counts[rank]`, in the clip's order.
    """

    counts: tuple[int, ...]  # frames of each process, at least one
    rank: int  # which process this is; 0 has frame 0, the key frame

    @property
    def frames(self) -> slice:
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])

    def own(self, latents: Tensor) -> Tensor:
        """The clip (F, ...), which becomes the first process's -> this process's frames (f, ...)."""
        sent = latents.contiguous()
        exchange(dist.broadcast, sent, 0)
        return latents.copy_(sent)[self.frames]

    def whole(self, own: Tensor) -> Tensor:
        """(f, ...) of every process -> (F, ...)."""
        padded = own.new_zeros(max(self.counts), *own.shape[1:])
        padded[: len(own)] = own
        return torch.cat([part[:count] for part, count in zip(self.everybody_s(padded), self.counts)])

    def key_frame(self, tokens: Tensor) -> Tensor:
        """(1, f, L, C) -> frame 0 (1, L, C), in memory of its own."""
        first = tokens[:, 0].clone(memory_format=torch.contiguous_format)
        exchange(dist.broadcast, first, 0)
        return first

    def moments(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of every channel, (C,) twice, of this process's frames -> the same of the clip's."""
        weight = torch.full_like(mean, self.counts[self.rank] / sum(self.counts))
        return merge_moments(*self.everybody_s(torch.stack([mean, variance, weight])).unbind(1))

    def everybody_s(self, x: Tensor) -> Tensor:
        """What each process has, of one shape: (...) -> (processes, ...)."""
        gathered = [torch.zeros_like(x) for _ in self.counts]
        exchange(dist.all_gather, gathered, x)
        return torch.stack(gathered)

    def by_locations(self, layer: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """`layer(tokens)` (1, f, L, C) for a layer to which every location over all F frames is a track by itself.

        In slices, as `slicing.by_locations`. All processes need equally many, so the largest share decides.
        """
        (own, length, channels), ranks = tokens.shape[1:], len(self.counts)
        for groups in spans(-(-length // ranks), ranks * max(self.counts) * channels):
            here = tokens[0, :, groups.start * ranks : groups.stop * ranks]  # (f, l, C)
            widths = evenly(here.shape[1], ranks)  # locations that each process gets
            width = widths[self.rank]
            away = [own * each * channels for each in widths]  # numbers, as below
            to_us = [count * width * channels for count in self.counts]
            parts = [part.flatten() for part in here.split(widths, dim=1)]
            tracks = swap(torch.cat(parts), away, to_us).view(1, sum(self.counts), width, channels)
            if width:
                tracks = layer(tracks)
            returned = swap(tracks.flatten(), to_us, away).split(away)
            for part, numbers in zip(here.split(widths, dim=1), returned):
                part.copy_(numbers.view(part.shape))
        return tokens

    def settle(self, compute: Callable[[], Tensor], ways: list[Slicing]) -> None:
        """Leaves the first of the ways that fits in every process's memory, or the last one, and no other.

        A process that ran out of memory within a step would leave the others waiting for it. So the step is
        rehearsed before, alone; what it gives is thrown away.
        """
        del ways[: len(ways) - least(len(ways))]  # the processes may begin with different ones
        while len(ways) > 1:
            if least(fits(compute, ways[0])):
                del ways[1:]
            else:
                del ways[0]


def swap(numbers: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Sends each process so many of the numbers (n,), one after another; returns what they send, likewise."""
    result = numbers.new_zeros(sum(received))
    exchange(dist.all_to_all_single, result, numbers, received, sent)
    return result


def least(number: int) -> int:
    """The smallest of every process's numbers."""
    numbers = torch.tensor(int(number))
    exchange(dist.all_reduce, numbers, dist.ReduceOp.MIN)
    return int(numbers)


def fits(compute: Callable[[], Tensor], way: Slicing) -> bool:
    """Whether this process has memory enough for a way to compute, tried without the other processes."""
    global _rehearsing
    _rehearsing = True
    try:
        with slices(way):
            compute()
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    finally:
        _rehearsing = False
    finish_fetching()
    torch.cuda.empty_cache()
    return False


def exchange(operation: Callable, *arguments) -> None:
    """One of `torch.distributed`'s operations; none in a rehearsal. Raises ConnectionError if others are gone."""
    if _rehearsing:
        return
    try:
        operation(*arguments)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ConnectionError("another of the processes ended or hangs; nothing was written") from error


# ---- The command line ---------------------------------------------------------------------------


def in_ranks(main: Callable[[argparse.Namespace], object]) -> Callable[[argparse.Namespace], object]:
    """`main`, which all processes of a torchrun do together; without torchrun itself."""
    return partial(take_part, main) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else main


def take_part(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """`main(args)` in one of several processes. Only the first is heard; of errors, only what is told first."""
    global _store
    first, words, silence = os.environ["RANK"] == "0", sys.stderr, open(os.devnull, "w")
    if not first:
        sys.stdout = sys.stderr = silence
        for each in (signal.SIGINT, signal.SIGTERM):  # end it at once, even while it waits for others
            signal.signal(each, signal.SIG_DFL)
    try:
        _store = meet()
        choose_card(args)
        if first or begun():
            main(args)
    except SystemExit:
        pass  # of `decode`, where the first process has the rest to do
    except BaseException:
        told_already = _store and _store.add("told", 1) > 1
        sys.stderr = silence if told_already else words
        raise
    finally:
        if first and _store:
            _store.set("begun", "over")
    if dist.is_initialized():
        dist.destroy_process_group()


def meet() -> dist.Store:
    """Finds the other processes; returns where they leave each other notes. Raises OSError if they do not come."""
    try:
        store, rank, ranks = next(rendezvous("env://", timeout=STARTING))
        # Tensors of the host are sent by gloo, those on cards by nccl.
        dist.init_process_group(store=store, rank=rank, world_size=ranks, timeout=EXCHANGE)
    except RuntimeError as error:
        raise OSError(f"the processes did not find each other within {STARTING}: {error}") from error
    return store


def choose_card(args: argparse.Namespace) -> None:
    """Makes a card of its own what PyTorch means by "cuda", if cards are used. Raises ValueError for too few."""
    if not torch.cuda.is_available() or args.device not in ("auto", "cuda"):
        return
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= (cards := torch.cuda.device_count()):
        raise ValueError(f"this machine has {cards} graphics cards; give --nproc-per-node {cards} at most")
    torch.cuda.set_device(number)


def begun() -> bool:
    """Waits for the first process to share the frames; false where it ends without."""
    _store.wait(["begun"], POSES)
    return _store.get("begun") == b"yes"


def is_first() -> bool:
    """Whether this process looks for poses and writes the result: the first of several, or the only one."""
    return _store is None or dist.get_rank() == 0


def share_frames(frames: int) -> Share | None:
    """This process's share of a clip of so many frames; None where it is the only process.

    The other processes begin when the first one comes here: what it has looked for, checked and tidied up is done
    for them. Raises ValueError for more processes than frames.
    """
    if _store is None:
        return None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if frames < ranks:
        advice = f"give --nproc-per-node {frames} at most"
        raise ValueError(f"{ranks} processes cannot share {frames} frames; {advice}")
    share = Share(tuple(evenly(frames, ranks)), rank)
    if rank == 0:
        _store.set("begun", "yes")
        print(f"{ranks} processes share {frames} frames: {', '.join(map(str, share.counts))}")
    return share


def decode(model, latents: Tensor, share: Share | None) -> Iterator[np.ndarray]:
    """`decode_latents`, each process a part of it. All frames come out of the first; the others end here."""
    if share is None:
        return decode_latents(model, latents)
    counts = evenly(len(latents), len(share.counts))
    own = decode_latents(model, latents.split(counts)[share.rank]) if counts[share.rank] else iter(())
    if share.rank == 0:
        return gather(own, counts)
    for frame in list(own):  # decode all before sending one, which has to wait for the first process
        exchange(dist.send, torch.from_numpy(frame), 0)
    part_together()
    sys.exit()


def gather(own: Iterator[np.ndarray], counts: list[int]) -> Iterator[np.ndarray]:
    """The first process's own frames, uint8 (H, W, 3), then those of the others, which have so many."""
    for frame in own:
        yield frame
    for rank, count in enumerate(counts[1:], start=1):
        for _ in range(count):
            received = torch.empty(frame.shape, dtype=torch.uint8)
            exchange(dist.recv, received, rank)
            yield received.numpy()
    part_together()


def part_together() -> None:
    """Waits until all are here, and only then lets go, as nccl wants it."""
    least(0)
    dist.destroy_process_group()


_store: dist.Store | None = None
_rehearsing = False
