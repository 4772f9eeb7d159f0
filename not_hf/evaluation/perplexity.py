"""Perplexity of a causal language model, as an `evaluate.Metric`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from not_hf.architecture.devices import input_device
from not_hf.architecture.layers import eval_mode
from not_hf.architecture.stack import is_encoder
from not_hf.donor.modeling import DonorModel
from not_hf.errors import NotHFError, UnsupportedArchitectureError
from not_hf.evaluation.bootstrap import ConfidenceInterval, Floats, check_level, nll_intervals
from not_hf.evaluation.windows import Window, batches_of, check_lengths, context_of, encode, nll_of
from not_hf.recipient.heads import writing_class

_DESCRIPTION = """
Perplexity (PPL) of texts under a causal language model: the exponential of the mean negative log-likelihood
(natural logarithm) of their tokens. Texts longer than the window are scored in overlapping windows, never truncated.
"""

_CITATION = """
@article{jelinek1977perplexity,
  title={Perplexity -- a measure of the difficulty of speech recognition tasks},
  author={Jelinek, F. and Mercer, R. L. and Bahl, L. R. and Baker, J. K.},
  journal={The Journal of the Acoustical Society of America},
  volume={62},
  pages={S63},
  year={1977},
  doi={10.1121/1.2016299}
}
"""

_INPUTS = """
Args:
    predictions (list of str): Texts of at least one token each (two without start token). To score a corpus as one
        stream, join it into one text.
    model (model, str): A causal LM, with organs or without, which is left unchanged; or its Hub ID or folder.
    model_id (str): Hub ID or folder of a model or donor, loaded with `AutoModelForCausalLM`, or the
        Auto class for its kind of model.
    tokenizer (tokenizer, str): Required with a live model. Default for an ID or folder: its own.
    batch_size (int): Windows per forward pass. Default 16.
    add_start_token (bool): Put BOS before each text, so that its first token is scored too. Default True.
    device (str): Device for a model loaded by ID: "cpu", "cuda", ... Default CUDA if available.
    max_length (int): Tokens per window, BOS included. Default: the model's context, at most 1024, which bounds memory
        and keeps models with different contexts comparable.
    stride (int): Tokens between the starts of two windows of a text, at most max_length. Default: half of max_length.
    confidence_level (float): Of the intervals. Default 0.95.
    seed (int): Of the draws for them. Default 0.

