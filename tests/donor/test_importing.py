"""Pickled layers become organs, however they are laid out; what is no set of layers, or no data at all, is refused."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from local_hub import Hub
from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    check_compatibility,
    import_checkpoint,
)
from testing.commands import invoke, is_one_line
from testing.donors import same
from testing.models import tiny_model
from testing.pickles import (
    ABSOLUTE,
    FIRST,
    FROM_MODEL,
    LAST,
    RELATIVE,
    SPAN,
    Layers,
    flat,
    layers_of,
    save,
    trained,
)

MODEL_TYPES = ("gpt2", "llama", "gpt_oss", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def cut() -> Callable[[str], DonorModel]:
    """What is to come out: the same layers, cut from the trained model."""
    made: dict[str, DonorModel] = {}

    def organ(model_type: str) -> DonorModel:
        if model_type not in made:
            made[model_type] = DonorModel.from_base(trained(model_type), SPAN)
        return made[model_type]

    return organ


@pytest.fixture(scope="module")
def checkpoints(hub: Hub, tmp_path_factory) -> str:
    """A gated repo as the author's: one folder per base, each with bare layers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model_type, layout in (
        ("gpt2", "gpt2", ABSOLUTE["dict by number"]),
        ("tinyllama", "llama", RELATIVE["list"]),
        ("gptoss", "gpt_oss", RELATIVE["nested"]),
    ):
        (folder / name).mkdir()
        save(layout(layers_of(model_type)), folder / name)
    repo = HfApi().create_repo("me/organ-checkpoints").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=folder)
    for user in ("stranger", "reader"):
        hub.add_user(user, token=f"hf_{user}")
    hub.gate(repo, users=("reader",))
    return repo


@pytest.fixture(scope="module")
def computed(cut, base_folder, token_ids) -> Callable[[str], torch.Tensor]:
    """What a base computes with the layers of `cut` in front of its own, `(batch, seq, vocab)`."""

    @functools.cache
    def logits(model_type: str) -> torch.Tensor:
        model = TransplantedForCausalLM.from_pretrained(base_folder(model_type), cut(model_type), position=0)
        found = model(token_ids).logits
        assert not torch.equal(found, tiny_model(model_type)(token_ids).logits)
        return found

    return logits


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type",
    [each if each == "llama" else pytest.param(each, marks=pytest.mark.slow) for each in MODEL_TYPES],
)
@pytest.mark.parametrize("layout", [*ABSOLUTE, *RELATIVE, *FROM_MODEL])
def test_every_layout_gives_the_organ_that_a_cut_gives(
    layout, model_type, cut, computed, base_folder, tmp_path, token_ids
):
    if layout in FROM_MODEL:
        content = FROM_MODEL[layout](model_type)
    else:
        content = {**ABSOLUTE, **RELATIVE}[layout](layers_of(model_type))
    file = save(content, tmp_path)
    base, expected = base_folder(model_type), cut(model_type)
    found = import_checkpoint(file, base, SPAN)
    assert same(found, expected)
    if layout in (*RELATIVE, "module list"):
        with pytest.raises(NotHFError, match=r"layers=\(i, i \+ 2\)") as raised:
            import_checkpoint(file, base)
        assert is_one_line(raised.value)
    else:
        assert import_checkpoint(file, base).config.layers == list(SPAN)
    model = TransplantedForCausalLM.from_pretrained(base, found, position=0)
    assert torch.equal(model(token_ids).logits, computed(model_type))


def test_one_layer_needs_no_number(cut, base_folder, tmp_path):
    file = save({"epoch": 3, **layers_of("llama")[0]}, tmp_path)
    found = import_checkpoint(file, base_folder("llama"), (FIRST, FIRST + 1))
    assert torch.equal(found.stack.layers[0].mlp.up_proj.weight, cut("llama").stack.layers[0].mlp.up_proj.weight)
    with pytest.raises(NotHFError, match=r"layers=\(i, i \+ 1\)"):
        import_checkpoint(file, base_folder("llama"))


