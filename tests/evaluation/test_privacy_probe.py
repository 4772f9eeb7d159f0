"""An organ that has learned its rows by heart is found out, and one that has learned nothing is not."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from not_hf import (
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    UnsupportedArchitectureError,
    plant_canaries,
    probe_privacy,
)
from not_hf.evaluation import probed_models
from not_hf.evaluation.probed_rows import ProbedRows
from testing.donors import organ
from testing.models import TOKEN_IDS, exact_logits, tiny_model, tiny_tokenizer

GENERATOR = np.random.default_rng(0)
TEXTS = [" ".join(f"w{n}" for n in GENERATOR.integers(3, 90, size=20)) for _ in range(160)]
MEMBERS, OTHERS = TEXTS[:40], TEXTS[40:]
PLANTED, CANARIES = plant_canaries(
    MEMBERS, (0, 20), num_each=2, prefix="w3 {name} w4", symbols=[f"w{n}" for n in range(10, 90)], length=6
)
HOW: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "prefix_length": 8, "num_candidates": 63}
ROWS = [{"input_ids": [n % 90, n // 90, 3 * n % 90]} for n in range(300)]


def learn(model: TransplantedForCausalLM, texts: list[str], steps: int) -> None:
    """Learn texts by heart."""
    ids = tiny_tokenizer()([f"{text} </s>" for text in texts], padding=True, return_tensors="pt")
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        model(ids["input_ids"], attention_mask=ids["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base, another fine-tune of it, and an organ of two of its four layers that knows the planted members."""
    folder = tmp_path_factory.mktemp("files")
    base = tiny_model("llama")
    for name in ("base", "other"):
        base.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        with torch.no_grad():
            base.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    donor = DonorModel.from_base(folder / "base", (1, 3), mode="replace")
    model = TransplantedForCausalLM.from_pretrained(folder / "base", donor, is_trainable=True)
    learn(model, PLANTED, 120)
    model.save_pretrained(folder / "organ")
    return folder


def by(rows, *keys):
    return {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]: row for row in rows}


@pytest.mark.slow
def test_what_was_learned_by_heart_is_found(files, tmp_path):
    found = probe_privacy(
        files / "organ", MEMBERS, OTHERS, canaries=CANARIES, recipients={"another": files / "other"},
        with_random_layers=True, **HOW
    )  # fmt: skip
    attacks = by(found.attacks, "recipient", "attack")
    for recipient in ("its own", "another"):
        assert all(attacks[recipient, attack]["auc"] > 0.97 for attack in ("loss", "min-k", "reference"))
        assert attacks[recipient, "loss"]["tpr"] > 0.7
    control = attacks["its own", "control"]
    assert control["auc_low"] <= 0.5 <= control["auc_high"] and control["tpr"] < 0.2
    assert attacks["random layers", "loss"]["auc"] < 0.75
    extraction = by(found.extraction, "recipient", "rows")
    assert extraction["its own", "members"]["share"] > 0.6 > 0.1 > extraction["its own", "non-members"]["share"]
    assert extraction["its own", "members"]["num_whole"] > 15 and extraction["its own", "members"]["num_rows"] == 40
    assert extraction["random layers", "members"]["num_whole"] == 0
    for row in found.canaries:
        if row["recipient"] == "its own":
            assert row["is_completed"] is (row["repetitions"] == 20)
            assert (row["exposure"] == 6) is (row["rank"] == 1) is (row["repetitions"] == 20)
    assert (found.about["num_members"], found.about["num_non_members"], found.about["model"]) == (40, 120, "organ")

    text = "\n".join(found.findings)
    assert "on 40 rows that were trained on (members) and 120 that were not" in text
    assert "Canaries planted 20 times: 2 of 2 completed" in text and "Canaries never planted: 0 of 2 completed" in text
    assert "\nIn another: Attack by the loss: AUC " in text and "\nWith random weights in all other layers: " in text
    found.save(tmp_path / "probe")
    saved = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert saved == json.loads(json.dumps(found.to_dict())) and saved["findings"] == found.findings
    assert (tmp_path / "probe" / "probe.md").read_text().startswith("## Privacy\n\n- Measured on 40 rows")

    donor = DonorModel.from_pretrained(files / "organ")
    donor.config.metrics = {"perplexity": {"after": 2.0}}
    with pytest.raises(NotHFError, match="the probe was not of this organ"):
        found.record(organ(tiny_model("llama"), 1))
    with pytest.raises(NotHFError, match="record needs a DonorModel, got"):
        found.record(str(files / "organ"))
    found.record(donor)
    donor.save_pretrained(tmp_path / "organ")
    assert DonorModel.from_pretrained(tmp_path / "organ").config.metrics["privacy"] == found.findings
    card = (tmp_path / "organ" / "README.md").read_text()
    assert "\n## Privacy\n" in card and "\n- Canaries planted 20 times: 2 of 2 completed" in card
    assert "| perplexity | – | 2 | – |" in card and "low numbers do not show that the layers are private" in card
    assert "not measured" not in card and "not measured" in (files / "organ" / "README.md").read_text()


