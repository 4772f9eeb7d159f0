"""`transformers serve` and `transformers chat` with an organ: a server process, HTTP, real clients."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from not_hf import TransplantedForCausalLM
from testing.donors import organ
from testing.processes import run_python, start_python
from testing.releases import since

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
PROMPT = "w5 w6 w7"

ANSWERS = since("transformers", "5.22", "its server does not answer with the newest releases of what it needs")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serving")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=["organ", pytest.param("merged", marks=pytest.mark.exhaustive)])
def served(request, base_folder, tmp_path_factory) -> Iterator[tuple[str, str, str]]:
    """Address of a server, the model it serves, and what that model makes of the prompt.

    The organ goes through `not-hf serve`, the merged model through plain `transformers serve`.
    """
    base, folder = str(base_folder("llama")), str(tmp_path_factory.mktemp(request.param))
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    command, name = ["-m", "not_hf.cli", "serve"], Path(folder).name
    if request.param == "merged":
        model.merge_and_unload().save_pretrained(folder)
        command, name = ["-m", "transformers.cli.transformers", "serve"], folder
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    port = free_port()
    command += [folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    temporary = tmp_path_factory.mktemp("served")
    output = tmp_path_factory.mktemp("output")
    server = start_python(*command, output=output, TMPDIR=str(temporary))
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, server, output)
        yield address, name, tokenizer.decode(out[0, ids.shape[1] :])
    finally:
        server.terminate()
        server.join(30)
    assert server.exitcode is not None
    assert not list(temporary.glob("not-hf-serve-*"))  # nothing is left behind


def wait_for(address: str, server: BaseProcess, output: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.exitcode is None, (output / "stderr").read_text("utf-8")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.3)
    pytest.fail(f"no answer from {address} in {seconds} s")


@ANSWERS
def test_the_openai_client(served):
    from openai import OpenAI

    address, name, expected = served
    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60)
    assert [model.id for model in client.models.list()] == [name]
    options = {"model": name, "max_tokens": 6, "temperature": 0}
    assert client.completions.create(prompt=PROMPT, **options).choices[0].text.strip() == expected
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(messages=messages, **options)
    assert answer.choices[0].message.content.strip() == expected
    stream = client.chat.completions.create(messages=messages, stream=True, **options)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces).strip() == expected and len(pieces) > 1


@ANSWERS
def test_transformers_chat(served):
    address, name, expected = served
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", name, address]
    command += ["max_new_tokens=6", "do_sample=False"]
    typed = f"{PROMPT}\nn\n!exit\n"  # the n: not to go on past the six tokens
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert expected in " ".join(done.stdout.split())


def test_a_donor_that_cannot_be_merged_is_one_line():
    done = run_python("-m", "not_hf.cli", "serve", "me/nothing")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: me/nothing") and done.stderr.count("\n") == 1
