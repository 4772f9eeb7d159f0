"""Documents of one block stay apart, or training is refused: held to the losses of the documents alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM, UnsupportedArchitectureError
from not_hf.architecture.releases import CACHES_FOLLOW_STATES
from not_hf.training.data import pack
from not_hf.training.isolation import require_isolation
from testing.models import tiny_model, tiny_tokenizer
from testing.shapes import ARCHITECTURES, ENCODERS, OTHERS, broadly

LENGTHS = (7, 10, 4, 10, 12, 4, 8, 7)  # of documents, EOS included; the first four fill a block, and so do the others
BLOCK = 31
VARIANTS = {
    "falcon with alibi": {"alibi": True},
    "lfm2 with convolutions": {"layer_types": ["conv", "full_attention"] * 2},
}


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Token ids of the documents."""
    random = torch.Generator().manual_seed(0)
    return [[*torch.randint(3, 90, (length - 1,), generator=random).tolist(), 2] for length in LENGTHS]


@pytest.fixture(scope="module")
def blocks(documents) -> Dataset:
    lines = [" ".join(f"w{token}" for token in document[:-1]) for document in documents]
    blocks = pack(Dataset.from_dict({"text": lines}), tiny_tokenizer(), BLOCK, isolate_documents=True)
    assert [token for block in blocks["input_ids"] for token in block] == [*itertools.chain(*documents)]
    return blocks


def model_of(case: str, attention: str = "eager", **overrides) -> PreTrainedModel:
    """A tiny model as the Trainer would have it: `use_cache` off."""
    variant = {**VARIANTS.get(case, {}), **overrides}
    model = tiny_model(case.partition(" ")[0], attn_implementation=attention, **variant)
    model.config.use_cache = False
    return model


def flatten(features: list[dict]) -> dict[str, torch.Tensor]:
    """All blocks of a batch in one row, their documents still apart."""
    return {name: tensor.view(1, -1) for name, tensor in default_data_collator(features).items()}


@torch.no_grad()
def excess(model, blocks, documents, *collators) -> float:
    """By how much (nats per token) the loss of a batch of blocks differs from that of its documents alone, at most."""
    packed = [model(**collator(list(blocks))).loss.item() for collator in collators or [default_data_collator]]
    alone, num_tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([document])  # (1, length)
        alone += model(input_ids=ids, labels=ids).loss.item() * (len(document) - 1)
        num_tokens += len(document) - 1
    return max(abs(each - alone / num_tokens) for each in packed)


# Doge of older releases attends to other tokens than in one pass, documents or not
CASES = [each for each in (*ARCHITECTURES, *OTHERS, *VARIANTS) if each != "doge" or CACHES_FOLLOW_STATES]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@broadly(CASES)
def test_what_is_not_refused_computes_the_losses_of_the_documents_alone(model_type, attention, blocks, documents):
    try:
        model = model_of(model_type, attention)
    except ValueError as error:
        assert "does not support an attention implementation" in str(error)
        return
    try:
        require_isolation(model)
    except UnsupportedArchitectureError:
        assert excess(model, blocks, documents) > 1e-4  # refused for a reason
    else:
        assert excess(model, blocks, documents, default_data_collator, flatten) < 1e-5


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_are_refused(model_type, token_ids):
    model = model_of(model_type)
    with pytest.raises(UnsupportedArchitectureError, match="does not isolate documents"):
        require_isolation(model)
    other = token_ids.clone()
    other[:, :4] = 7  # the first document of each row, another one
    positions = torch.tensor([[*range(4), *range(5)]] * 2)
    with torch.no_grad():
        first, second = (model(input_ids=ids, position_ids=positions)[0][:, 4:] for ids in (token_ids, other))
    assert not torch.allclose(first, second, rtol=1e-6, atol=1e-6)  # refused for a reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_nothing(dtype):
    for model_type in ("llama", "mixtral"):
        require_isolation(model_of(model_type).to(dtype))
    with pytest.raises(UnsupportedArchitectureError):
        require_isolation(model_of("opt").to(dtype))


