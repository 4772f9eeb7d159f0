"""What an organ, or any causal LM, gives away of the rows that it was trained on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from not_hf.cards.metrics import PRIVACY
from not_hf.donor.modeling import DonorModel
from not_hf.errors import NotHFError
from not_hf.evaluation.bootstrap import check_level
from not_hf.evaluation.canaries import Canary, ask_for_secrets, canaries_of
from not_hf.evaluation.live_models import are_one_model
from not_hf.evaluation.membership import Sides, attack_rows, repeated_rows
from not_hf.evaluation.privacy_findings import findings, page
from not_hf.evaluation.probed_models import (
    AS_GIVEN,
    OWN,
    Source,
    donor_of,
    load_causal,
    name_of,
    probed_models,
    shortest_context,
    tokenizer_of,
)
from not_hf.evaluation.probed_rows import ProbedRows
from not_hf.evaluation.sweep_record import donor_digest, write_record
from not_hf.evaluation.token_scores import TokenScores, score_tokens
from not_hf.evaluation.windows import check_lengths, needs_organs
from not_hf.recipient.mixin import Recipient
from not_hf.version import versions


@dataclass(frozen=True)
class PrivacyProbe:
    """What attacks learn of the rows that a model was trained on.

    Args:
        attacks: One dict for each recipient and attack: `recipient`, `attack`, `auc` and `tpr` (the share of members
            found at 1 % false positives), with the ends of their intervals, `auc_low`, `auc_high`, …
        extraction: One dict for each recipient, and members and non-members: `recipient`, `rows`, `num_rows`, `share`
            of the tokens after a prefix that are repeated, with `share_low` and `share_high`, and `num_whole` rows.
        canaries: One dict for each recipient and canary: `recipient`, `repetitions`, `is_completed`, `nats`, `rank`,
            `num_candidates`, `exposure` and `bits`.
        about: What was measured: `model`, number of rows, settings, versions.
    """

    attacks: list[dict[str, Any]]
    extraction: list[dict[str, Any]]
    canaries: list[dict[str, Any]]
    about: dict[str, Any]

    @property
    def findings(self) -> list[str]:
        """What was found, a sentence each."""
        return findings(self.attacks, self.extraction, self.canaries, self.about)

    def to_dict(self) -> dict[str, Any]:
        """Return all as one dict, which JSON can hold."""
        tables = {"attacks": self.attacks, "extraction": self.extraction, "canaries": self.canaries}
        return {**self.about, **tables, "findings": self.findings}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `probe.json` and `probe.md`, a section for a card, into a folder; created if missing."""
        write_record(folder, self.to_dict(), "probe.json")
        Path(folder, "probe.md").write_text(page(self.findings), encoding="utf-8")

    def record(self, donor: DonorModel) -> None:
        """Note the findings in the metrics of a donor, whose card shows them from its next save on.

        Raises:
            NotHFError: The probe was of another organ, or of a model that is no donor.
        """
        if not isinstance(donor, DonorModel):
            raise NotHFError(
                f"record needs a DonorModel, got {donor!r:.200}; load it with DonorModel.from_pretrained, then save it"
            )
        if donor_digest(donor) != self.about["donor_digest"]:
            raise NotHFError("the probe was not of this organ; give probe_privacy the donor that is to be recorded")
        donor.config.metrics = {**(donor.config.metrics or {}), PRIVACY: self.findings}


