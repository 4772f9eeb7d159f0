"""The mutants of a module, made by mutmut's operators."""

from __future__ import annotations

import difflib
import functools
import random
from dataclasses import dataclass
from pathlib import Path

import libcst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import Mutation, MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

_MESSAGES = ("warn", "warning", "warning_once", "info", "debug")  # calls whose arguments are texts for people

_PLACED = (libcst.BaseStatement, libcst.BaseSmallStatement, libcst.BaseExpression)  # have lines of their own


@dataclass(frozen=True)
class Mutant:
    """A module with one expression changed."""

    path: Path
    number: int  # of the mutants of the module
    lines: tuple[int, int]  # first and last line of the statement or clause that is changed
    module: libcst.Module
    mutation: Mutation

    @property
    def name(self) -> str:
        """What the mutant is called in reports."""
        return f"{self.path}:{self.lines[0]}#{self.number}"

    @functools.cached_property
    def source(self) -> str:
        """The text of the changed module."""
        return deep_replace(self.module, self.mutation.original_node, self.mutation.mutated_node).code

    def change(self) -> str:
        """The changed lines, before and after."""
        lines = difflib.unified_diff(self.module.code.splitlines(), self.source.splitlines(), n=0, lineterm="")
        return "  ".join(line[0] + line[1:].strip() for line in list(lines)[3:])


class _Visitor(MutationVisitor):
    """Mutmut's, but functions with decorators count (mutmut leaves out what its trampolines would break)."""

    def _skip_node_and_children(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.FunctionDef):
            return False
        is_message = isinstance(node, libcst.Raise) or (
            isinstance(node, libcst.Call)
            and isinstance(node.func, libcst.Attribute)
            and node.func.attr.value in _MESSAGES
        )
        return is_message or super()._skip_node_and_children(node)


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a module, without those of texts: docstrings, and what is raised, warned of or logged."""
    wrapper = MetadataWrapper(libcst.parse_module(path.read_text()))
    visitor = _Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    wrapper.visit(visitor)
    lines: dict[libcst.CSTNode, tuple[int, int]] = {}
    positions = wrapper.resolve(PositionProvider)

    def place(node: libcst.CSTNode, found: tuple[int, int]) -> None:
        if (
            isinstance(node, libcst.BaseStatement | libcst.BaseExpression | libcst.BaseSmallStatement)
            and node in positions
        ):
            found = positions[node].start.line, positions[node].end.line
        lines[node] = found
        for child in node.children:
            place(child, found)

    place(wrapper.module, (1, 1))
    return [
        Mutant(path, number, lines[mutation.original_node], wrapper.module, mutation)
        for number, mutation in enumerate(visitor.mutations)
    ]


def sample(mutants: dict[Path, list[Mutant]], size: int, seed: int) -> list[Mutant]:
    """A random sample in random order, from each module in proportion to its mutants."""
    generator, whole, chosen = random.Random(seed), sum(map(len, mutants.values())), []
    for found in mutants.values():
        chosen += generator.sample(found, min(len(found), max(1, round(size * len(found) / whole))))
    generator.shuffle(chosen)
    return chosen
