"""The rows of a privacy probe: those that were trained on, and others of their kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from not_hf.errors import NotHFError
from not_hf.evaluation.held_out_text import spread, tokenized

_FEWEST = {"members": 20, "non_members": 100}
_WHY = {"members": "", "non_members": ", since 1 % of them may be false positives"}


@dataclass(frozen=True)
class ProbedRows:
    """Token ids of distinct rows of at least two tokens.

    Args:
        members: Rows that were trained on.
        non_members: Rows that were not.
        num_shared: Distinct rows that were given as both, and count as members.
    """

    members: list[list[int]]
    non_members: list[list[int]]
    num_shared: int

    @classmethod
    def of(
        cls,
        members: Iterable[Any],
        non_members: Iterable[Any],
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        num_rows: int,
    ) -> ProbedRows:
        """Tokenize rows, leave out repeated ones, and keep as many as are wanted, evenly spread.

        Raises:
            NotHFError: There are too few, or they are of another kind.
        """
        own, others = _distinct(members, "members", tokenizer), _distinct(non_members, "non_members", tokenizer)
        shared = own.keys() & others.keys()
        sides = {"members": [*own], "non_members": [row for row in others if row not in shared]}
        for name, rows in sides.items():
            if min(len(rows), num_rows) < (fewest := _FEWEST[name]):
                also = f"; {len(shared)} more are among the members" if shared and name == "non_members" else ""
                raise NotHFError(
                    f"{name} has {len(rows)} different rows of at least 2 tokens{also}; give at least {fewest}"
                    f"{_WHY[name]}" + (f", and a num_rows of {fewest}" if num_rows < fewest else "")
                )
        own_rows, other_rows = ([list(row) for row in spread(rows, num_rows)] for rows in sides.values())
        return cls(own_rows, other_rows, len(shared))

    def first(self, length: int) -> ProbedRows:
        """Cut each row to its first tokens."""
        own, others = ([row[:length] for row in rows] for rows in (self.members, self.non_members))
        return ProbedRows(own, others, self.num_shared)


def _distinct(
    given: Iterable[Any], name: str, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> dict[tuple[int, ...], None]:
    """Return the token ids of rows that are long enough, each once."""
    rows = [] if isinstance(given, str) else list(given)
    if rows and all(isinstance(row, str) for row in rows):
        ids = tokenized(rows, tokenizer())
    elif rows and all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        ids = [[int(token) for token in row["input_ids"]] for row in rows]
    else:
        raise NotHFError(f"{name} must be texts, or rows with input_ids; give dataset['text'], or use not_hf.pack")
    return dict.fromkeys(tuple(each) for each in ids if len(each) > 1)