A text of n tokens (BOS included) is split into windows [b, min(b + max_length, n)) for b = 0, stride, 2 stride, ... up
to the first that reaches n. A window scores the tokens that no earlier window covers, each given all tokens before it
in the window. So with stride < max_length every token of a text but the first is scored exactly once, with a context
of at least max_length - stride tokens wherever the text has that many. With stride = max_length the first token of
each later window has no context and is not scored (https://huggingface.co/docs/transformers/perplexity).
Log-probabilities are computed in float32.

Intervals are percentiles of 1,000 bootstrap samples of windows. They say how much another text of the same kind might
change the number. With 20 windows or fewer they are somewhat too narrow.

Bytes are counted in UTF-8. A token has those of its characters and of the white space before it; BOS has none. What is
not scored is not counted: the first token of each text if add_start_token is False, and the first token of each later
window if stride = max_length. A character that several tokens share counts with the last of them. Of a tokenizer that
tells no offsets (is_fast is False), every token of a text counts as equally long. Bits per byte compare tokenizers
that keep all of a text: characters that one drops, or maps to an unknown token, are counted but hardly cost it any.

Returns a dict:
    perplexities (list of float): One per text: exp(its summed NLL / its number of scored tokens).
    mean_perplexity (float): Their arithmetic mean, as computed by evaluate's `perplexity`.
    perplexity (float): Of the corpus: exp(summed NLL of all texts / num_tokens), as reported in papers.
    nats_per_token (float): Its logarithm: summed NLL of all texts / num_tokens, in nats.
    bits_per_byte (float): summed NLL of all texts / ln 2 / num_bytes, which compares models with different tokenizers.
    num_tokens (int): Number of scored tokens in all texts.
    num_bytes (int): Number of their bytes in UTF-8.
    confidence_interval (dict): Of perplexity, nats_per_token and bits_per_byte, by these names: (low, high); None if
        there is only one window.

Raises NotHFError for no texts, texts that are too short, no model, a live model without tokenizer, or a tokenizer
without BOS if add_start_token is True; UnsupportedArchitectureError for an encoder or a model without a language head.
"""


class Perplexity(evaluate.Metric):
    """Perplexity of texts under a live model or one loaded by ID, with the interface of evaluate's `perplexity`.

    See `compute` for arguments, formulas and results. Texts are buffered in memory rather than in evaluate's locked
    cache files, so that any number of processes may use it at once; `num_process > 1` uses the files.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> from not_hf import perplexity
        >>> words = Tokenizer(models.WordLevel({"<s>": 0, "in": 1, "the": 2, "beginning": 3}))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=8, n_layer=2, n_head=2))
        >>> perplexity.compute(predictions=["in the beginning"], model=model, tokenizer=tokenizer)["num_tokens"]
        3
    """

    def __init__(
        self, config_name: str | None = None, keep_in_memory: bool | None = None, num_process: int = 1, **kwargs: Any
    ) -> None:
        if keep_in_memory is None:
            keep_in_memory = num_process == 1
        super().__init__(config_name, keep_in_memory=keep_in_memory, num_process=num_process, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def compute(
        self, *, predictions: Iterable[str] | None = None, references: None = None, **kwargs: Any
    ) -> dict[str, Any] | None:
        """Compute the perplexity of texts, including those passed to `add` and `add_batch`."""
        if predictions is not None:
            predictions = check_texts(predictions, "predictions") or None
        if predictions is None and self.writer is None:
            raise NotHFError("no texts to score; give predictions=[text, ...]")
        return super().compute(predictions=predictions, references=references, **kwargs)

    def add_batch(self, *, predictions: Iterable[str] | None = None, references: None = None, **kwargs: Any) -> None:
        """Add texts to those that `compute` scores."""
        texts = None if predictions is None else check_texts(predictions, "predictions")
        super().add_batch(predictions=texts, references=references, **kwargs)

    def _compute(
        self,
        *,
        predictions: list[str],
        model: PreTrainedModel | str | None = None,
        model_id: str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        batch_size: int = 16,
        add_start_token: bool = True,
        device: str | None = None,
        max_length: int | None = None,
        stride: int | None = None,
        confidence_level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        check_level(confidence_level)
        model, tokenizer = load_for_texts(model, model_id, tokenizer, device)
        max_length, stride = check_lengths(context_of(model.config), max_length, stride, batch_size)
        texts, byte_ends = encode(predictions, tokenizer, add_start_token)
        scores = score(model, texts, byte_ends, batches_of(texts, max_length, stride, batch_size))
        by_text = scores.by_text()
        perplexities = [perplexity_of(mean) for mean in by_text.nats / by_text.num_tokens]
        return {
            "perplexities": perplexities,
            "mean_perplexity": sum(perplexities) / len(perplexities),
            **summarize(scores, confidence_level, seed),
        }


class Scores(NamedTuple):
    """What was measured of windows, or of whole texts: `(windows,)` each."""

    texts: NDArray[np.int64]  # index of the text
    nats: Floats  # summed negative log-likelihood of the scored tokens
    num_tokens: Floats  # number of scored tokens
    num_bytes: Floats  # number of their bytes

    def by_text(self) -> Scores:
        """Add up the windows of each text."""
        nats, num_tokens, num_bytes = (np.bincount(self.texts, each).astype(np.float64) for each in self[1:])
        return Scores(np.arange(len(nats)), nats, num_tokens, num_bytes)


def score(
    model: PreTrainedModel, texts: list[list[int]], byte_ends: list[Floats], batches: list[list[Window]]
) -> Scores:
    """Score windows of texts, with a progress bar.

    Args:
        model: A causal LM.
        texts: Token ids.
        byte_ends: For each token, the bytes up to its end, as `encode` returns them.
        batches: The windows.
    """
    windows = [window for batch in batches for window in batch]
    tokens = [window.end - window.scored for window in windows]
    num_bytes = [byte_ends[w.text][w.end - 1] - byte_ends[w.text][w.scored - 1] for w in windows]
    nats: list[float] = []
    with eval_mode(model), evaluate.logging.tqdm(total=sum(tokens), desc="Perplexity", unit=" tokens") as progress:
        for batch in batches:
            nats += nll_of(model, texts, batch)
            progress.update(sum(window.end - window.scored for window in batch))
    columns = (np.array(each, dtype=np.float64) for each in (nats, tokens, num_bytes))
    return Scores(np.array([window.text for window in windows]), *columns)


def summarize(scores: Scores, confidence_level: float, seed: int) -> dict[str, Any]:
    """Compute the numbers of a corpus, which `perplexity` describes."""
    nats, num_tokens, num_bytes = math.fsum(scores.nats), int(scores.num_tokens.sum()), round(scores.num_bytes.sum())
    weights = np.stack([scores.num_tokens, scores.num_bytes])
    lows, highs = nll_intervals(np.stack([scores.nats] * 2), weights, seed, confidence_level)
    (low, low_of_bytes), (high, high_of_bytes) = lows.tolist(), highs.tolist()
    intervals = {
        "perplexity": ConfidenceInterval(perplexity_of(low), perplexity_of(high)),
        "nats_per_token": ConfidenceInterval(low, high),
        "bits_per_byte": ConfidenceInterval(low_of_bytes / math.log(2), high_of_bytes / math.log(2)),
    }
    return {
        "perplexity": perplexity_of(nats / num_tokens),
        "nats_per_token": nats / num_tokens,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else math.nan,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "confidence_interval": intervals if len(scores.nats) > 1 else dict.fromkeys(intervals),
    }


def check_texts(texts: Iterable[str], name: str) -> list[str]:
    """Check that an argument of this name holds texts, if anything, and return them as a list."""
    if isinstance(texts, str):
        raise NotHFError(f"{name} must be a list of texts, got a string; give {name}=[text]")
    rows = list(texts)
    for text in rows:
        if not isinstance(text, str):
            raise NotHFError(f"{name} must be a list of str, got a {type(text).__name__} in it")
    return rows


def load_for_texts(
    model: PreTrainedModel | str | None,
    model_id: str | None,
    tokenizer: PreTrainedTokenizerBase | str | None,
    device: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer, loaded if given by ID or folder."""
    source = model if model_id is None else model_id
    if source is None or (model is not None and model_id is not None):
        raise NotHFError("give either model= (a model, an ID or a folder) or model_id= (an ID or a folder)")
    tokenizer = load_tokenizer(source, tokenizer)
    return load_model(source, device), tokenizer


