"""Types of arguments: what a user typed is checked where it is read."""

import argparse
import math
from functools import partial


def number(text: str, kind: type, low: float = 0, high: float = math.inf) -> float:
    """ "8" -> 8, an int or a float as `kind` says, above `low` and below `high`."""
    try:
        if low < (value := kind(text)) < high:
            return value
    except ValueError:
        pass
    wanted = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} above {low:g} and below {high:g}")


whole = partial(number, kind=int)


def parse_range(text: str) -> range:
    """ "0:36" -> range(0, 36)."""
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range such as 0:36")
    return range(int(start), int(stop))


def parse_canvas(text: str) -> tuple[int, int]:
    """ "1920x1080" -> (1080, 1920), height and width."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1920x1080")
    return int(sides[1]), int(sides[0])
