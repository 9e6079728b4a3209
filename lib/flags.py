"""Types of command-line flags: what a flag accepts, and the one message where it was given something else."""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def _number(kind: type, fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # fits nothing
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
        return value
    return parse


count = _number(int, lambda n: n > 0, "a whole number of at least 1")
natural = _number(int, lambda n: n >= 0, "a whole number of at least 0")
label = _number(int, lambda n: 0 <= n <= 255, "a whole number from 0 to 255")
amount = _number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
positive = _number(float, lambda x: 0 < x < math.inf, "a number above 0")
share = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
below_one = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def scales(text: str) -> tuple[float, ...]:
    """Numbers above 0, separated by commas. Raises argparse.ArgumentTypeError."""
    try:
        return tuple(map(positive, text.split(",")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected numbers above 0 such as 0.9,1.0,1.2, not {text!r}") from None


def size(text: str) -> tuple[int, int]:
    """Two whole numbers above 0. Raises argparse.ArgumentTypeError."""
    first, _, second = text.partition(",")
    if not (first.isdigit() and second.isdigit() and int(first) and int(second)):
        raise argparse.ArgumentTypeError(f"expected two whole numbers above 0 such as 1024,512, not {text!r}")
    return int(first), int(second)
