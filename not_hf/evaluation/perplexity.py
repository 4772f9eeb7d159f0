"""Perplexity of a causal language model, as an `evaluate.Metric`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import datasets
import evaluate
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from not_hf.architecture.layers import eval_mode
from not_hf.errors import NotHFError
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

A text of n tokens (BOS included) is split into windows [b, min(b + max_length, n)) for b = 0, stride, 2 stride, ... up
to the first that reaches n. A window scores the tokens that no earlier window covers, each given all tokens before it
in the window. So with stride < max_length every token of a text but the first is scored exactly once, with a context
of at least max_length - stride tokens wherever the text has that many. With stride = max_length the first token of
each later window has no context and is not scored (https://huggingface.co/docs/transformers/perplexity).
Log-probabilities are computed in float32.

Returns a dict:
    perplexities (list of float): One per text: exp(its summed NLL / its number of scored tokens).
    mean_perplexity (float): Their arithmetic mean, as computed by evaluate's `perplexity`.
    perplexity (float): Of the corpus: exp(summed NLL of all texts / num_tokens), as reported in papers.
    num_tokens (int): Number of scored tokens in all texts.

Raises NotHFError for no texts, texts that are too short, no model, a live model without tokenizer, or a tokenizer
without BOS if add_start_token is True.
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
            if isinstance(predictions, str):
                raise NotHFError("predictions must be a list of texts, got a string; give predictions=[text]")
            predictions = list(predictions) or None
            for text in predictions or ():
                if not isinstance(text, str):
                    raise NotHFError(f"predictions must be a list of str, got a {type(text).__name__} in it")
        if predictions is None and self.writer is None:
            raise NotHFError("no texts to score; give predictions=[text, ...]")
        return super().compute(predictions=predictions, references=references, **kwargs)

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
    ) -> dict[str, Any]:
        model, tokenizer = load_for_texts(model, model_id, tokenizer, device)
        max_length, stride = check_lengths(model, max_length, stride, batch_size)
        texts = encode(predictions, tokenizer, add_start_token)
        nll = [0.0] * len(texts)
        num_tokens = [0] * len(texts)
        batches = batches_of(texts, max_length, stride, batch_size)
        total = sum(window.end - window.scored for batch in batches for window in batch)
        with eval_mode(model), evaluate.logging.tqdm(total=total, desc="Perplexity", unit=" tokens") as progress:
            for batch in batches:
                for window, window_nll in zip(batch, nll_of(model, texts, batch), strict=True):
                    nll[window.text] += window_nll
                    num_tokens[window.text] += window.end - window.scored
                progress.update(sum(window.end - window.scored for window in batch))
        perplexities = [perplexity_of(total / count) for total, count in zip(nll, num_tokens, strict=True)]
        return {
            "perplexities": perplexities,
            "mean_perplexity": sum(perplexities) / len(perplexities),
            "perplexity": perplexity_of(math.fsum(nll) / sum(num_tokens)),
            "num_tokens": sum(num_tokens),
        }


def default_window(model: PreTrainedModel) -> int:
    """Return the tokens per window unless `max_length` says otherwise; `stride` is half of it."""
    return int(min(1024, _context(model)))


def check_lengths(
    model: PreTrainedModel, max_length: int | None, stride: int | None, batch_size: int
) -> tuple[int, int]:
    """Check the lengths of windows, and return `max_length` and `stride` with their defaults."""
    context = _context(model)
    max_length = default_window(model) if max_length is None else max_length
    stride = max_length // 2 if stride is None else stride
    if not 2 <= max_length <= context:
        raise NotHFError(f"max_length must be between 2 and {context}, the model's context, got {max_length}")
    if not 1 <= stride <= max_length:
        raise NotHFError(f"stride must be between 1 and {max_length}, the max_length, got {stride}")
    if batch_size < 1:
        raise NotHFError(f"batch_size must be at least 1, got {batch_size}")
    return max_length, stride


def _context(model: PreTrainedModel) -> float:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


class Window(NamedTuple):
    """Tokens `[begin, end)` of a text, of which `[scored, end)` are scored; begin < scored."""

    text: int
    begin: int
    scored: int
    end: int


def batches_of(texts: list[list[int]], max_length: int, stride: int, batch_size: int) -> list[list[Window]]:
    """Split texts into windows, and group these into batches."""
    windows = [w for i, ids in enumerate(texts) for w in _windows(i, len(ids), max_length, stride)]
    windows.sort(key=lambda w: w.begin - w.end)  # longest first: little padding, early out-of-memory
    return [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]


def _windows(text: int, num_tokens: int, max_length: int, stride: int) -> Iterator[Window]:
    """Yield the windows of a text that score at least one token."""
    covered = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + max_length, num_tokens)
        scored = max(covered, begin + 1)  # the first token of a window has no context
        if scored < end:
            yield Window(text, begin, scored, end)
        covered = end


@torch.inference_mode()
def nll_of(model: PreTrainedModel, texts: list[list[int]], batch: list[Window]) -> list[float]:
    """Sum the negative log-likelihood (nats) of the scored tokens of each window."""
    longest = max(window.end - window.begin for window in batch)
    # padded on the right with any id: positions count from 0, and causal attention never reaches the padding
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)  # (batch, seq)
    for row, window in enumerate(batch):
        length = window.end - window.begin
        input_ids[row, :length] = torch.tensor(texts[window.text][window.begin : window.end])
        attention_mask[row, :length] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (batch, seq, vocab)
    sums = []
    for row, window in enumerate(batch):  # only one row of float32 logits at a time
        scored = slice(window.scored - window.begin, window.end - window.begin)
        predicting = slice(scored.start - 1, scored.stop - 1)
        targets = input_ids[row, scored].to(logits.device)
        sums.append(torch.nn.functional.cross_entropy(logits[row, predicting].float(), targets, reduction="sum"))
    return torch.stack(sums).tolist()


def encode(predictions: list[str], tokenizer: PreTrainedTokenizerBase, add_start_token: bool) -> list[list[int]]:
    """Tokenize texts without special tokens, except BOS if `add_start_token`."""
    bos = tokenizer.bos_token_id
    if add_start_token and bos is None:
        raise NotHFError("the tokenizer has no BOS token; pass add_start_token=False, or set tokenizer.bos_token")
    start = [bos] if add_start_token else []
    texts = []
    for i in range(0, len(predictions), 1000):  # a fast tokenizer's encodings take far more memory than their ids
        texts += tokenizer(predictions[i : i + 1000], add_special_tokens=False, verbose=False)["input_ids"]
    texts = [start + list(ids) for ids in texts]
    if short := [i for i, ids in enumerate(texts) if len(ids) < 2]:
        hint = "remove empty texts" if add_start_token else "remove them, or pass add_start_token=True"
        raise NotHFError(f"{len(short)} of {len(texts)} texts have no token to score, first: {short[0]}; {hint}")
    return texts


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
    loaded: Any = source
    if isinstance(source, torch.nn.Module):
        if tokenizer is None:
            raise NotHFError("a live model needs its tokenizer; pass tokenizer=")
        if device is not None and _device(device).type != source.device.type:
            raise NotHFError(f"the model is on {source.device}, not {device}; move it with model.to({device!r}) first")
    else:
        tokenizer = source if tokenizer is None else tokenizer
        loaded = load_model(source, device)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return loaded, tokenizer


def load_model(source: str, device: str | None = None) -> PreTrainedModel:
    """Load a model that writes text, or a donor, from a Hub ID or folder onto a device; default CUDA if available."""
    native: Any = writing_class(source).native_auto_class
    return cast(PreTrainedModel, native.from_pretrained(source).to(_device(device)))


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
