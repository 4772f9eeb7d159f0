"""What a privacy probe found, in sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from not_hf.evaluation.probed_models import AS_GIVEN, OWN, RANDOM

Row = Mapping[str, Any]

ATTACKS = {
    "loss": "Attack by the loss",
    "min-k": "Attack by the least likely tokens (Min-K%)",
    "reference": "Attack by the loss less that of the reference model",
    "control": "Control, by the loss of the reference model",
}
LIMITS = "Other attacks may learn more: low numbers do not show that the layers are private."


def findings(
    attacks: Sequence[Row], extraction: Sequence[Row], canaries: Sequence[Row], about: Mapping[str, Any]
) -> list[str]:
    """Say what was found, a sentence each; the arguments are the parts of a `PrivacyProbe`."""
    return [rows_finding(about), *map(_attack, attacks), *other_findings(attacks, extraction, canaries)]


def rows_finding(about: Mapping[str, Any]) -> str:
    """Say which rows were measured."""
    return (
        f"Measured on {about['num_members']:,} rows that were trained on (members) and {about['num_non_members']:,} "
        f"that were not, with the first {about['max_length']:,} tokens of each at most; in brackets are "
        f"{100 * about['confidence_level']:g} % intervals over rows."
    )


def other_findings(attacks: Sequence[Row], extraction: Sequence[Row], canaries: Sequence[Row]) -> list[str]:
    """Say what was found beside the numbers of the attacks."""
    found = [_warning(row) for row in attacks if row["attack"] == "control" and not _holds_chance(row)]
    if not any(row["attack"] == "control" for row in attacks):
        found.append("There was no reference model, so nothing tells whether members and non-members are alike.")
    pairs = zip(extraction[::2], extraction[1::2], strict=True)
    found += [_repeated(members, others) for members, others in pairs]
    if not extraction:
        found.append("Extraction was not measured: no rows are as long as two prefixes.")
    return [*found, *_canaries(canaries)]


def page(lines: Sequence[str]) -> str:
    """Write findings as a section for a card."""
    return "\n".join(["## Privacy", "", *(f"- {line}" for line in lines), "", LIMITS, ""])


def percent(row: Row, name: str) -> str:
    """Show a share and its interval."""
    value, low, high = (100 * row[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.1f} % ({low:.1f} – {high:.1f})"


def area(row: Row) -> str:
    """Show an AUC and its interval."""
    return f"{row['auc']:.3f} ({row['auc_low']:.3f} – {row['auc_high']:.3f})"


def _attack(row: Row) -> str:
    found = f"AUC {area(row)}; {percent(row, 'tpr')} of the members found at 1 % false positives."
    return f"{_where(row)}{ATTACKS[row['attack']]}: {found}"


def _where(row: Row) -> str:
    """Name the recipient, if it is not the donor's own."""
    named = {AS_GIVEN: "", OWN: "", RANDOM: "With random weights in all other layers: "}
    return named.get(row["recipient"], f"In {row['recipient']}: ")


def _holds_chance(row: Row) -> bool:
    return bool(row["auc_low"] <= 0.5 <= row["auc_high"])


def _warning(row: Row) -> str:
    return (
        f"{_where(row)}The control is off 0.5: members and non-members seem to differ by themselves, or the reference "
        "model knows some of them, so the attacks by the loss and by Min-K% do not tell what training did."
    )


def _repeated(members: Row, others: Row) -> str:
    length = members["prefix_length"]
    whole = " and ".join(f"{row['num_whole']:,} of {row['num_rows']:,} {row['rows']}" for row in (members, others))
    return (
        f"{_where(members)}Of the {length} tokens after {length} of a row, greedy decoding repeats "
        f"{percent(members, 'share')} of members and {percent(others, 'share')} of non-members, and all of {whole}."
    )


def _canaries(canaries: Sequence[Row]) -> Iterator[str]:
    for recipient, count in dict.fromkeys((row["recipient"], row["repetitions"]) for row in canaries):
        rows = [row for row in canaries if (row["recipient"], row["repetitions"]) == (recipient, count)]
        planted = {0: "never planted", 1: "planted once"}.get(count, f"planted {count:,} times")
        completed = f"{sum(row['is_completed'] for row in rows)} of {len(rows)} completed by greedy decoding"
        exposure, candidates = statistics.median(row["exposure"] for row in rows), rows[0]["num_candidates"]
        yield (
            f"{_where(rows[0])}Canaries {planted}: {completed}; median exposure {exposure:.1f} bits (chance: 1.0; "
            f"{candidates:,} random candidates show {math.log2(1 + candidates):.1f} at most)."
        )
