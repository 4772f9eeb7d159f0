"""Twins are shared, by what their config says and by what they are needed as."""

from __future__ import annotations

from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from not_hf.architecture.twin import meta_twin
from testing.models import tiny_config


def test_a_model_without_a_head_does_not_stand_for_a_language_model():
    config = tiny_config("llama", hidden_size=48)
    for other in (LlamaModel, LlamaForSequenceClassification):
        assert type(meta_twin(config, other).model) is other
    twin = meta_twin(config)
    assert type(twin.model) is LlamaForCausalLM
    assert meta_twin(config) is meta_twin(config, LlamaForCausalLM) is twin


def test_one_that_was_asked_for_by_class_is_shared():
    config = tiny_config("llama", hidden_size=56)
    assert meta_twin(config, LlamaForCausalLM) is meta_twin(config)
