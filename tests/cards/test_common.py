"""Cards show the texts of strangers as texts, and read strangers' cards within limits."""

from __future__ import annotations

import re
import time

import pytest
import yaml

from not_hf import DonorModel, NotHFError
from not_hf.cards.common import read_metadata, updated
from not_hf.cards.donor import donor_card
from not_hf.cards.license import License, base_license
from not_hf.limits import MAX_CARD
from testing.cards import make_config, markup
from testing.models import tiny_model

HTML = "<img src=x onerror=alert(1)>"
LINK = "[here](https://evil.example)"
IMAGE = "![pixel](https://evil.example/p.png)"
ESCAPE = "`\x1b]52;c;aGk=\x07`"
HOSTILE = (
    f"{HTML} {LINK} {IMAGE} {ESCAPE} <!-- /not_hf facts --> | https://evil.example www.evil.example a@evil.example"
)


FIELDS = ("domain", "base_model_name_or_path", "base_revision", "base_subfolder", "not_hf_version", "mode")


@pytest.mark.parametrize("field", FIELDS)
def test_a_text_of_the_config_is_shown_as_it_is(field):
    assert markup(donor_card(make_config()).text) == []
    card = donor_card(make_config(**{field: HOSTILE}))
    assert markup(card.text) == []
    assert card.text.count("<!-- /not_hf facts -->") == 1
    assert all(row.count("|") - row.count("\\|") == 3 for row in card.text.splitlines() if row.startswith("| Domain"))


def test_names_of_data_sets_metrics_and_organs_are_shown_as_they_are():
    card = donor_card(make_config(datasets=[HOSTILE, "me/kjv"], metrics={HOSTILE: 3.0}), repo_id="me/kjv")
    assert markup(card.text) == []
    place = {"position": 1, "mode": "insert", "scale": 1.0, "active": True}
    organs = [
        {"name": HOSTILE, "donor": HOSTILE, "revision": HOSTILE, **place},
        {"name": "law", "donor": "me/law", "revision": HOSTILE, "subfolder": HOSTILE, **place},
        {"name": "kjv", "subfolder": HOSTILE, **place},
    ]
    assert markup(donor_card(make_config(donors=organs, layers=None)).text) == []


def test_ordinary_texts_are_left_alone():
    card = donor_card(make_config(domain="King James English (1611), 10 % of it; law & order"))
    assert "King James English (1611), 10 % of it; law \\& order" in card.text


ALIASES = "tags:\n- &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"- &{new} [{', '.join(['*' + old] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"---\n{ALIASES}---\n", r"the alias \*a in its metadata; write the value out"),
        (f"---\ntags: {'[' * 300}{']' * 300}\n---\n", "nested more than 32 deep"),
        (
            f"---\nlicense: {'[' * 100_000}\n---\n",
            "nested more than 32 deep|maximum nesting depth",
        ),  # libyaml has a limit of its own
        ("x" * (MAX_CARD + 1), "1,048,577 bytes; at most 1,048,576 are read"),
    ],
    ids=["aliases", "nested", "open brackets", "large"],
)
def test_a_card_beyond_the_limits_is_refused_at_once(text, message, tmp_path, caplog):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    start = time.process_time()
    with pytest.raises(NotHFError, match=message):
        DonorModel.from_base(tiny_model("llama"), (1, 3)).save_pretrained(tmp_path)
    with pytest.raises((ValueError, yaml.YAMLError), match=message):
        read_metadata(readme)
    assert base_license(str(tmp_path)) == License()  # a base's card is no reason not to cut
    assert re.search(message, caplog.text)
    assert time.process_time() - start < 2
    assert list(tmp_path.iterdir()) == [readme]


@pytest.mark.parametrize(
    "text",
    [
        "<!-- not_hf facts: x -->" * 40_000,
        "<!-- not_hf facts: x " * 40_000,
        "<!-- not_hf facts: x --><!-- /not_hf other -->" * 20_000,
        "<!-- not_hf facts: x -->" * 20_000 + "<!-- /not_hf facts -->" * 20_000,
    ],
    ids=["openers", "half openers", "mismatched", "nested"],
)
def test_marks_without_end_are_searched_once(text, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"---\ntags: [a]\n---\n{text}")
    start = time.process_time()
    updated(readme, donor_card(make_config()))
    assert time.process_time() - start < 2