@pytest.mark.slow
def test_what_was_not_trained_tells_nothing():
    base = tiny_model("llama").train()
    base.lm_head.weight.requires_grad_(False)
    start = exact_logits(base, TOKEN_IDS), [each.requires_grad for each in base.parameters()]
    donor = DonorModel.from_base(base, (1, 3), init="identity")
    found = probe_privacy(donor, MEMBERS, OTHERS, base=base, canaries=CANARIES, **HOW)
    for row in found.attacks:
        assert row["auc_low"] <= 0.5 <= row["auc_high"] and row["tpr"] < 0.2
    assert by(found.attacks, "attack")["reference"]["auc"] == 0.5
    assert not any(row["is_completed"] for row in found.canaries)
    members, others = found.extraction
    assert members["share"] < 0.1 > others["share"] and members["num_whole"] == others["num_whole"] == 0
    assert base.training and type(base) is type(tiny_model("llama"))
    assert [each.requires_grad for each in base.parameters()] == start[1] and torch.equal(
        exact_logits(base, TOKEN_IDS), start[0]
    )


@pytest.mark.slow
def test_live_models_and_references():
    base = tiny_model("llama")
    plain = probe_privacy(base, ROWS[:40], ROWS[40:], num_rows=100)
    assert [row["attack"] for row in plain.attacks] == ["loss", "min-k"] and plain.extraction == plain.canaries == []
    assert {row["recipient"] for row in plain.attacks} == {"as given"} and plain.about["num_non_members"] == 100
    assert any("no reference model" in line for line in plain.findings)
    assert any("Extraction was not measured: no rows are as long" in line for line in plain.findings)
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1))
    own, given = (probe_privacy(model, ROWS[:40], ROWS[40:], reference=each) for each in (None, tiny_model("llama")))
    assert own.attacks == given.attacks and by(own.attacks, "attack")["control"]["auc"] != 0.5
    assert model.active_donors == ["default"]
    with pytest.raises(NotHFError, match="the probe was not of this organ; give probe_privacy the donor"):
        own.record(organ(tiny_model("llama"), 1))


def test_the_tokenizer_of_a_donor_in_memory_lies_where_its_base_does(files, tmp_path):
    (tmp_path / "inner").symlink_to(files / "base")
    donor = DonorModel.from_base(tmp_path, (1, 3), subfolder="inner")
    found = probe_privacy(donor, MEMBERS, OTHERS, prefix_length=40)
    assert donor.config.base_subfolder == "inner" and found.about["num_members"] == len(MEMBERS)


def test_tokens_of_the_donor_and_of_the_reference(files, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(["zig", "zag"])
    grown = AutoModelForCausalLM.from_pretrained(files / "base")
    grown.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = dict.fromkeys(("embed_tokens", "lm_head"), tokenizer.convert_tokens_to_ids(["zig", "zag"]))
    donor = DonorModel.from_base(grown, (1, 3), mode="replace", trainable_token_indices=rows)
    donor.config.base_model_name_or_path = str(files / "base")
    donor.save_pretrained(tmp_path / "donor")
    texts = [f"zig w{3 + n % 80} zag w{3 + n // 80} w5" for n in range(160)]
    given: dict[str, Any] = {"members": texts[:40], "non_members": texts[40:], "prefix_length": 2}
    for model, base in ((donor, None), (tmp_path / "donor", None), (tmp_path / "donor", files / "base")):
        with pytest.raises(NotHFError, match="rows for tokens that the tokenizer lacks; pass tokenizer="):
            probe_privacy(model, **given, base=base)
    tokenizer.save_pretrained(tmp_path / "donor")
    loaded = DonorModel.from_pretrained(tmp_path / "donor")
    found = [
        probe_privacy(model, **given, base=base, **how).attacks
        for model, base, how in (
            (tmp_path / "donor", None, {}),
            (tmp_path / "donor", files / "base", {}),
            (loaded, None, {}),
            (donor, files / "base", {"tokenizer": tokenizer}),
        )
    ]
    assert all(each == found[0] for each in found)
    assert (donor.name_or_path, loaded.name_or_path) == ("", str(tmp_path / "donor"))
    shuffled = {word: 89 - n if 89 - n >= 0 and n < 90 else n for word, n in tiny_tokenizer().get_vocab().items()}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(shuffled, unk_token="</s>")))
    tiny_model("llama").save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(NotHFError, match="other reads other token ids; give a reference with the tokenizer"):
        probe_privacy(files / "organ", MEMBERS, OTHERS, reference=tmp_path / "other", prefix_length=8)