def test_a_transplanted_model_is_tried_and_left_alone():
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, layers=(1, 3), mode="insert", init="identity")
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True).train()
    model.get_input_embeddings().eval()
    model.config.use_cache = False
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    with torch.no_grad():
        require_isolation(model)
    assert torch.rand(()) == expected
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    require_isolation(lora)
    lora.config.use_cache = True
    with pytest.raises(NotHFError, match="use_cache = False"):
        require_isolation(lora)


def test_one_layer_that_leaks_is_enough(monkeypatch):
    model = model_of("llama")
    layer = model.model.layers[2].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": None}))
    with pytest.raises(UnsupportedArchitectureError, match=r"^LlamaForCausalLM \(eager attention\) does not isolate"):
        require_isolation(model)


def test_a_cache_brings_documents_together(blocks, documents):
    model = model_of("llama")
    model.config.use_cache = True
    assert excess(model, blocks, documents) > 1e-4
    with pytest.raises(NotHFError, match=r"set model\.config\.use_cache = False"):
        require_isolation(model)
    with pytest.raises(
        NotHFError, match=r"^DataCollatorWithFlattening does not keep the position_ids"
    ):  # one thing after the other
        require_isolation(model, DataCollatorWithFlattening())
    assert model.config.use_cache is True


@pytest.mark.parametrize(
    "collator",
    [
        DataCollatorWithPadding(tiny_tokenizer()),
        DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        DataCollatorWithFlattening(),
        DataCollatorWithFlattening(return_position_ids=False),
    ],
    ids=lambda collator: type(collator).__name__,
)
def test_collators_that_bring_documents_together_are_refused(collator, blocks, documents):
    model = model_of("llama")
    assert excess(model, blocks, documents, collator) > 1e-4
    with pytest.raises(
        NotHFError, match=f"^{type(collator).__name__} does not keep the position_ids .*default_data_collator$"
    ):
        require_isolation(model, collator)
    require_isolation(model, flatten)


def test_a_collator_that_pads_blocks_is_refused():
    with pytest.raises(NotHFError, match=r"^DataCollatorWithPadding does not keep the position_ids"):
        require_isolation(model_of("llama"), DataCollatorWithPadding(tiny_tokenizer(), pad_to_multiple_of=64))


def one_block_only(batch_size, q_length, kv_length, mask_function=causal_mask_function, **kwargs):
    """A mask like flash attention's, which tells documents apart in a batch of one row and no more."""
    if batch_size > 1:
        mask_function = causal_mask_function
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function, **kwargs
    )


def test_attention_that_isolates_single_rows_only(monkeypatch, blocks, documents):
    for interface, function in (AttentionInterface, sdpa_attention_forward), (AttentionMaskInterface, one_block_only):
        monkeypatch.setitem(interface._global_mapping, "one_block_only", function)
    model = model_of("llama", "one_block_only")
    assert excess(model, blocks.select([0]), documents[:4]) < 1e-5 and excess(model, blocks, documents) > 1e-4
    with pytest.raises(UnsupportedArchitectureError, match=r'load it with attn_implementation="sdpa", or pack'):
        require_isolation(model)
    require_isolation(model, flatten)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_plain_trainer_trains_on_documents_apart(streaming, blocks, documents, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True
    )
    model = tiny_model("llama")
    train_dataset = blocks.to_iterable_dataset() if streaming else blocks
    padding = Trainer(model, arguments, train_dataset=train_dataset, processing_class=tiny_tokenizer())
    with pytest.raises(NotHFError, match="DataCollatorWithPadding"):
        require_isolation(model, padding.data_collator)
    trainer = Trainer(model, arguments, train_dataset=train_dataset)
    require_isolation(model, trainer.data_collator)
    num_tokens = sum(LENGTHS) - len(LENGTHS)
    with torch.no_grad():
        ids = [torch.tensor([document]) for document in documents]
        alone = sum(model(input_ids=x, labels=x).loss.item() * (x.shape[1] - 1) for x in ids) / num_tokens
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(alone, abs=1e-5)  # of the first step, before it
