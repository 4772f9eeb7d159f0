"""What people see of organs: in a terminal, in a notebook, and on cards how to install."""

from __future__ import annotations

import tomllib

import pytest

from not_hf import DonorModel, OrganSource, TransplantedForCausalLM, compose
from not_hf.cards.donor import donor_card
from not_hf.version import INSTALL
from testing import ROOT
from testing.cards import make_config
from testing.commands import invoke
from testing.donors import organ


@pytest.fixture
def donor(base_folder) -> DonorModel:
    return organ(base_folder("llama"), 1, domain="<b>law</b>")


def test_a_model_lists_its_organs(donor, base_folder):
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), donor, donor_name="law")
    model.load_donor(donor, "second", position=0)
    model.set_donor_scale("second", 0.5)
    model.set_donor("law")
    head, first, second, *rest = repr(model).splitlines()
    name = base_folder("llama").name
    assert head == "LlamaForCausalLM("
    assert first.strip() == f"organ 'law': layers [1, 3) of {name}, insert at position 3, for <b>law</b>"
    assert second.strip().endswith("insert at position 0, scale 0.5, for <b>law</b>, not active")
    assert rest[0].strip() == "(model): LlamaModel("
    assert repr(model.unload()).splitlines()[1].strip() == "(model): LlamaModel("


def test_a_donor_says_what_it_is(donor, base_folder):
    assert f"layers [1, 3) of {base_folder('llama').name}, insert at position 3" in repr(donor).splitlines()[1]


def test_a_notebook_shows_a_table_and_the_place(donor, base_folder):
    shown = donor._repr_html_()
    assert "layers [1, 3) of" in shown and "ORGAN: layers 1 … 2 of the base" in shown
    assert "&lt;b&gt;law" in shown and "<b>" not in shown
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), donor, donor_name="a")
    model.load_donor(donor, "b")
    assert model._repr_html_().count("<tr>") == 2


def test_a_plan_is_short(donor, base_folder, tmp_path):
    donor.save_pretrained(tmp_path / "law")
    plan = compose([OrganSource("a", tmp_path / "law"), OrganSource("b", tmp_path / "law", position=0)])
    head, first, second = str(plan).splitlines()
    assert head == f"composition for {base_folder('llama')}: 4 layers, 8 with organs"
    assert first.startswith("  a: layers [1, 3) of") and " MB" in first and "insert at position 0" in second


def test_spans_and_sizes_have_one_form(donor, base_folder, tmp_path):
    donor.save_pretrained(tmp_path / "law")
    shown = invoke("inspect", tmp_path / "law").stdout
    assert "[1, 3)" in shown and "[1, 3]" not in shown and " MB" in shown and "0.0 MB" not in shown
    shown = invoke("extract", base_folder("llama"), "--layers", "1:3", "-o", tmp_path / "cut").stdout
    assert "[1, 3)" in shown


def test_a_card_says_how_to_install_in_a_way_that_works():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert f"pip install git+{urls['Source']}" == INSTALL
    assert f"```bash\n{INSTALL}\n```" in donor_card(make_config()).text
    for card in (ROOT / "model_cards").glob("*.md"):
        assert "pip install not_hf\n" not in card.read_text()