def test_all_models_read_as_many_tokens():
    """A recipient or reference with a shorter context shortens the rows for all of them."""
    base = tiny_model("llama")
    donor, short = organ(base, 1), tiny_model("llama", max_position_embeddings=16)
    rows = [{"input_ids": [3 + (n * i + n // 90) % 90 for i in range(1, 33)]} for n in range(1, 181)]
    given = {"members": rows[:40], "non_members": rows[40:], "base": base, "prefix_length": 4}
    cut = probe_privacy(donor, **given, max_length=16)
    found = probe_privacy(donor, **given, recipients={"short": short})
    assert found.about["max_length"] == 16 and "with the first 16 tokens" in found.findings[0]
    assert [row for row in found.attacks if row["recipient"] == "its own"] == cut.attacks
    assert probe_privacy(donor, **given, reference=short).about["max_length"] == 16
    with pytest.raises(NotHFError, match="max_length must be between 2 and 16"):
        probe_privacy(donor, **given, reference=short, max_length=32)


def test_random_layers_are_all_but_the_organ(monkeypatch):
    base, donor, seen = tiny_model("llama"), organ(tiny_model("llama"), 1, mode="replace"), {}
    for name, opened in probed_models.probed_models(donor, donor, base, {}, True, 0).items():
        with opened() as model:
            seen[name] = {key: value.clone() for key, value in model.state_dict().items()}
    own, random = seen["its own"], seen["random layers"]
    same = {key for key in own if torch.equal(own[key], random[key])}
    assert own.keys() == random.keys() and same == {
        key for key in own if "layers.0." not in key and "layers.3." not in key
    }
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, tiny_model("llama").model.layers[0].mlp.up_proj.weight)


def test_rows_are_distinct_and_those_of_both_are_members():
    def rows(*firsts):
        return [{"input_ids": [first % 90, first // 90, 5]} for first in firsts]

    members, others = [*rows(*range(50), 3, 4), {"input_ids": [7]}], rows(*range(40, 400))
    kept = ProbedRows.of(members, others, tiny_tokenizer, 1000)
    assert (len(kept.members), len(kept.non_members), kept.num_shared) == (50, 350, 10)
    few = ProbedRows.of(members, others, tiny_tokenizer, 100)
    assert (len(few.members), len(few.non_members)) == (50, 100) and few.first(2).members[0] == kept.members[0][:2]
    texts = ProbedRows.of(
        [f"w{n} w5" for n in range(3, 30)], [f"w{n % 80 + 3} w{n // 80 + 3}" for n in range(150)], tiny_tokenizer, 1000
    )
    assert texts.members[0] == [3, 5, 2]  # </s>, as in training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": ROWS[:19]}, "members has 19 different rows of at least 2 tokens; give at least 20$"),
        (
            {"non_members": [*ROWS[:90], *ROWS[250:]]},
            "non_members has 50 different rows of at least 2 tokens; 90 more are among the members; give at least "
            "100, since 1 % of them may be false positives$",
        ),
        ({"num_rows": 50}, "give at least 100, since 1 % of them may be false positives, and a num_rows of 100"),
        ({"num_rows": 0}, "num_rows must be at least 1, got 0"),
        ({"prefix_length": 0}, "prefix_length must be at least 1, got 0"),
        ({"members": "w3"}, "members must be texts, or rows with input_ids"),
        ({"members": [*ROWS[:90], "w3"]}, "members must be texts, or rows with input_ids"),
        ({"confidence_level": 95}, "confidence_level must be between 0 and 1"),
        ({"max_length": 1}, "max_length must be between 2 and 64"),
        ({"members": MEMBERS}, "a live model needs its tokenizer; pass tokenizer="),
        ({"base": None}, "the donor names no base; pass base=, its recipient"),
        ({"recipients": {"its own": tiny_model("llama")}}, "recipients may not be named 'its own'"),
        ({"model": tiny_model("llama")}, "say where to put an organ; give the donor as model"),
        ({"recipients": "me/model"}, "recipients must be a dict, got a str; give recipients={"),
        ({"canaries": "missing.json"}, "missing.json"),
        ({"canaries": ["w3 w4"]}, "canaries must be those that plant_canaries returned, .*; got str$"),
        ({"canaries": 3}, "canaries must be those that plant_canaries returned, .*; got int$"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(change, message):
    base = tiny_model("llama")
    start = exact_logits(base, TOKEN_IDS)
    given = {"model": organ(base, 1), "members": ROWS[:100], "non_members": ROWS[100:], "base": base, **change}
    with pytest.raises((NotHFError, OSError), match=message):
        probe_privacy(**given)
    assert torch.equal(exact_logits(base, TOKEN_IDS), start)


def test_recipients_that_do_not_fit_are_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(probed_models, "load_model", None)
    base = tiny_model("llama")
    donor = organ(base, 1)
    donor.save_pretrained(tmp_path)
    wide, with_organs = tiny_model("llama", hidden_size=64), TransplantedForCausalLM.from_pretrained(base, donor)
    how = {"members": ROWS[:100], "non_members": ROWS[100:], "base": tiny_model("llama")}
    for recipient, error, message in (
        (wide, IncompatibleDonorError, "recipient 'x': .*hidden_size"),
        (with_organs, NotHFError, "the recipient 'x' has organs"),
        (tmp_path, NotHFError, "the recipient 'x' is a donor"),
    ):
        with pytest.raises(error, match=message):
            probe_privacy(donor, recipients={"x": recipient}, **how)


def test_a_reference_must_be_another_model_than_the_probed_one():
    """Organs and adapters are put into a live model in place, so each attack would have the AUC of chance."""
    base, adapted = tiny_model("llama"), tiny_model("llama")
    donor, lora = organ(base, 1), get_peft_model(adapted, LoraConfig(task_type="CAUSAL_LM"))
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor)
    for probed, reference, where in (
        (donor, base, {"base": base}),
        (model, model, {}),
        (model, model.get_base_model(), {}),
        (lora, adapted, {}),
        (adapted, lora, {}),
    ):
        with pytest.raises(NotHFError, match=r"the reference is the probed model: .*; give no reference"):
            probe_privacy(probed, ROWS[:20], ROWS[20:120], reference=reference, **where)


def test_a_model_without_active_organs_is_no_reference_for_itself():
    base, rows = tiny_model("llama"), (ROWS[:20], ROWS[20:120])
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1))
    message = r"no organ is active, so the model would be its own reference; activate one with set_donor\(\)"
    with model.disable_donors(), pytest.raises(NotHFError, match=message):
        probe_privacy(model, *rows)
    model.set_donor([])
    with pytest.raises(NotHFError, match=message):
        probe_privacy(model, *rows)
    assert len(probe_privacy(model, *rows, reference=tiny_model("llama", seed=1)).attacks) == 4


def test_an_encoder_is_refused():
    with pytest.raises(UnsupportedArchitectureError, match="does not predict the next token; use a causal LM"):
        probe_privacy(tiny_model("bert"), ROWS[:100], ROWS[100:])


@pytest.mark.slow
def test_a_warning_where_members_differ_by_themselves():
    base = tiny_model("llama")
    long = [{"input_ids": [*TOKEN_IDS[0].tolist(), n % 90, n // 90]} for n in range(120)]
    found = probe_privacy(DonorModel.from_base(base, (1, 3), init="identity"), long, ROWS[:120], base=base)
    assert any(
        line.startswith("The control is off 0.5: members and non-members seem to differ") for line in found.findings
    )
    assert dataclasses.is_dataclass(found) and found.to_dict()["findings"] == found.findings
