"""The sound of a video that is followed, laid under the one that is made."""

import heapq
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import av

from safe.encoding import opened_for_writing
from safe.files import replacing
from safe.footage import survey

RATE = 48_000  # samples per second


def has_sound(path: str | Path) -> bool:
    """Whether this is a video, or another file, with a sound track."""
    path = str(Path(path).resolve())
    with suppress(av.FFmpegError), av.open(path, metadata_errors="replace") as container:
        return bool(container.streams.audio)
    return False


def add_sound(path: Path, source: Path, start: float, seconds: float) -> None:
    """Lays `seconds` of another video's sound under a silent video, in place, from `start` seconds on.

    `start` counts from the first picture of the source, and from its first sound where it has no pictures; where
    there is no sound yet, or no more, it is silent. Raises OSError when the sound cannot be read, and then leaves
    the video as it was.
    """
    with suppress(OSError, ValueError):  # sound alone
        start += survey(source).start
    with replacing(path) as unfinished:
        try:
            with (
                av.open(str(path.resolve())) as silent,
                av.open(str(source.resolve()), metadata_errors="replace") as sounding,
                opened_for_writing(unfinished) as out,
            ):
                out.metadata.update(silent.metadata)
                pictures = out.add_stream_from_template(silent.streams.video[0])
                sound = out.add_stream("aac", RATE)
                samples = cut_sound(sounding, start, seconds)
                streams = copied(silent, pictures), encoded(samples, sound)
                for packet in heapq.merge(*streams, key=lambda packet: packet.dts * packet.time_base):
                    out.mux(packet)
        except (av.FFmpegError, IndexError, ValueError) as error:  # the last two: headers without sense
            raise OSError(f"{source}: its sound could not be copied ({error})") from None


def copied(container, stream) -> Iterator[av.Packet]:
    for packet in container.demux(video=0):
        if packet.size:
            packet.stream = stream
            yield packet


def encoded(frames: Iterator[av.AudioFrame], stream) -> Iterator[av.Packet]:
    for frame in chain(frames, [None]):  # the last for what the encoder still holds
        yield from (packet for packet in stream.encode(frame) if packet.dts is not None)


def cut_sound(container, start: float, seconds: float) -> Iterator[av.AudioFrame]:
    """The first sound track of a file between two moments of its own time, stereo, with times from 0 on."""
    graph, stream = av.filter.Graph(), container.streams.audio[0]
    filters = [
        ("aformat", f"sample_rates={RATE}:sample_fmts=fltp:channel_layouts=stereo"),
        # Silence where the sound starts late or has gaps; what comes too early is left out.
        ("aresample", f"async=1:min_hard_comp=0.01:first_pts={round(start * RATE)}"),
        ("asetpts", "N/SR/TB"),
        ("apad", f"whole_dur={seconds:.6f}"),
        ("atrim", f"end={seconds:.6f}"),
        ("abuffersink", ""),
    ]
    nodes = [graph.add_abuffer(template=stream), *(graph.add(name, options) for name, options in filters)]
    graph.link_nodes(*nodes).configure()
    with suppress(av.error.EOFError):  # all is there
        for packet in container.demux(stream):
            with suppress(av.error.InvalidDataError):  # damage to a packet
                for frame in packet.decode():
                    graph.push(frame)
            yield from pulled(graph)
        graph.push(None)
        yield from pulled(graph)


def pulled(graph: av.filter.Graph) -> Iterator[av.AudioFrame]:
    with suppress(av.error.BlockingIOError):  # until more is pushed
        while True:
            yield graph.pull()
