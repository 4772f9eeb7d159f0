"""What the documentation says of the test matrix; `make matrix` writes it there."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from testing import ROOT
from testing.shapes import ARCHITECTURES, ENCODERS, HEADED, OTHER_STATEFUL, OTHERS, STATEFUL
from testing.wrappers import WRAPPERS

FEWER = "disabling, merging, saving and cached generation, without training"


def matrix() -> str:
    """The list of causal LMs."""
    stateful = {*STATEFUL, *OTHER_STATEFUL}
    return "\n\n".join(
        (
            _list(f"**Full test matrix** ({len(ARCHITECTURES)}, tiny models)", ARCHITECTURES),
            _list(f"**Fewer tests** ({len(OTHERS)}; {FEWER})", OTHERS),
            _list(f"Of all these, {len(stateful)} have **layers with a state**", stateful),
            "**Other decoder-only models**: by the same rule, untested.",
        )
    )


def encoders() -> str:
    """The list of masked LMs."""
    return _list(f"**Full test matrix** ({len(ENCODERS)}, tiny models)", ENCODERS)


def heads() -> str:
    """The list of models that were tried under other heads."""
    return _list(f"**Tested** ({len(HEADED)}, tiny models)", HEADED)


def wrappers() -> str:
    """The list of models with a text model in them."""
    return _list(f"**Tested** ({len(WRAPPERS)}, tiny models)", WRAPPERS)


def counts() -> str:
    """The counts in the README."""
    return (
        f"({len(ARCHITECTURES)} causal LMs and {len(ENCODERS)} encoders in the full test matrix, {len(OTHERS)} more)"
    )


PAGES = {
    ROOT / "docs" / "compatibility" / "models.md": {
        "matrix": matrix,
        "encoders": encoders,
        "heads": heads,
        "wrappers": wrappers,
    },
    ROOT / "README.md": {"counts": counts},
}


def written(page: str, parts: dict) -> str:
    """A page with its generated parts, which stand between comments, as the matrix is now."""
    for name, part in parts.items():
        block = f"\n{part()}\n" if name != "counts" else part()
        page = re.sub(
            f"(<!-- {name} -->).*(<!-- /{name} -->)",
            lambda found, block=block: f"{found[1]}{block}{found[2]}",
            page,
            flags=re.S,
        )
    return page


def _list(title: str, names: Iterable[str]) -> str:
    text = f"{title}: {', '.join(sorted(names))}."
    return "\n".join(textwrap.wrap(text, 118, break_on_hyphens=False))


if __name__ == "__main__":
    for path, parts in PAGES.items():
        path.write_text(written(path.read_text("utf-8"), parts), "utf-8")