def load_tokenizer(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | str | None, **where: Any
) -> PreTrainedTokenizerBase:
    """Return the tokenizer, loaded if given by ID or folder; default for a model by ID or folder: its own.

    `where` is the model's `revision` and `subfolder`.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is not None:
        return AutoTokenizer.from_pretrained(tokenizer)
    if isinstance(model, torch.nn.Module):
        raise NotHFError("a live model needs its tokenizer; pass tokenizer=")
    return AutoTokenizer.from_pretrained(model, **where)


def load_model(source: PreTrainedModel | str, device: str | None = None, **where: Any) -> PreTrainedModel:
    """Load a model that writes text, or a donor, from a Hub ID or folder onto a device; default CUDA if available.

    A live model is returned as it is. `where` is its `revision` and `subfolder`.

    Raises:
        NotHFError: A live model is on another device, or is an organ alone.
        UnsupportedArchitectureError: The model is no causal LM.
    """
    if isinstance(source, DonorModel):
        raise NotHFError(
            "a DonorModel is an organ alone, which writes no text; put it into a recipient: "
            "TransplantedForCausalLM.from_pretrained(base, donor)"
        )
    if isinstance(source, torch.nn.Module):
        if device is not None and _device(device).type != (here := input_device(source)).type:
            raise NotHFError(f"the model is on {here}, not {device}; move it with model.to({device!r}) first")
        model = source
    else:
        native: Any = writing_class(source).native_auto_class
        model = cast(PreTrainedModel, native.from_pretrained(source, **where).to(_device(device)))
    if is_encoder(model.config) or model.get_output_embeddings() is None:
        raise UnsupportedArchitectureError(f"{type(model).__name__} does not predict the next token; use a causal LM")
    return model


def _device(device: str | None) -> torch.device:
    """Return the torch device; evaluate's "gpu" is CUDA, and so is the default if available."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda" if device == "gpu" else device)


def perplexity_of(mean_nll: float) -> float:
    """Compute the perplexity of a mean NLL in nats; infinite beyond the range of floats."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


perplexity = Perplexity()
