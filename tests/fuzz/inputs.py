"""Hostile files: sound ones with a few changes that know the format, and a few that do not."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st


def nested(depth: int, value: Any = 0, key: str | None = None) -> Any:
    """Lists, or dicts by a key, in each other."""
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


TEXTS = (
    *("", "x", " ", "default", "insert", "replace", "float16", "nn", "not_donor", "llama", "gpt2", "mamba", "t5"),
    *("flex_attention", "someone/some-kernel", "../..", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "x" * 5000),
    *("<img src=x onerror=alert(1)>", "[a](b)", "{{ 7 * 7 }}", "`", "|", "full_attention", "sliding_attention"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 64, 1000, 20_000, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**400),
    *(0.5, -1.5, 1e-300, 1e39, 1e308, float("inf"), float("-inf"), float("nan")),
)
KEYS = (
    *("to_dict", "to_diff_dict", "native_config", "check", "configuration_files", "transformers_weights", "auto_map"),
    *("_attn_implementation", "attn_implementation", "quantization_config", "per_layer_config", "_heterogeneity_spec"),
    *("__class__", "__dict__", "attribute_map", "sub_configs", "get_text_config", "num_labels", "id2label", "dtype"),
    *("torch_dtype", "rope_scaling", "layer_types", "num_hidden_layers", "is_encoder_decoder", "text_config"),
    *("__float__", "is_decoder", "architectures", "model_type", "use_cache", "_name_or_path", "output_attentions"),
)

leaves = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.text(max_size=8))
values = st.one_of(
    leaves,
    st.sampled_from(([], {}, nested(40), nested(300), nested(40, key="a"), [0] * 2000, {"__float__": "Infinity"})),
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
        max_leaves=6,
    ),
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in nested dicts and lists: what holds it, and its key or index."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:50]))
    else:
        return []
    return [place for key, item in items for place in [(value, key), *_places(item)]]


@st.composite
def documents(draw: st.DrawFn, samples: Sequence[Any], extra: Sequence[str] = KEYS, most: int = 3) -> Any:
    """A sample with a few values replaced, removed, added, repeated or swapped."""
    value = copy.deepcopy(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(0, most))):
        places = _places(value)
        if not places:
            return copy.deepcopy(draw(values))
        holder, key = (
            draw(st.sampled_from(places)) if len(places) < 50 else places[draw(st.integers(0, len(places) - 1))]
        )
        change = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "repeat", "number")))
        if change == "replace":
            holder[key] = copy.deepcopy(draw(values))
        elif change == "number" and isinstance(holder[key], int | float):
            holder[key] = draw(st.sampled_from(NUMBERS)) if draw(st.booleans()) else holder[key] * 2
        elif change == "remove":
            del holder[key]
        elif change == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(extra))] = copy.deepcopy(draw(values))
        elif change == "repeat" and isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * draw(st.sampled_from((1, 2, 200)))
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes as they are, mostly; or cut off, or with some replaced, removed or repeated."""
    change = draw(st.sampled_from(("none",) * 12 + ("cut", "replace", "insert", "repeat")))
    if change == "none" or not content:
        return content
    place = draw(st.integers(0, len(content) - 1))
    if change == "cut":
        return content[:place]
    if change == "repeat":
        return content[:place] + content[place : place + 20] * draw(st.sampled_from((2, 500))) + content[place + 20 :]
    other = draw(st.binary(min_size=1, max_size=6))
    return content[:place] + other + content[place + (len(other) if change == "replace" else 0) :]


@st.composite
def json_files(draw: st.DrawFn, samples: Sequence[Any], extra: Sequence[str] = KEYS, most: int = 3) -> bytes:
    """A JSON file like one of the samples."""
    return draw(damaged(json.dumps(draw(documents(samples, extra, most))).encode()))


@st.composite
def safetensors_files(draw: st.DrawFn, headers: Sequence[dict[str, Any]], size: int) -> bytes:
    """A safetensors file: a header like one of the samples, and data of about the right size."""
    keys = ("__metadata__", "dtype", "shape", "data_offsets", "organ.layers.9.mlp.up_proj.weight", "\x1b[2J\nx")
    header = draw(damaged(json.dumps(draw(documents(headers, keys, 2)), separators=(",", ":")).encode()))
    length = draw(st.sampled_from((len(header),) * 8 + (0, 1, len(header) - 1, len(header) + 1, 2**31, 2**63)))
    data = bytes(draw(st.sampled_from((size,) * 8 + (0, size - 1, size + 1))))
    return struct.pack("<Q", length % 2**64) + header + data


