"""How a command lives and ends: its memory, its signals, and its last words. Nothing here imports torch."""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TextIO


def run_command(
    script: str,
    main: Callable[[argparse.Namespace], object],
    args: argparse.Namespace,
    stopped: str = "stopped",
    out_of_memory: str = "give smaller or fewer frames",
) -> None:
    """`main(args)`; what goes wrong becomes one line, and exit code 2, or 130 for Ctrl-C and SIGTERM."""

    def leave(code: int, why: str) -> None:
        sys.stderr.write(f"{script}: {printable(why)}\n")
        sys.exit(code)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    try:
        with redirect_stdout(Shown(sys.stdout)):
            main(args)
    except (ArithmeticError, MemoryError, OSError, ValueError) as error:
        leave(2, in_words(error) or f"out of memory: {out_of_memory}")
    except KeyboardInterrupt:
        leave(130, stopped)
    except RuntimeError as error:
        from safe.room import is_out_of_memory  # not above: it imports torch, which takes seconds

        if not is_out_of_memory(error):
            raise
        leave(2, f"out of graphics memory: {out_of_memory}")


def before_torch() -> None:
    """What has to be settled before torch is imported, for the whole process."""
    # What MPS lacks is then computed on the CPU. Without MPS it does nothing.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    keep_freed_memory()


def refuse_torchrun(script: str) -> None:
    """Ends each of several processes that torchrun has started; the first one says why."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if os.environ.get("RANK") == "0":
            sys.stderr.write(f"{script}: uses one graphics card; start it with python, not torchrun\n")
        sys.exit(2)


def keep_freed_memory() -> None:
    """Tells glibc, before torch is imported, to keep freed memory for the next buffer.

    Networks ask for buffers hundreds of times a second, and on a CPU mapping them anew costs more than the
    arithmetic: the demo model trains four times as fast with this. Buffers of 32 MB and more are given back (the
    gaps between them would add up), but are mapped in huge pages. Other C libraries are left alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads this when it makes its first tensor
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # malloc.h calls these M_MMAP_THRESHOLD (32 MB is the most), M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX.
    for option, value in {-3: 32 * 2**20, -1: 2**31 - 1, -2: 256 * 2**20, -8: 1}.items():
        mallopt(option, value)


def in_words(error: Exception) -> str:
    """What an error says, without the system's numbers."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing or reading'}: {error.strerror.lower()}"
    return str(error)


def printable(text: str) -> str:
    """A line whose terminal escapes and line breaks, as names and contents of files may have them, are shown."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Shown:
    """A stream on which names of files do no harm: escapes are shown, and so is what it has no letters for."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        shown = "\n".join(map(printable, text.split("\n")))
        return self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))


def stop_in_one_line(script: str) -> None:
    """From now on, and until `run_command`, Ctrl-C and SIGTERM end the process at once, with one line.

    While modules are imported, an exception might be caught or end in pages of traceback.
    """

    def stop(*_: object) -> None:
        os.write(2, f"{script}: stopped\n".encode())
        os._exit(130)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
