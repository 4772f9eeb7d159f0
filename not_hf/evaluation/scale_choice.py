"""Choose the scale of an organ after training: what each scale gains on the domain, and costs elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import PreTrainedTokenizerBase

from not_hf.errors import NotHFError
from not_hf.evaluation.perplexity import Perplexity, check_texts
from not_hf.evaluation.sweep_record import write_record
from not_hf.recipient.mixin import Recipient
from not_hf.training.figure import add_grid, new_figure

SCALES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)


@dataclass(frozen=True)
class ScaleChoice:
    """Perplexities of a model with an organ at several scales.

    Args:
        donor_name: Name of the organ.
        rows: One dict for each scale, in ascending order: `scale`, `perplexity`, and with a control text
            `control_perplexity`.
        num_tokens: Number of scored tokens of the text.
        num_control_tokens: That of the control text; 0 without one.
    """

    donor_name: str
    rows: list[dict[str, float]]
    num_tokens: int
    num_control_tokens: int

    @property
    def front(self) -> list[dict[str, float]]:
        """The rows that no other row beats on one text without being worse on the other; without control, the best."""

        def values(row: dict[str, float]) -> tuple[float, float]:
            return row["perplexity"], row.get("control_perplexity", 0.0)

        def is_beaten(row: dict[str, float]) -> bool:
            domain, control = values(row)
            return any(p <= domain and q <= control and (p, q) != (domain, control) for p, q in map(values, self.rows))

        return [row for row in self.rows if not any(map(math.isnan, values(row))) and not is_beaten(row)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `scales.json` into a folder; created if missing. Numbers that are not finite are written as null."""
        about = {"donor_name": self.donor_name, "num_tokens": self.num_tokens}
        document = {**about, "num_control_tokens": self.num_control_tokens, "rows": self.rows}
        write_record(folder, document, "scales.json")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw perplexity over control perplexity, a point for each scale; without control, over the scale.

        Args:
            path: File to write: `.png`, or another format of matplotlib.

        Raises:
            NotHFError: matplotlib is not installed.
        """
        figure = new_figure(6, 4, "plot")
        axes = figure.subplots()
        key = "control_perplexity" if self.num_control_tokens else "scale"
        places, values = [row[key] for row in self.rows], [row["perplexity"] for row in self.rows]
        axes.plot(places, values, color="0.35", linewidth=1, marker="o", markersize=4)
        for row, place, value in zip(self.rows, places, values, strict=True):
            axes.annotate(f"{row['scale']:g}", (place, value), textcoords="offset points", xytext=(5, 5))
        axes.set_xlabel("perplexity of the control text" if self.num_control_tokens else "scale")
        axes.set_ylabel("perplexity of the domain")
        axes.set_title(f"scales of organ {self.donor_name!r}", loc="left", fontsize="medium")
        add_grid(axes)
        figure.savefig(path, dpi=150)


def choose_scale(
    model: Recipient,
    donor_name: str,
    data: Iterable[str],
    control: Iterable[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | str,
    scales: Sequence[float] = SCALES,
    **perplexity_kwargs: Any,
) -> ScaleChoice:
    """Measure perplexity at several scales of an organ, on text set aside, to choose between learning and forgetting.

    A scale below 1 often keeps most of what training gained and undoes most of what it cost. Training is not repeated.
    Set the scale that you choose with `model.set_donor_scale`.

    Args:
        model: A causal LM with organs, which keeps the scale that it has.
        donor_name: Name of an active organ.
        data: Texts of the domain, which were not trained on; scored as one stream.
        control: General texts; scored as one stream.
        tokenizer: The model's tokenizer, its Hub ID or folder.
        scales: Scales to measure.
        **perplexity_kwargs: For `perplexity.compute`: `batch_size`, `max_length`, `stride`, `add_start_token`.

    Raises:
        NotHFError: There is no organ of that name, it is not active, a scale is no finite number, or `data` or
            `control` is no list of texts.
        IncompatibleDonorError: The organ cannot be scaled; the errors are those of `set_donor_scale`.
        UnsupportedArchitectureError: The model is no causal LM.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> from not_hf import DonorModel, TransplantedForCausalLM, choose_scale
        >>> words = Tokenizer(models.WordLevel({"<s>": 0, "in": 1, "the": 2, "beginning": 3}))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=8, n_layer=4, n_head=2))
        >>> donor = DonorModel.from_base(base, layers=(1, 3), mode="replace", modules="outputs")
        >>> model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="genesis")
        >>> choice = choose_scale(model, "genesis", ["in the beginning"], tokenizer=tokenizer, scales=(0, 0.5, 1))
        >>> [row["scale"] for row in choice.rows], choice.num_tokens
        ([0.0, 0.5, 1.0], 3)
    """
    if getattr(model, "active_donors", None) is None:
        raise NotHFError(f"{type(model).__name__} has no organs; transplant one first, or give the model that has it")
    if donor_name not in model.active_donors:
        raise NotHFError(f"no active organ named {donor_name!r}; active: {', '.join(model.active_donors) or 'none'}")
    wanted = sorted({float(scale) for scale in scales})
    if not wanted or not all(map(math.isfinite, wanted)):
        raise NotHFError(f"scales must be finite numbers, at least one, got {scales!r:.200}")
    texts = {"perplexity": "\n".join(check_texts(data, "data"))}
    if control is not None:
        texts["control_perplexity"] = "\n".join(check_texts(control, "control"))
    before, counts = model.donor_config[donor_name].scale, dict.fromkeys(texts, 0)
    rows: list[dict[str, float]] = []
    try:
        for scale in tqdm(wanted, desc="Scales", delay=2, leave=False):
            model.set_donor_scale(donor_name, scale)
            row = {"scale": scale}
            for key, text in texts.items():
                found: Any = Perplexity().compute(
                    predictions=[text], model=model, tokenizer=tokenizer, **perplexity_kwargs
                )
                row[key], counts[key] = found["perplexity"], found["num_tokens"]
            rows.append(row)
    finally:
        model.set_donor_scale(donor_name, before)
    return ScaleChoice(donor_name, rows, counts["perplexity"], counts.get("control_perplexity", 0))
