"""What `import not_hf` does and what it costs, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from testing.processes import run_python


def run(script: str) -> str:
    done = run_python("-c", textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_as_cheap_as_that_of_transformers():
    """`-X importtime` prints cumulative microseconds; the package may add a second at most."""
    command, cumulative = [sys.executable, "-X", "importtime", "-c", "import not_hf"], {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines():
        _, micro, name = line.removeprefix("import time:").split("|")
        cumulative[name.strip()] = micro.strip()
    assert int(cumulative["not_hf"]) < 1e6
    assert "torch" not in cumulative


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import not_hf; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer",
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer; import not_hf",
        "from transformers.modeling_layers import AutoModel; from not_hf import *; "
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer",
    ],
)
def test_the_auto_classes_know_donors_in_any_order_of_imports(imports):
    out = run(
        f"""
        {imports}
        config = AutoConfig.for_model("not_donor")
        import not_hf
        from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
        assert type(config) is not_hf.DonorConfig
        assert AutoModel._model_mapping[type(config)] is not_hf.DonorModel
        assert AutoModelForCausalLM._model_mapping[type(config)] is not_hf.TransplantedForCausalLM
        from transformers import AutoModelForMaskedLM
        assert AutoModelForMaskedLM._model_mapping[type(config)] is not_hf.TransplantedForMaskedLM
        print(TOKENIZER_MAPPING[type(config)].__name__)
        """
    )
    assert out.split() == ["DonorTokenizer"]


@pytest.mark.slow
def test_prepared_processes_have_read_no_settings_of_the_hub():
    readers = "{'accelerate', 'datasets', 'huggingface_hub', 'not_hf', 'peft', 'transformers'}"
    assert run(f"import sys; print('torch' in sys.modules, {readers} & set(sys.modules))") == "True set()\n"


@pytest.mark.slow
def test_what_it_exports_is_there():
    names = run("import not_hf; print(*(getattr(not_hf, name).__class__.__name__ for name in dir(not_hf)))").split()
    assert len(names) == 50


def test_an_unknown_name_is_an_attribute_error():
    import not_hf

    with pytest.raises(AttributeError, match="'not_hf' has no attribute 'nothing'"):
        not_hf.nothing
