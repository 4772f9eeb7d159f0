"""Organs in words, as models show them in a terminal and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping

from not_hf.cards.common import short_name
from not_hf.cards.donor import beside_layers, parts_of_layers, picture
from not_hf.config import DonorConfig
from not_hf.errors import interval


def describe_organ(config: DonorConfig) -> str:
    """Describe an organ in one line: its layers, its place, and what it was trained on."""
    parts = f"{parts_of_layers(config).replace('`', '')} of " if parts_of_layers(config) else ""
    words = [f"{parts}layers {interval(config.span)} of {short_name(config.base_model_name_or_path)}"]
    words.append(f"{config.mode} at position {config.position}")
    words += [f"scale {config.scale:g}"] if config.scale != 1 else []
    words += [f"with {beside_layers(config).replace('`', '')}"] if beside_layers(config) else []
    words += [f"for {' '.join(config.domain.split())}"] if config.domain else []
    return ", ".join(words)


def as_html(organs: Mapping[str, DonorConfig]) -> str:
    """Show organs by name as a table; the place of a single one is drawn."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(describe_organ(config))}</td></tr>"
        for name, config in organs.items()
    )
    drawn = picture(*organs.values()) if len(organs) == 1 else None
    return f"<table>{rows}</table>" + (f"<pre>{html.escape(drawn)}</pre>" if drawn else "")
