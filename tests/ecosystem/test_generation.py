"""Ways to generate with a transplanted model: assisted, batched, streamed, by pipeline."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer, TextStreamer, pipeline

from not_hf import TransplantedForCausalLM
from testing.donors import organ
from testing.models import tiny_tokenizer
from testing.releases import since

GREEDY = {"max_new_tokens": 10, "do_sample": False}
PROMPTS = ["w5 w6 w7 w8 w9 w10", "w30 w31", "w12 w13 w14 w15 w12 w13 w14"]  # of different lengths


@pytest.fixture(scope="module", params=["llama", "opt", "gemma3_text"])
def model_type(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(model_type, base_folder) -> str:
    return str(base_folder(model_type))


@pytest.fixture
def model(base) -> TransplantedForCausalLM:
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 2), donor_name="kjv").eval()
    model.generation_config.eos_token_id = None  # greedy runs to the length asked for
    return model


def batch(side: str = "left") -> dict[str, torch.Tensor]:
    return tiny_tokenizer()(PROMPTS, padding=True, padding_side=side, return_tensors="pt")


@pytest.fixture
def prompt() -> torch.Tensor:
    return tiny_tokenizer()(PROMPTS[2], return_tensors="pt").input_ids


@pytest.mark.slow
def test_an_assistant_changes_nothing_but_time(base, model, prompt):
    plain = model.generate(prompt, **GREEDY)
    native = AutoModelForCausalLM.from_pretrained(base).eval()
    native.generation_config.eos_token_id = None
    alone = native.generate(prompt, **GREEDY)
    assert plain.tolist() != alone.tolist()
    assert model.generate(prompt, assistant_model=native, **GREEDY).tolist() == plain.tolist()
    assert native.generate(prompt, assistant_model=model, **GREEDY).tolist() == alone.tolist()
    with model.disable_donors():  # as an assistant of another base it is the base
        assert native.generate(prompt, assistant_model=model, **GREEDY).tolist() == alone.tolist()


@since("transformers", "5.16", "it looks up prompts only where there is a token that ends a text")
def test_prompt_lookup_changes_nothing_but_time(model, prompt):
    plain = model.generate(prompt, **GREEDY)
    assert model.generate(prompt, prompt_lookup_num_tokens=2, **GREEDY).tolist() == plain.tolist()


def test_a_padded_batch_is_its_prompts_one_by_one(model):
    inputs = batch()
    together = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids = tiny_tokenizer()(prompt, return_tensors="pt").input_ids
        assert found.tolist() == model.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist()


WAYS = {
    "beams": {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "num_return_sequences": 2},
    "samples": {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3, "top_k": 20},
    "static cache": {"cache_implementation": "static", **GREEDY},
    "no cache": {"use_cache": False, **GREEDY},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, **GREEDY},
}


@pytest.mark.parametrize("way", WAYS)
def test_any_way_gives_what_the_merged_model_gives(model, way, tmp_path):
    torch.manual_seed(0)
    found = model.generate(**batch(), **WAYS[way])
    model.merge_and_unload().save_pretrained(tmp_path)
    native = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.manual_seed(0)
    assert found.tolist() == native.generate(**batch(), **WAYS[way]).tolist()


@pytest.mark.parametrize("stack", [["kjv"], []])
def test_streams(model, prompt, stack, capsys):
    model.set_donor(stack)
    tokenizer = tiny_tokenizer()
    expected = tokenizer.decode(model.generate(prompt, **GREEDY)[0, prompt.shape[1] :])
    model.generate(prompt, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.strip() == expected

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, args=(prompt,), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == expected and len(pieces) > 5


@pytest.mark.slow
def test_pipeline_in_batches_and_streamed(base, model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path), device_map="cpu")
    assert pipe.model.active_donors and isinstance(pipe.model, TransplantedForCausalLM)
    pipe.model.generation_config.eos_token_id = None
    pipe.tokenizer.padding_side = "left"
    options = {"return_full_text": False, **GREEDY}
    together = pipe(PROMPTS, batch_size=3, **options)
    for prompt, (found,) in zip(PROMPTS, together, strict=True):
        ids = tiny_tokenizer()(prompt, return_tensors="pt").input_ids
        expected = tiny_tokenizer().decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :], skip_special_tokens=True)
        assert found["generated_text"].strip() == expected
        capsys.readouterr()
        streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
        pipe(prompt, streamer=streamer, **options)
        assert capsys.readouterr().out.strip() == expected