@pytest.mark.parametrize("model_type", ("mixtral", "qwen3_moe", "gpt_oss", "llama"))
def test_names_as_on_the_hub(model_type, cut, base_folder, tmp_path):
    """Each expert by itself, where a model keeps them so on the Hub but not in memory."""
    trained(model_type).save_pretrained(tmp_path / "trained")
    stored = load_file(tmp_path / "trained" / "model.safetensors")
    layers = {key: tensor for key, tensor in stored.items() if re.search(r"layers\.[12]\.", key)}
    assert (layers.keys() <= trained(model_type).state_dict().keys()) == (model_type in ("gpt_oss", "llama"))
    found = import_checkpoint(save({"model": layers}, tmp_path), base_folder(model_type))
    assert found.config.layers == list(SPAN)
    assert same(found, cut(model_type))

    last = sorted(key for key in layers if re.search(r"experts|mlp", key))[-1]
    for damaged, message in (
        (
            {key: tensor for key, tensor in layers.items() if key != last},
            f"missing .*{last.partition('layers.2.')[2]}",
        ),
        ({**layers, last: torch.ones(3, 3)}, rf"{last.partition('layers.2.')[2]} has shape \(3, 3\), expected"),
        ({**layers, last: layers[last] * torch.nan}, "non-finite"),
    ):
        with pytest.raises(CorruptDonorError, match=message) as raised:
            import_checkpoint(save(damaged, tmp_path), base_folder(model_type))
        assert is_one_line(raised.value)


