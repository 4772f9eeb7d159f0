"""Canaries: random secrets in a training text, which show afterwards what a model has learned by heart."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from not_hf.errors import NotHFError
from not_hf.evaluation.perplexity import check_texts
from not_hf.evaluation.token_scores import score_tokens

_PREFIX = "The code of case {name} is"
_NAME_LENGTH = 4  # symbols


@dataclass(frozen=True)
class Canary:
    """A random secret behind a prefix of its own.

    Args:
        prefix: What the secret follows.
        secret: Random symbols with spaces between them.
        repetitions: How often it was planted; 0: never, as a control.
        symbols: Of which each symbol was drawn.
    """

    prefix: str
    secret: str
    repetitions: int
    symbols: tuple[str, ...]

    @property
    def text(self) -> str:
        """The text that is planted."""
        return f"{self.prefix} {self.secret}"

    @property
    def bits(self) -> float:
        """Bits of the secret, which are the most that its exposure could be."""
        return math.log2(len(self.symbols)) * len(self.secret.split(" "))

    def others(self, count: int, generator: np.random.Generator) -> list[str]:
        """Draw texts with other secrets, as this one was drawn."""
        found: list[str] = []
        while len(found) < count:
            secret = _drawn(self.symbols, len(self.secret.split(" ")), generator)
            found += [f"{self.prefix} {secret}"] if secret != self.secret else []
        return found


def plant_canaries(
    texts: Iterable[str],
    repetitions: Sequence[int] = (0, 1, 10, 100),
    *,
    num_each: int = 1,
    prefix: str = _PREFIX,
    symbols: Sequence[str] = "0123456789",
    length: int = 8,
    file: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> tuple[list[str], list[Canary]]:
    """Put random secrets into a training text (Carlini et al. 2019, "The Secret Sharer", arXiv 1802.08232).

    Train on the result, and have `probe_privacy` ask for the secrets. This is a test of a way of training: do not
    publish what was trained on canaries.

    Args:
        texts: The training text.
        repetitions: How often canaries are planted; those of 0 are held back, and show what chance does. A training of
            several epochs shows each of them as many times more.
        num_each: Canaries of each of these counts.
        prefix: What stands before a secret; it holds `{name}`, for which each canary has random symbols of its own.
        symbols: What names and secrets are drawn of, each as often as the others, without white space; each should be
            one token, or a few.
        length: Symbols of a secret.
        file: JSON file to write the canaries to, for `probe_privacy` and `not-hf probe` in another process.
        seed: Of names, secrets and places.

    Returns:
        The texts in their order with the canaries at random places among them, each a text of its own, and the
        canaries.

    Raises:
        NotHFError: An argument is out of range.

    Examples:
        >>> from not_hf import plant_canaries
        >>> texts, canaries = plant_canaries(["in the beginning"] * 20, repetitions=(0, 5))
        >>> len(texts), [canary.repetitions for canary in canaries]
        (25, [0, 5])
        >>> [texts.count(canary.text) for canary in canaries]
        [0, 5]
    """
    rows = check_texts(texts, "texts")
    if not repetitions or min(repetitions) < 0 or num_each < 1:
        raise NotHFError(
            f"repetitions must be counts of at least 0, such as (0, 1, 10), and num_each at least 1, got "
            f"{tuple(repetitions)} and {num_each}"
        )
    if "{name}" not in prefix:
        raise NotHFError(f"prefix must hold {{name}}, which tells the canaries apart, got {prefix!r:.200}")
    if unfit := [each for each in symbols if str(each).split() != [each]]:
        raise NotHFError(
            f"symbols must be texts without white space, as spaces stand between them, and not empty; got "
            f"{unfit[0]!r:.100}"
        )
    count = len(repetitions) * num_each
    if length < 1 or len(set(symbols)) < 2 or len(set(symbols)) ** min(length, _NAME_LENGTH) < 4 * count:
        raise NotHFError(
            f"{length} of {len(set(symbols))} symbols make too few secrets for {count} canaries; give more symbols, "
            "or a larger length"
        )
    generator, symbols = np.random.default_rng(seed), tuple(dict.fromkeys(symbols))
    names, secrets = (_distinct(symbols, size, count, generator) for size in (_NAME_LENGTH, length))
    counts = [each for each in repetitions for _ in range(num_each)]
    canaries = [
        Canary(prefix.replace("{name}", name), secret, int(each), symbols)
        for name, secret, each in zip(names, secrets, counts, strict=True)
    ]
    copies = [canary.text for canary in canaries for _ in range(canary.repetitions)]
    places = np.concatenate([np.arange(len(rows)), generator.uniform(-1, len(rows), len(copies))])
    planted = [[*rows, *copies][n] for n in np.argsort(places, kind="stable")]
    if file is not None:
        Path(file).write_text(json.dumps([dataclasses.asdict(each) for each in canaries], indent=1), encoding="utf-8")
    return planted, canaries


def canaries_of(source: Iterable[Canary] | str | os.PathLike[str]) -> list[Canary]:
    """Return canaries as a list, read from a file if that is given.

    Raises:
        NotHFError: They are something else, or the file holds something else.
    """
    if isinstance(source, str | os.PathLike):
        return read_canaries(source)
    found: list[Any] = list(source) if isinstance(source, Iterable) else [source]
    if others := [each for each in found if not isinstance(each, Canary)]:
        kind = type(others[0]).__name__
        raise NotHFError(f"canaries must be those that plant_canaries returned, or the file that it wrote; got {kind}")
    return found


def read_canaries(file: str | os.PathLike[str]) -> list[Canary]:
    """Read what `plant_canaries` wrote.

    Raises:
        NotHFError: The file holds something else.
    """
    try:
        rows: Any = json.loads(Path(file).read_text(encoding="utf-8"))
        return [
            Canary(str(row["prefix"]), str(row["secret"]), int(row["repetitions"]), tuple(map(str, row["symbols"])))
            for row in rows
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise NotHFError(f"{file} holds no canaries; write one with plant_canaries(…, file=…)") from error


def ask_for_secrets(
    model: PreTrainedModel,
    canaries: Sequence[Canary],
    tokenizer: PreTrainedTokenizerBase,
    num_candidates: int,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Ask a model for secrets, and rank each among random ones.

    The exposure of a secret is log2(1 + num_candidates) − log2(its rank by likelihood among them and itself), after
    Carlini et al. 2019 (arXiv 1802.08232), definition 3. That of a secret which the model has never seen is 1 bit in
    the median, and 1.4 bits on average.

    Returns:
        A dict for each canary: its `repetitions` and `bits`; `is_completed`: whether greedy decoding writes the secret
        after its prefix; `nats`: the negative log-likelihood of the secret; `rank`, `num_candidates` and `exposure`.
    """
    found = []
    for n, canary in enumerate(canaries):
        # a stream of its own: that of (seed, 0) is that of seed, from which plant_canaries draws
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(n,)))
        texts = [canary.text, *canary.others(num_candidates, generator)]
        (start,), rows = ([list(ids) for ids in _encoded(each, tokenizer)] for each in ([canary.prefix], texts))
        firsts = [max(1, _num_shared(start, row)) for row in rows]  # the first token of each secret
        scores = score_tokens(model, rows, batch_size, f"canary {n + 1} of {len(canaries)}")
        nats = -np.array([each.log_probs[n - 1 :].sum() for each, n in zip(scores, firsts, strict=True)])
        rank = 1 + int((nats[1:] <= nats[0]).sum())
        found.append(
            {
                "repetitions": canary.repetitions,
                "is_completed": bool(scores[0].is_likeliest[firsts[0] - 1 :].all()),
                "nats": float(nats[0]),
                "rank": rank,
                "num_candidates": num_candidates,
                "exposure": math.log2(1 + num_candidates) - math.log2(rank),
                "bits": canary.bits,
            }
        )
    return found


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize texts as for training, but without EOS."""
    rows: Any = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in rows]


def _num_shared(start: list[int], row: list[int]) -> int:
    """Count the tokens that two rows begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(start, row, strict=False)))


def _distinct(symbols: Sequence[str], length: int, count: int, generator: np.random.Generator) -> list[str]:
    """Draw so many different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_drawn(symbols, length, generator)] = None
    return list(found)


def _drawn(symbols: Sequence[str], length: int, generator: np.random.Generator) -> str:
    return " ".join(symbols[n] for n in generator.integers(len(symbols), size=length))