MODULES = ("os system", "builtins eval", "builtins exec", "subprocess Popen", "torch._utils _rebuild_tensor_v2")
MODULES += ("collections OrderedDict", "torch FloatStorage", "builtins bytearray", "torch.nn.modules.linear Linear")
_OPCODES = st.one_of(
    st.sampled_from(MODULES).map(lambda name: b"c" + name.replace(" ", "\n").encode() + b"\n"),
    st.sampled_from(
        [b"(", b")", b"]", b"}", b"N", b"R", b"b", b"t", b"l", b"d", b"a", b"e", b"s", b"u", b"0", b"2", b"1"]
    ),
    st.sampled_from([b"\x85", b"\x86", b"\x87", b"\x88", b"\x81", b"Q", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94"]),
    st.integers(0, 3).map(lambda n: b"q" + bytes([n])),
    st.integers(0, 3).map(lambda n: b"h" + bytes([n])),
    st.integers(-(2**31), 2**31 - 1).map(lambda n: b"J" + struct.pack("<i", n)),
    st.text(max_size=6).map(lambda text: b"X" + struct.pack("<I", len(text.encode())) + text.encode()),
    st.sampled_from([10**12, 2**62]).map(lambda n: b"\x8a\x08" + struct.pack("<q", n)),
)
programs = st.lists(_OPCODES, max_size=25).map(lambda codes: b"\x80\x02" + b"".join(codes) + b".")


@st.composite
def pickle_files(draw: st.DrawFn, samples: Sequence[bytes]) -> bytes:
    """A file of torch.save with another pickle or other sizes in it; a pickle by itself; or a damaged sound file."""
    sound = draw(st.sampled_from(samples))
    kind = draw(st.sampled_from(("damaged", "damaged", "program", "inside", "inside", "data")))
    if kind == "program":
        return draw(programs)
    if kind == "damaged" or not sound.startswith(b"PK"):
        return draw(damaged(draw(damaged(sound))))
    target = io.BytesIO()
    method = draw(st.sampled_from((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,)))
    with zipfile.ZipFile(io.BytesIO(sound)) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl") and kind == "inside":
                content = draw(programs) if draw(st.booleans()) else draw(damaged(content[:-1])) + b"."
            elif name.endswith("data.pkl") and kind == "data":
                content = pickle.dumps(draw(documents([{"layers": [{"a": 1}], "b": [1, 2]}])), protocol=2)
            new.writestr(name, content)
    return target.getvalue()


_YAML = (
    *(
        "tags: [a, b]\n",
        "license: mit\n",
        "datasets:\n- me/kjv\n",
        "a: &x [1, 2]\nb: *x\n",
        "a: !!python/name:os.system\n",
    ),
    *(
        "license: [" + "[" * 50,
        "model-index:\n- name: a\n  results: []\n",
        "model-index: 5\n",
        "? [a]\n: b\n",
        "x: 1\nx: 2\n",
    ),
    *(
        "base_model: [me/a]\n",
        "license: other\nlicense_link: ../../x\n",
        "- a\n",
        "a: |\n",
        "<<: {a: 1}\n",
        "a: 2026-13-45\n",
    ),
    *("1: a\n", "tags: {a: b}\n", "library_name: 3\n", "eval_results: 3\n", "license_name: [3]\nlicense: other\n"),
)
_MARKS = (
    *("<!-- not_hf facts: x -->", "<!-- /not_hf facts -->", "<!-- not_hf about 0: y -->", "<!-- /not_hf about -->"),
    *("<!-- not_hf facts: x ", "| domain perplexity | 24 | 18 |\n", "text\n", "---\n", "\r\n", "```\n", "\0"),
)


@st.composite
def card_files(draw: st.DrawFn, samples: Sequence[bytes]) -> bytes:
    """A card: metadata of odd lines, text of marks without order; or a damaged sound one."""
    if draw(st.booleans()):
        return draw(damaged(draw(damaged(draw(st.sampled_from(samples))))))
    metadata = "".join(draw(st.lists(st.sampled_from(_YAML), max_size=4)))
    parts = draw(st.lists(st.tuples(st.sampled_from(_MARKS), st.sampled_from((1, 1, 1, 2, 500))), max_size=8))
    text = "".join(mark * times for mark, times in parts)
    return draw(damaged(f"---\n{metadata}---\n{text}".encode()))