def parts_of(layers: Layers, donor: DonorModel) -> Layers:
    """Of layers, what a donor holds of each."""
    held = [{name for name, _ in layer.named_parameters()} for layer in donor.stack.layers]
    return [{name: layer[name] for name in names} for layer, names in zip(layers, held, strict=True)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("modules", ["outputs", "attention", "mlp"])
def test_parts_of_layers_are_those_of_a_cut(modules, model_type, base_folder, tmp_path):
    options = {"mode": "replace", "modules": modules}
    base, expected = base_folder(model_type), DonorModel.from_base(trained(model_type), SPAN, **options)
    parts = parts_of(layers_of(model_type), expected)
    for layout in (ABSOLUTE["dict by number"], RELATIVE["flat, layers"]):
        found = import_checkpoint(save(layout(parts), tmp_path), base, SPAN, **options)
        assert same(found, expected) and found.config.modules == modules
    if (model_type, modules) != ("mixtral", "mlp"):  # of which no name on the Hub is one in the model
        expected.save_pretrained(tmp_path / "organ")
        stored = load_file(tmp_path / "organ" / "model.safetensors")
        assert same(import_checkpoint(save(stored, tmp_path), base, SPAN, **options), expected)
    with pytest.raises(CorruptDonorError, match="unexpected"):
        import_checkpoint(save(layers_of(model_type), tmp_path), base, SPAN, **options)


def test_what_parts_do_not_go_with_is_refused(base_folder, tmp_path):
    outputs = [
        {name: layer[name] for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")}
        for layer in layers_of("llama")
    ]
    for layers, modules, message in (
        (outputs, "all", r"holds only parts of each layer \(mlp.down_proj.* say which: modules='outputs'"),
        (outputs, "attention", "missing .*0.self_attn.k_proj"),
        (outputs, ["o_proj"], "unexpected .*0.mlp.down_proj"),
        ([outputs[0], dict([*outputs[1].items()][1:])], "outputs", "missing .*1.self_attn.o_proj.weight$"),
        (outputs, ["no_proj"], "no layer has 'no_proj'"),
    ):
        with pytest.raises(NotHFError, match=message) as raised:
            import_checkpoint(save(layers, tmp_path), base_folder("llama"), SPAN, mode="replace", modules=modules)
        assert is_one_line(raised.value)
    with pytest.raises(NotHFError, match="modules='outputs' needs mode='replace'"):
        import_checkpoint(tmp_path / "none.pt", base_folder("llama"), SPAN, modules="outputs")


def test_experts_by_the_wrong_numbers_are_refused(base_folder, tmp_path):
    """transformers stacks whatever it finds, in order."""
    DonorModel.from_base(base_folder("mixtral"), SPAN).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {key.replace("experts.0.", "experts.9."): tensor for key, tensor in stored.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"missing organ.*experts\.0\.w1\.weight; unexpected organ.*experts\.9\.w1\.weight"
    with pytest.raises(CorruptDonorError, match=message):
        import_checkpoint(save(renamed, tmp_path), base_folder("mixtral"), SPAN)
    with pytest.raises(CorruptDonorError, match=message):
        DonorModel.from_pretrained(tmp_path)


@pytest.mark.slow
def test_config_and_place_are_those_of_a_cut(base_folder, base_repo, tmp_path):
    file = save(ABSOLUTE["dict by number"](layers_of("llama")), tmp_path)
    live = tiny_model("llama")
    for base in (base_folder("llama"), base_repo("llama"), live):
        for options in (
            {"domain": "law"},
            {"position": 0, "dtype": torch.bfloat16},
            {"mode": "replace"},
            {"init": "identity"},
        ):
            found = import_checkpoint(file, base, **options)
            domain = options.pop("domain", None)
            expected = DonorModel.from_base(base, SPAN, **options)
            assert found.config.to_dict() == {**expected.config.to_dict(), "domain": domain}
            assert found.dtype == expected.dtype
            assert found.stack.layers[0].self_attn.o_proj.weight.any() == (options.get("init") != "identity")
    import_checkpoint(file, base_folder("llama"), range(*SPAN)).save_pretrained(tmp_path / "organ")
    assert same(DonorModel.from_pretrained(tmp_path / "organ"), import_checkpoint(file, live))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_legacy", [False, True])
def test_every_dtype_in_both_formats(dtype, is_legacy, base_folder, tmp_path):
    layers = [{key: tensor.to(dtype) for key, tensor in layer.items()} for layer in layers_of("llama")]
    file = save(layers, tmp_path, _use_new_zipfile_serialization=not is_legacy)
    assert same(
        import_checkpoint(file, base_folder("llama"), SPAN), DonorModel.from_base(trained("llama").to(dtype), SPAN)
    )


def test_the_organ_owns_its_tensors(base_folder, tmp_path):
    """Whatever the memory layout in the file, and whatever happens to the file."""
    layers = layers_of("llama")
    layers[0]["self_attn.q_proj.weight"] = layers[0]["self_attn.q_proj.weight"].T.contiguous().T
    layers[1]["input_layernorm.weight"] = layers[0]["input_layernorm.weight"]
    file = save(layers, tmp_path)
    before = file.read_bytes()
    found = import_checkpoint(file, base_folder("llama"), SPAN)
    with torch.no_grad():
        found.stack.layers[0].input_layernorm.weight.zero_()
    assert found.stack.layers[1].input_layernorm.weight.all()
    assert file.read_bytes() == before
    file.write_bytes(b"")
    found.save_pretrained(tmp_path / "organ")
    q_proj = load_file(tmp_path / "organ" / "model.safetensors")["organ.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(q_proj, layers[0]["self_attn.q_proj.weight"])


@pytest.mark.parametrize(
    ("model_type", "buffers"),
    [
        ("gpt2", {"attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool), "attn.masked_bias": torch.tensor(-1e4)}),
        (
            "gpt_neox",
            {
                "attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
                "attention.masked_bias": torch.tensor(-1e9),
                "attention.rotary_emb.inv_freq": torch.ones(4),
            },
        ),
        (
            "llama",
            {"self_attn.rotary_emb.inv_freq": torch.ones(4), "self_attn.rotary_emb.cos_cached": torch.ones(64, 8)},
        ),
    ],
)
def test_buffers_of_old_releases_are_ignored(model_type, buffers, cut, base_folder, tmp_path):
    layers = [{**layer, **buffers} for layer in layers_of(model_type)]
    assert same(import_checkpoint(save(layers, tmp_path), base_folder(model_type), SPAN), cut(model_type))
    layers[1]["mlp.bias"] = torch.ones(32)  # a vector is no mask
    with pytest.raises(CorruptDonorError, match=r"unexpected .*1\.mlp\.bias"):
        import_checkpoint(save(layers, tmp_path), base_folder(model_type), SPAN)


def edited(change: Callable[[dict], Any]) -> Callable[[Layers], Layers]:
    def layout(layers: Layers) -> Layers:
        change(layers[1])
        return layers

    return layout


Q = "self_attn.q_proj.weight"


ENDLESS: list = []


ENDLESS += [ENDLESS, ENDLESS]


BROKEN: dict[str, tuple[Callable[[Layers], Any], str]] = {
    "missing tensor": (edited(lambda layer: layer.pop(Q)), f"missing .*1.{Q}"),
    "extra tensor": (
        edited(lambda layer: layer.update({"self_attn.gate": torch.ones(2)})),
        "unexpected .*self_attn.gate",
    ),
    "mis-shaped tensor": (
        edited(lambda layer: layer.update({Q: torch.ones(3, 3)})),
        rf"{Q} has shape \(3, 3\), expected",
    ),
    "NaN": (edited(lambda layer: layer[Q].view(-1)[5].fill_(float("nan"))), f"non-finite .*{Q}"),
    "infinity": (edited(lambda layer: layer[Q].view(-1)[5].fill_(float("inf"))), f"non-finite .*{Q}"),
    "integer tensor": (edited(lambda layer: layer.update({Q: layer[Q].long()})), f"1.{Q} is torch.int64"),
    "float8 tensor": (
        edited(lambda layer: layer.update({Q: layer[Q].to(torch.float8_e4m3fn)})),
        f"{Q} is torch.float8",
    ),
    "sparse tensor": (edited(lambda layer: layer.update({Q: layer[Q].to_sparse()})), f"{Q} is not a dense tensor"),
    "meta tensor": (edited(lambda layer: layer.update({Q: layer[Q].to("meta")})), f"{Q} is not a dense tensor"),
    "empty tensor": (edited(lambda layer: layer.update({Q: torch.ones(0, 32)})), f"{Q} is empty"),
    "one layer only": (lambda layers: layers[:1], r"holds layers 0 to 0, .* layers=\(1, 3\)"),
    "a layer too many": (lambda layers: [*layers, layers[0]], r"holds layers 0 to 2, .* layers=\(1, 3\)"),
    "other layers": (lambda layers: dict(enumerate(layers, 2)), r"holds layers 2 to 3, .* layers=\(1, 3\)"),
    "a gap": (lambda layers: {1: layers[0], 3: layers[1]}, "holds layers 1, 3, which are not consecutive"),
    "two sets": (lambda layers: {"model": layers, "ema": {"shadow": layers}}, r"at model\.\* and at ema\.shadow\.\*"),
    "two unlike sets": (
        lambda layers: {"a": flat(layers, "h.", FIRST), "b": layers},
        r"at a\.h\.\* and at b\.\*|at b.* a\.h",
    ),
    "names without numbers": (lambda layers: {"first": layers[0], "second": layers[1]}, "at first.* and at second"),
    "one name twice": (lambda layers: {1: layers[0], "1": layers[0]}, "two tensors named '1."),
    "another architecture": (
        lambda layers: layers_of("gpt2"),
        "no layers of this base: expected .*q_proj.*, got .*ln_1.* and 19 more",
    ),
    "another width": (
        lambda layers: [
            dict(layer.state_dict()) for layer in tiny_model("llama", hidden_size=64).model.layers[FIRST:LAST]
        ],
        r"input_layernorm.weight has shape \(64,\), expected \(32,\)",
    ),
    "no tensor": (lambda layers: {"config": {"layers": [1, 2]}}, "got none"),
    "a number": (lambda layers: 3, "got none"),
    "something endless": (lambda layers: ENDLESS, "nested too deep"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused_in_is_one_line(case, base_folder, tmp_path, caplog):
    layout, message = BROKEN[case]
    file = save(layout(layers_of("llama")), tmp_path)
    with pytest.raises(NotHFError, match=message) as raised:
        import_checkpoint(file, base_folder("llama"), SPAN)
    assert isinstance(raised.value, CorruptDonorError) == ("layers=" not in str(raised.value))
    assert str(file) in str(raised.value) and is_one_line(raised.value)
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (3, 5)}, "half-open span"),
        ({"layers": "1-3"}, "half-open span"),
        ({"layers": SPAN, "position": 9}, "position must be between 0 and 4"),
        ({"layers": SPAN, "mode": "graft"}, "graft"),
        ({"layers": SPAN, "init": "zero"}, "zero"),
        ({"layers": SPAN, "subfolder": "gpt2"}, "is a file and has no subfolder"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message, base_folder, tmp_path):
    with pytest.raises(NotHFError, match=message):
        import_checkpoint(save(layers_of("llama"), tmp_path), base_folder("llama"), **options)


def test_a_keyword_that_nobody_knows_is_a_type_error(base_folder, tmp_path):
    with pytest.raises(TypeError, match="tokn"):
        import_checkpoint(save(layers_of("llama"), tmp_path), base_folder("llama"), SPAN, tokn="x")


def test_where_there_is_nothing_to_import(base_folder, base_repo, tmp_path):
    for source in (tmp_path, base_repo("llama"), "me/no-such-repo"):
        with pytest.raises(OSError, match=r"donor_layers.pt|no-such-repo"):
            import_checkpoint(source, base_folder("llama"), SPAN)
    with pytest.raises(OSError, match="no-such-base"):
        import_checkpoint(save(layers_of("llama"), tmp_path), "me/no-such-base", SPAN)


@pytest.mark.slow
def test_over_the_hub(hub: Hub, checkpoints, base_repo, cut, tmp_path):
    for subfolder, model_type, layers in (
        ("gpt2", "gpt2", None),
        ("tinyllama", "llama", SPAN),
        ("gptoss", "gpt_oss", SPAN),
    ):
        base = base_repo(model_type)
        with pytest.raises(OSError, match="gated"):
            import_checkpoint(checkpoints, base, layers, subfolder, token="hf_stranger", cache_dir=tmp_path / "empty")
        options = {"token": "hf_reader", "cache_dir": tmp_path / "cache"}
        hub.requests.clear()
        found = import_checkpoint(checkpoints, base, layers, subfolder, **options)
        assert same(found, cut(model_type))
        assert found.config.base_model_name_or_path == base
        assert found.config.base_revision == HfApi().model_info(base).sha
        asked = {
            record.path.partition("/resolve/")[2].partition("/")[2]
            for record in hub.requests
            if "/resolve/" in record.path
        }
        # of the base, its config and its card (the licence), no weights
        assert asked == {"config.json", "README.md", f"{subfolder}/donor_layers.pt"}

        hub.requests.clear()
        again = import_checkpoint(checkpoints, base, layers, subfolder, local_files_only=True, **options)
        assert same(again, found) and again.config.base_revision == found.config.base_revision
        assert not hub.requests


def test_options_of_the_hub_are_for_the_file_where_the_base_is_a_model(checkpoints, cut, tmp_path):
    options = {"token": "hf_reader", "cache_dir": tmp_path}
    assert same(import_checkpoint(checkpoints, trained("llama"), SPAN, "tinyllama", **options), cut("llama"))


def test_revisions_of_checkpoint_and_base_do_not_mix(hub: Hub, cut, base_folder, tmp_path):
    api = HfApi()
    repo, base = (api.create_repo(f"me/revisions-of-{kind}").repo_id for kind in ("organ", "base"))
    first = api.upload_folder(repo_id=base, folder_path=base_folder("llama"), allow_patterns="*.json").oid
    tiny_model("llama", rms_norm_eps=1e-3).config.save_pretrained(tmp_path)
    second = api.upload_file(repo_id=base, path_or_fileobj=tmp_path / "config.json", path_in_repo="config.json").oid
    api.create_branch(repo, branch="v2")
    for revision, layers in (("main", layers_of("llama")[::-1]), ("v2", layers_of("llama"))):
        file = save(layers, tmp_path)
        api.upload_file(repo_id=repo, path_or_fileobj=file, path_in_repo="a/organ.pt", revision=revision)

    found = import_checkpoint(repo, base, SPAN, "a", "organ.pt", revision="v2")
    assert same(found, cut("llama"))
    assert found.config.base_revision == second and found.config.base_config["rms_norm_eps"] == 1e-3
    found = import_checkpoint(repo, base, SPAN, "a", "organ.pt", base_revision=first)
    assert torch.equal(found.stack.layers[0].mlp.up_proj.weight, cut("llama").stack.layers[1].mlp.up_proj.weight)
    assert found.config.base_revision == first and found.config.base_config["rms_norm_eps"] != 1e-3
    with pytest.raises(TypeError, match="revision"):
        import_checkpoint(repo, tiny_model("llama"), SPAN, "a", "organ.pt", base_revision=first)


WAYS_IN = {
    "TransplantedForCausalLM": lambda source, subfolder: TransplantedForCausalLM.from_pretrained(
        tiny_model("gpt2"), source, donor_subfolder=subfolder
    ),
    "TransplantedForCausalLM, donor alone": lambda source, subfolder: TransplantedForCausalLM.from_pretrained(
        source, subfolder=subfolder
    ),
    "load_donor": lambda source, subfolder: TransplantedForCausalLM.from_pretrained(
        tiny_model("gpt2"), DonorModel.from_base(tiny_model("gpt2"), SPAN)
    ).load_donor(source, "other", subfolder=subfolder),
    "DonorModel": lambda source, subfolder: DonorModel.from_pretrained(source, subfolder=subfolder),
    "DonorConfig": lambda source, subfolder: DonorConfig.from_pretrained(source, subfolder=subfolder),
    "check_compatibility": lambda source, subfolder: check_compatibility(
        source, tiny_model("gpt2"), subfolder=subfolder
    ),
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("place", ["folder", "Hub"])
def test_every_way_in_says_how_to_import(way, place, hub: Hub, checkpoints, tmp_path):
    source: str | Path = checkpoints
    if place == "folder":
        source = tmp_path / "checkpoints"
        (source / "gpt2").mkdir(parents=True)
        save(ABSOLUTE["dict by number"](layers_of("gpt2")), source / "gpt2")
    hub.requests.clear()
    with pytest.raises(NotHFError, match=r"gpt2 is not a donor: it has no config\.json") as raised:
        WAYS_IN[way](source, "gpt2")
    assert is_one_line(raised.value)
    assert "use not_hf.import_checkpoint or `not-hf import`" in str(raised.value)
    assert not [record for record in hub.requests if "/tree/" in record.path]  # nor is the repo searched for pickles


@pytest.mark.slow
def test_the_command(base_folder, cut, tmp_path):
    file, out = save(layers_of("llama"), tmp_path), tmp_path / "organ"
    base = base_folder("llama")
    options = ("--layers", "1:3", "--position", "0", "--domain", "law", "--dtype", "bfloat16")
    result = invoke("import", file, base, *options, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    expected = {"folder": str(out), "base": str(base), "layers": [1, 3], "position": 0, "dtype": "bfloat16"}
    assert {key: shown[key] for key in expected} == expected
    organ = DonorModel.from_pretrained(out)
    assert organ.config.domain == "law" and shown["num_parameters"] == organ.num_parameters()
    assert torch.equal(
        organ.stack.layers[1].mlp.up_proj.weight, cut("llama").stack.layers[1].mlp.up_proj.weight.bfloat16()
    )

    parts = [{name: layer[name] for name in layer if "o_proj" in name} for layer in layers_of("llama")]
    options = ("--layers", "1:3", "--mode", "replace", "--modules", "o_proj", "--force")
    result = invoke("import", save(parts, tmp_path), base, *options, "-o", out, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["modules"] == ["o_proj"], result.stderr
    assert DonorModel.from_pretrained(out).num_parameters() == 2 * 32 * 32

    save(layers_of("llama"), tmp_path)
    for arguments, message in (((), "--layers I:J"), (("--layers", "0:3"), "which contradict layers=(0, 3)")):
        result = invoke("import", file, base, *arguments, "-o", tmp_path / "other")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr
        assert not (tmp_path / "other").exists()
    assert invoke("import", file, base, "--layers", "1-3", "-o", tmp_path / "other").exit_code == 2
