"""Tell prose with hard line breaks from text whose every line stands on its own."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise


def wrapped_at(lines: Iterable[str]) -> int | None:
    """Return the width at which lines look wrapped; `None` if each seems to stand on its own.

    Wrapped lines are about equally long, so that the first word of the next one would have had no room, and few of
    them end a sentence. Lines before an empty one say nothing.

    Args:
        lines: The beginning of a text, empty lines included.
    """
    pairs = [(line.rstrip(), then.split()[0]) for line, then in pairwise(lines) if line.strip() and then.strip()]
    if len(pairs) < 8:
        return None
    lengths = sorted(len(line) for line, _ in pairs)
    width = lengths[int(0.98 * (len(pairs) - 1))]  # a line that could not be broken may be longer
    full = sum(len(line) + 1 + len(word) > 0.85 * width for line, word in pairs)
    ended = sum(line.endswith((".", "!", "?", ":", ";")) for line, _ in pairs)
    is_wrapped = 40 <= width <= 120 and full >= 0.75 * len(pairs) and ended <= 0.4 * len(pairs)
    return width if is_wrapped else None