def probe_privacy(
    model: Source | DonorModel,
    members: Iterable[str] | Iterable[Mapping[str, Any]],
    non_members: Iterable[str] | Iterable[Mapping[str, Any]],
    *,
    reference: Source | None = None,
    base: Source | None = None,
    canaries: Sequence[Canary] | str | os.PathLike[str] | None = None,
    recipients: Mapping[str, Source] | None = None,
    with_random_layers: bool = False,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    num_rows: int = 1000,
    prefix_length: int = 32,
    max_length: int | None = None,
    num_candidates: int = 255,
    batch_size: int = 8,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> PrivacyProbe:
    """Measure what an organ gives away of its training rows: which they were, and what they say.

    - Membership: attacks by the loss, by the loss less that of the model without the organ, and by the least likely
      tokens (Min-K%) guess whether a row was trained on. An AUC of 0.5 is chance; with 1 % false positives, chance
      finds 1 % of the members. The control is an attack by the model without the organ, which knows nothing of the
      training: where it is off 0.5, members and non-members differ by themselves, and the others are off as well.
    - Extraction: greedy decoding goes on from the first tokens of rows. What it repeats of non-members could be
      guessed, so the difference counts.
    - Canaries: secrets of `plant_canaries` are asked for, and ranked among random ones.

    A low number does not show that an organ is private: these attacks are simple ones, and better ones are known.

    Args:
        model: A donor: folder, Hub ID or `DonorModel`. Or a causal LM, live or by name, with organs or without.
        members: Rows that were trained on, each scored on its own: texts, tokenized as by `pack`, or rows with
            `input_ids`. At least 20 of at least 2 tokens.
        non_members: Rows that were not, best drawn by lot from the same documents; at least 100, since 1 % of them may
            be false positives. Rows that are also among the members are left out.
        reference: A model with the same tokenizer that was not trained on the members, for the reference attack and
            the control; default: the model without its organs. A model without organs, and one whose organs have the
            only rows for some tokens, has no default, and goes without these two.
        base: Recipient of a donor, without organs; default: the base that it names. A live one is left unchanged.
        canaries: What `plant_canaries` returned, or the file that it wrote.
        recipients: Other recipients of a donor, by what they are, such as another fine-tune of the base. Each is
            measured like the donor's own.
        with_random_layers: Also measure the organ in its recipient after all layers of that have been given random
            weights: what the file tells somebody who has only embeddings and head besides.
        tokenizer: Of a live model, its Hub ID or folder; needed for texts and canaries. Default: the base's, or the
            donor's if it brings tokens.
        num_rows: At most so many members, and so many non-members, evenly spread.
        prefix_length: Tokens from which decoding goes on, and number of those that it writes. Rows shorter than twice
            that are left out of the extraction.
        max_length: Tokens of a row that are read at most; default: the shortest context of the models, at most 1024.
        num_candidates: Random secrets that each canary is ranked among.
        batch_size: Rows per forward pass.
        confidence_level: Of the bootstrap intervals, which say how much other rows might change a number. One of a
            single point means that rows of this number do not tell it from certainty.
        seed: Of the intervals, the random secrets and the random layers.

    Raises:
        IncompatibleDonorError: The donor does not fit a recipient.
        NotHFError: An argument is out of range, there are too few rows, a tokenizer or the base is missing or of other
            tokens, recipients are given for a model that is no donor, the reference is the probed model itself, none
            of its organs is active and there is no reference, or the model has diverged.
        UnsupportedArchitectureError: The model is no causal LM.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, probe_privacy
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=8, n_layer=4, n_head=2))
        >>> donor = DonorModel.from_base(base, layers=(1, 3), init="identity")
        >>> rows = [{"input_ids": [n % 99, n // 99, 3 * n % 99]} for n in range(200)]
        >>> found = probe_privacy(donor, rows[::2], rows[1::2], base=base)
        >>> [row["attack"] for row in found.attacks]
        ['loss', 'min-k', 'reference', 'control']
        >>> found.attacks[2]["auc"]
        0.5
    """
    check_level(confidence_level)
    counts = {"num_rows": num_rows, "prefix_length": prefix_length, "num_candidates": num_candidates}
    for name, value in counts.items():
        if value < 1:
            raise NotHFError(f"{name} must be at least 1, got {value!r:.100}")
    secrets = canaries_of(canaries or ())
    donor = donor_of(model)
    models = probed_models(model, donor, base, recipients or {}, with_random_layers, seed)
    if are_one_model(reference, model if donor is None else base):
        raise NotHFError(
            "the reference is the probed model: organs and adapters are put into a live model in place; give no "
            "reference, for the model without its organs, or load the base once more"
        )

    @functools.cache
    def words() -> PreTrainedTokenizerBase:
        return tokenizer_of(model, donor, base, reference, tokenizer)

    rows = ProbedRows.of(members, non_members, words, num_rows)
    context = shortest_context(model, donor, base, recipients or {}, reference)
    length, _ = check_lengths(context, max_length, None, batch_size)
    sizes = (prefix_length, num_candidates, batch_size)
    how = _Questions(rows.first(length), secrets, words, *sizes, confidence_level, seed)
    tables: dict[str, list[dict[str, Any]]] = {"attacks": [], "extraction": [], "canaries": []}
    for recipient, opened in models.items():
        with opened() as live:
            found = how.ask(live, reference if recipient in (AS_GIVEN, OWN) else None)
        for table, some in found.items():
            tables[table] += [{"recipient": recipient, **row} for row in some]
    about = {
        "model": name_of(model),
        "donor_digest": None if donor is None else donor_digest(donor),
        **{"num_members": len(rows.members), "num_non_members": len(rows.non_members), "num_shared": rows.num_shared},
        **{"max_length": length, "confidence_level": confidence_level, "seed": seed},
        **versions(),
    }
    return PrivacyProbe(**tables, about=about)


@dataclass(frozen=True)
class _Questions:
    """What each model is asked; the arguments are those of `probe_privacy`."""

    rows: ProbedRows
    canaries: list[Canary]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    prefix_length: int
    num_candidates: int
    batch_size: int
    confidence_level: float
    seed: int

    def ask(self, model: PreTrainedModel, reference: Source | None) -> dict[str, list[dict[str, Any]]]:
        """Return the tables of a model.

        Raises:
            NotHFError: The model would be its own reference, as none of its organs is active; or it has diverged.
        """
        recipient = model if reference is None and isinstance(model, Recipient) else None
        if recipient is not None and not recipient.active_donors:
            raise NotHFError(
                "no organ is active, so the model would be its own reference; activate one with set_donor(), outside "
                "of disable_donors(), or give reference="
            )
        own, usual = self._score(model, "with the organ"), None
        if reference is not None:
            usual = self._score(load_causal(reference), "the reference model")
        elif recipient is not None and not needs_organs(recipient, self.rows.members + self.rows.non_members):
            with recipient.disable_donors():
                usual = self._score(model, "without the organ")
        found = {
            "attacks": attack_rows(own, usual, self.seed, self.confidence_level),
            "extraction": repeated_rows(own, self.prefix_length, self.seed, self.confidence_level),
            "canaries": [],
        }
        if self.canaries:
            how = (self.tokenizer(), self.num_candidates, self.batch_size, self.seed)
            found["canaries"] = ask_for_secrets(model, self.canaries, *how)
        return found

    def _score(self, model: PreTrainedModel, name: str) -> Sides:
        def side(some: list[list[int]], kind: str) -> list[TokenScores]:
            return score_tokens(model, some, self.batch_size, f"{kind} {name}")

        return side(self.rows.members, "members"), side(self.rows.non_members, "non-members")
