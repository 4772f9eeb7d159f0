"""What a causal LM says of each token of rows: its likelihood, and whether it is the likeliest one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from numpy.typing import NDArray
from transformers import PreTrainedModel

from not_hf.architecture.layers import eval_mode
from not_hf.errors import NotHFError
from not_hf.evaluation.bootstrap import Floats
from not_hf.evaluation.windows import Window, scored_logits


class TokenScores(NamedTuple):
    """Of the tokens of a row but for the first, `(tokens - 1,)` each."""

    log_probs: Floats  # natural logarithm of the probability, given the tokens before it
    is_likeliest: NDArray[np.bool_]  # whether greedy decoding would write it after these


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int, name: str
) -> list[TokenScores]:
    """Score the tokens of rows, each on its own, with a progress bar.

    Args:
        model: A causal LM.
        rows: Token ids, at least two of each row.
        batch_size: Rows per forward pass.
        name: What is scored, for the progress bar.

    Raises:
        NotHFError: A probability is no number, as of a model that diverged.
    """
    texts = [list(row) for row in rows]
    order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))  # little padding, early out-of-memory
    found: dict[int, TokenScores] = {}
    with (
        eval_mode(model),
        tqdm(desc=f"Scoring {name}", unit=" rows", total=len(texts), delay=2, leave=False) as bar,
    ):
        for begin in range(0, len(order), batch_size):
            batch = [Window(n, 0, 1, len(texts[n])) for n in order[begin : begin + batch_size]]
            for window, (logits, targets) in zip(batch, scored_logits(model, texts, batch), strict=True):
                log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                if not log_probs.isfinite().all():
                    raise NotHFError(
                        f"the probabilities of {name} are not finite; the model has diverged, so train it again"
                    )
                is_likeliest = logits.argmax(-1) == targets
                found[window.text] = TokenScores(log_probs.double().cpu().numpy(), is_likeliest.cpu().numpy())
            bar.update(len(batch))
    return [found[n] for n in range(len(texts))]
