"""What a training writes into its organ's config and card."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from not_hf import DonorModel, DonorTrainer, TrainingCurve, TransplantedForCausalLM
from not_hf.recipient.trainer_card import complete_card
from testing.models import tiny_model
from testing.training import made, recipient, rows, two_organs

SETS = {"domain": rows(4, seed=1), "control": rows(4, seed=2)}
EVALUATED = {"eval_dataset": SETS, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}


def measured(trainer, name: str, step: int) -> float:
    """The perplexity of a set after a step, from the log."""
    losses = {
        logs["step"]: logs[key] for logs in trainer.state.log_history for key in [f"eval_{name}_loss"] if key in logs
    }
    return math.exp(losses[step])


@pytest.mark.slow
def test_what_the_trainer_measured_is_on_the_card(tmp_path):
    model = recipient()
    trainer = made(model, tmp_path, callbacks=[TrainingCurve()], **EVALUATED)
    trainer.train()
    config = model.donor_config["default"]
    assert config.tokens_seen == (4 + 4 + 2) * 16  # without a save
    assert {name: value["after"] for name, value in config.metrics.items()} == {
        f"{name}_perplexity": measured(trainer, name, 3) for name in SETS
    }
    trainer.save_model()
    card = (tmp_path / "run/README.md").read_text()
    assert f"| domain perplexity | – | {measured(trainer, 'domain', 3):.4g} | – |" in card
    assert "\n- domain perplexity: the evaluation set of its training, in the trainer's batches\n" in card
    assert "](training_curve.png)" in card and (tmp_path / "run/training_curve.png").exists()
    assert "Nothing was measured yet" not in card


@pytest.mark.slow
def test_ctrl_c_ends_a_training_whose_tokens_count_and_whose_numbers_no_longer_hold(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    model = recipient()
    trainer = made(model, tmp_path, **EVALUATED)
    trainer.train()
    config, before = model.donor_config["default"], (4 + 4 + 2) * 16
    assert config.metrics and config.tokens_seen == before
    with pytest.raises(KeyboardInterrupt):
        made(model, tmp_path, callbacks=[Interrupt]).train()
    config = model.donor_config["default"]
    assert config.tokens_seen == before + 2 * 4 * 16 and config.metrics is None
    with pytest.raises(KeyError):  # before its first step
        made(model, tmp_path, [{"input_ids": [1]}, {"labels": [1]}], remove_unused_columns=False).train()
    assert model.donor_config["default"].tokens_seen == before + 2 * 4 * 16


def of_logits(outputs, labels, num_items_in_batch=None):
    return outputs.logits.pow(2).mean()


def doubled(trainer, model, inputs, return_outputs=False, **options):
    loss = 2 * super(type(trainer), trainer).compute_loss(model, inputs, **options)
    return (loss, {"loss": loss}) if return_outputs else loss


@pytest.mark.slow
@pytest.mark.parametrize("cls", [DonorTrainer, Trainer])
@pytest.mark.parametrize("change", ["label_smoothing_factor", "compute_loss_func", "compute_loss", "router loss"])
def test_a_loss_that_is_not_that_of_tokens_alone_gives_no_perplexity(change, cls, tmp_path):
    model = recipient("mixtral")
    model.config.output_router_logits = change == "router loss"
    values = {"label_smoothing_factor": 0.2, "compute_loss_func": of_logits}
    options = {change: values[change]} if change in values else {}
    cls = type("Own", (cls,), {"compute_loss": doubled}) if change == "compute_loss" else cls
    trainer = made(model, tmp_path, cls=cls, **{**EVALUATED, "max_steps": 1}, **options)
    trainer.train()
    trainer.save_model()
    complete_card(trainer)
    assert "eval_domain_loss" in trainer.state.log_history[1]
    assert DonorModel.from_pretrained(tmp_path / "run").config.metrics is None
    assert "perplexity |" not in (tmp_path / "run/README.md").read_text()


@pytest.mark.slow
def test_numbers_are_of_the_weights_that_are_saved(tmp_path):
    """Of an evaluation after the last step, or of the best model where that was loaded."""
    model = recipient()
    made(model, tmp_path / "a", **{**EVALUATED, "eval_steps": 2}, save_strategy="steps", save_steps=1).train()
    saved = {n: DonorModel.from_pretrained(tmp_path / f"a/run/checkpoint-{n}").config.metrics for n in (1, 2)}
    assert saved[1] is None and saved[2] is not None
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_domain_loss", "greater_is_better": True}
    model = recipient()
    best |= {"learning_rate": 3.0}  # so that the first step is the worst
    trainer = made(model, tmp_path / "b", **EVALUATED, **best, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.state.best_global_step < 3
    found = model.donor_config["default"].metrics["domain_perplexity"]["after"]
    assert found == measured(trainer, "domain", trainer.state.best_global_step)
    assert DonorModel.from_pretrained(tmp_path / "b/run/checkpoint-3").config.metrics["domain_perplexity"][
        "after"
    ] == measured(trainer, "domain", 3)


@pytest.mark.slow
def test_numbers_from_before_the_training_go_and_those_of_others_stay(tmp_path):
    model = recipient()
    config = model.donor_config["default"]
    config.metrics = {"perplexity": {"after": 3.0}}
    trainer = made(model, tmp_path, max_steps=1, eval_dataset=rows(4, seed=1))
    trainer.evaluate(rows(4, seed=3))
    assert config.metrics == {"perplexity": {"after": 3.0}}  # nothing was trained yet
    trainer.train()
    assert config.metrics is None
    trainer.evaluate(rows(4, seed=3))  # not its evaluation set
    assert config.metrics is None
    loss = trainer.evaluate()["eval_loss"]
    assert config.metrics["perplexity"]["after"] == pytest.approx(math.exp(loss))
    config.metrics = {"accuracy": 0.5}
    trainer.evaluate()
    assert config.metrics == {"accuracy": 0.5}


def config_of(model):
    return model.donor_config["default"]


def measured_twice(trainer, change: str) -> float:
    """The organ's loss, and then that of the model with the organ switched off or at another scale."""
    loss = trainer.evaluate()["eval_loss"]
    if change == "off":
        with trainer.model.disable_donors():
            assert trainer.evaluate()["eval_loss"] != loss
    else:
        trainer.model.set_donor_scale("default", 0.5)
        assert trainer.evaluate()["eval_loss"] != loss
        assert config_of(trainer.model).metrics["perplexity"]["after"] != math.exp(loss)
        trainer.model.set_donor_scale("default", 1.0)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("change", ["off", "scale"])
