"""The lists of tested architectures in the documentation are those of the matrix."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from testing.matrix import PAGES, written

NEWEST = Version(transformers.__version__) >= Version("5.24")  # older releases have fewer architectures


@pytest.mark.skipif(not NEWEST, reason="the matrix has rows that this release of transformers does not know")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_lists_are_those_of_the_matrix(page):
    text = page.read_text("utf-8")
    assert text == written(text, PAGES[page]), "run make matrix"
