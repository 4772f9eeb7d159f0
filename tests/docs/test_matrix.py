"""The lists of tested architectures in the documentation are those of the matrix."""

from __future__ import annotations

import pytest

from testing.matrix import PAGES, written
from testing.releases import since


@since("transformers", "5.24", "it does not know all rows of the matrix")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_lists_are_those_of_the_matrix(page):
    text = page.read_text("utf-8")
    assert text == written(text, PAGES[page]), "run make matrix"