def test_numbers_are_of_the_organ_as_it_is_saved(change, tmp_path):
    trainer = made(recipient(), tmp_path, max_steps=2, eval_dataset=rows(4, seed=1))
    trainer.train()
    loss = measured_twice(trainer, change)
    trainer.save_model()
    assert DonorModel.from_pretrained(tmp_path / "run").config.metrics["perplexity"]["after"] == math.exp(loss)


@pytest.mark.slow
@pytest.mark.parametrize("during", [True, False])
def test_a_trainers_card_tells_what_is_known_to_be_of_the_organ(during, tmp_path):
    """The log of a plain `Trainer` does not say whether the organ was switched off after the training."""
    evaluated = {"eval_strategy": "epoch"} if during else {}
    trainer = made(recipient(), tmp_path, cls=Trainer, max_steps=2, eval_dataset=rows(4, seed=1), **evaluated)
    trainer.train()
    loss = measured_twice(trainer, "off")
    trainer.save_model()
    complete_card(trainer)
    metrics = DonorModel.from_pretrained(tmp_path / "run").config.metrics
    assert metrics["perplexity"]["after"] == pytest.approx(math.exp(loss)) if during else metrics is None


@pytest.mark.slow
def test_a_trainers_card_tells_of_the_best_model(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_domain_loss", "greater_is_better": True}
    best |= {"learning_rate": 3.0, "save_strategy": "steps", "save_steps": 1}  # so that the first step is the worst
    trainer = made(recipient(), tmp_path, cls=Trainer, **EVALUATED, **best)
    trainer.train()
    assert trainer.state.best_global_step < 3
    trainer.save_model()
    complete_card(trainer)
    found = DonorModel.from_pretrained(tmp_path / "run").config.metrics["domain_perplexity"]["after"]
    assert found == measured(trainer, "domain", trainer.state.best_global_step)


@pytest.mark.slow
def test_each_training_of_a_trainer_counts(tmp_path):
    model = recipient()
    trainer = made(model, tmp_path, num_train_epochs=1, eval_dataset=rows(4, seed=1))
    later = made(model, tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.evaluate()
    assert config_of(model).tokens_seen == 160 and config_of(model).metrics
    trainer.train()
    assert config_of(model).tokens_seen == 2 * 160 and config_of(model).metrics is None  # measured of other weights
    later.train()
    assert config_of(model).tokens_seen == 3 * 160


@pytest.mark.slow
def test_each_model_of_model_init_has_its_own_record(tmp_path):
    options = {"max_steps": 1, "eval_dataset": rows(4), "eval_strategy": "epoch"}
    trainer = made(None, tmp_path, model_init=lambda: recipient(), **options)
    for _ in range(2):
        trainer.train()
        assert config_of(trainer.model).tokens_seen == 64 and config_of(trainer.model).metrics


@pytest.mark.slow
@pytest.mark.parametrize(("masked", "count"), [(True, 8 * 12), (False, 8 * 16)])
def test_padding_counts_only_where_no_mask_tells_it(masked, count, tmp_path, caplog):
    model, data = recipient(), rows(8)
    for row in data if masked else ():
        row["attention_mask"] = (torch.arange(16) < 12).long()
    made(model, tmp_path, data, num_train_epochs=1).train()
    assert config_of(model).tokens_seen == count and "count non-padding tokens" not in caplog.text


@pytest.mark.slow
def test_only_active_organs_were_trained(tmp_path):
    model = two_organs()
    top = model.donor_config["top"]
    top.tokens_seen, top.metrics = 5, {"perplexity": {"after": 3.0}}
    model.set_donor("low")
    trainer = made(model, tmp_path, max_steps=1, eval_dataset=rows(4))
    trainer.train()
    trainer.evaluate()
    assert model.donor_config["low"].tokens_seen == 64 and model.donor_config["low"].metrics
    assert (top.tokens_seen, top.metrics) == (5, {"perplexity": {"after": 3.0}})


@pytest.mark.slow
def test_what_trains_adapters_trains_no_organ(tmp_path):
    peft = pytest.importorskip("peft")
    model = recipient()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    trainer = made(adapted, tmp_path, max_steps=1, eval_dataset=rows(4))
    trainer.train()
    trainer.evaluate()
    assert (config_of(model).tokens_seen, config_of(model).metrics) == (None, None)


@pytest.mark.slow
def test_resuming_counts_no_token_twice(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    model = recipient()
    config_of(model).tokens_seen = 1000
    trainer = made(model, tmp_path, **options)
    trainer.train()
    assert config_of(model).tokens_seen == 1000 + 320
    checkpoint = str(tmp_path / "run/checkpoint-3")
    loaded = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), checkpoint, is_trainable=True)
    for resumed in (trainer, made(loaded, tmp_path, **options)):
        resumed.train(resume_from_checkpoint=checkpoint)
        assert config_of(resumed.model).tokens_seen == 1000 + 320


@pytest.mark.slow
def test_tokens_are_those_of_the_best_model(tmp_path):
    model = recipient()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_domain_loss", "greater_is_better": True}
    trainer = made(model, tmp_path, **EVALUATED, **best, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.state.best_global_step < 3
    assert config_of(model).tokens_seen == 64 * trainer.state.best_global_step
