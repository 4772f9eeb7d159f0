"""Where layers of several organs stand in one stack."""

from __future__ import annotations

import pytest

from not_hf import (
    IncompatibleDonorError,
)
from not_hf.composition.layout import Place, arrange


def test_the_placing_rule_names_both_organs():
    a, b = Place("a", 1, "replace", 2), Place("b", 2, "insert", 1)
    assert arrange(4, [a]) == [(None, 0), ("a", 0), ("a", 1), (None, 3)]
    for places in ([a, b], [b, a]):
        with pytest.raises(IncompatibleDonorError, match="organ 'b' is inside a span that organ 'a' replaces"):
            arrange(4, places)
