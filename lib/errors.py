"""The one exception for mistakes a user can mend; the scripts print its message and leave with exit code 2."""
from collections.abc import Collection, Iterable

MAX_LISTED = 10  # items of one kind in a message


class UserError(Exception):
    """Says what is wrong, where, and what to do."""


def listed(items: Collection) -> str:
    """The first items for a message, separated by commas: "7, 9, ..."."""
    return ", ".join(_first(items)) + (", ..." if len(items) > MAX_LISTED else "")


def itemized(items: Collection) -> str:
    """The first items for a message, each on an indented line, and how many more there are."""
    lines = list(_first(items))
    if len(items) > MAX_LISTED:
        lines.append(f"... and {len(items) - MAX_LISTED} more")
    return "\n".join(f"  {line}" for line in lines)


def _first(items: Collection) -> Iterable[str]:
    return (shorten(item) for item, _ in zip(items, range(MAX_LISTED), strict=False))


def shorten(value: object, length: int = 500) -> str:
    """A value from a user's file for a message, cut where it is longer than a message should be."""
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    return text if len(text) <= length else f"{text[:length]}..."
