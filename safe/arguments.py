"""Types of arguments: what a user typed is checked where it is read."""

import argparse
import errno
import math
import os
import re
import stat
from functools import partial
from pathlib import Path

# Where to compute, best first; "auto" takes the first that is there (`safe.devices.choose_device`).
DEVICES = ("auto", "cuda", "mps", "cpu")
DEVICE = {"choices": DEVICES, "default": "auto", "help": "where to compute (default: the first there)"}


def number(text: str, kind: type, low: float = 0, high: float = math.inf) -> float:
    """ "8" -> 8, an int or a float as `kind` says, above `low` and below `high`."""
    try:
        if low < (value := kind(text)) < high:
            return value
    except ValueError:
        pass
    wanted = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} above {low:,} and below {high:,}")


whole = partial(number, kind=int, high=10_000_000)


def path(text: str) -> Path:
    """A name of a file or folder, which need not exist."""
    wrong = "is no name of a file or folder" if not text or "\0" in text else ""
    if re.match("[a-z]+://", text):
        wrong = "is an address; download the file first"
    if not wrong:
        try:
            mode = os.stat(text).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would be waited for
                wrong = "is neither a file nor a folder"
        except OSError as error:  # most often there is nothing
            if error.errno == errno.ELOOP:
                wrong = "is a symbolic link to itself"
    if wrong:
        raise argparse.ArgumentTypeError(f"{text!r} {wrong}")
    return Path(text)


LONGEST_PROMPT = 2000  # characters: five times what fits, and merging tokens takes the square of it


def prompt(text: str) -> str:
    """A text whose bytes are UTF-8; what a terminal passes on may be others."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no text in UTF-8") from None
    if len(text) > LONGEST_PROMPT:
        told = f"a prompt of {len(text)} characters: at most {LONGEST_PROMPT} are read"
        raise argparse.ArgumentTypeError(told)
    return text


def parse_range(text: str) -> range:
    """ "0:36" -> range(0, 36)."""
    start, _, stop = text.partition(":")
    short = len(text) < 24  # numbers of thousands of digits are not read at all
    if not (short and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range such as 0:36")
    return range(int(start), int(stop))


def parse_canvas(text: str) -> tuple[int, int]:
    """ "1920x1080" -> (1080, 1920), height and width."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and len(side) < 6 and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1920x1080")
    return int(sides[1]), int(sides[0])
