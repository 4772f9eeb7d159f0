"""The tables that the documentation quotes from benchmarks are those of the results files."""

from __future__ import annotations

import importlib

import pytest

from testing import ROOT


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("tables")


def test_the_tables_are_those_of_the_results(tables):
    for path, parts in tables.PAGES.items():
        text = path.read_text("utf-8")
        assert all(f"<!-- {name} -->" in text for name in parts)
        assert text == tables.written(text, parts), "run make bench-tables"
