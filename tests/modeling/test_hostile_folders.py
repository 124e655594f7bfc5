"""Adapter folders written by an enemy, or by a failing disk: refused with our own errors, quickly, and never run."""

import json
import os
import pickle
import shutil
import struct
import time
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import lora, padded, tiny_base, tiny_policy, token_ids, train_randomly
from safetensors.torch import load_file, save

from qadapter import QAdapterForCausalLM
from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling.lora_files import read_lora
from qadapter.modeling.manifest import FORMAT_VERSION, MANIFEST_NAME, read_manifest
from qadapter.new_folders import file_digest

BATCH = padded(token_ids(7, 4))
CONFIG = "adapters/default/adapter_config.json"
WEIGHTS = "adapters/default/adapter_model.safetensors"
SECONDS = 30.0


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The parent of a base and of an adapter folder on it; not to be changed."""
    root = tmp_path_factory.mktemp("original")
    tiny_base(num_hidden_layers=1).save_pretrained(root / "base")
    policy = QAdapterForCausalLM.from_base(root / "base", peft_config=lora(target_modules=["q_proj", "down_proj"]))
    train_randomly(policy).save_pretrained(root / "out")
    return root


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original / "out", tmp_path / "out")


def load(folder):
    """Load it, in less time than a hang takes."""
    start = time.monotonic()
    try:
        return QAdapterForCausalLM.from_pretrained(folder)
    finally:
        assert time.monotonic() - start < SECONDS


def rewrite(path, change):
    """Apply `change` to the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# -- qadapter_config.json ------------------------------------------------------------------------------------------


def default(values):
    return values["adapters"]["default"]


MANIFESTS = {
    "newer format": (lambda v: v.update(format_version=FORMAT_VERSION + 1), "format_version is 2, .*Upgrade qadapter"),
    "no format": (lambda v: v.pop("format_version"), "format_version is None"),
    "no adapters": (lambda v: v.update(adapters={}), "adapters has 0 entries"),
    "many adapters": (lambda v: v.update(adapters={f"a{i}": {} for i in range(65)}), "adapters has 65 entries"),
    "list": (lambda v: v.update(adapters=[1]), "adapters is a list, must be a dict"),
    "dots": (lambda v: default(v).update(path="adapters/../../etc"), r"path must be 'adapters/default'"),
    "absolute": (lambda v: default(v).update(path="/etc"), r"path must be 'adapters/default'"),
    "name with dots": (
        lambda v: v["adapters"].update({"..": {**v["adapters"].pop("default"), "path": "adapters/.."}}),
        "adapter name '..': letters, digits",
    ),
    "name with a slash": (
        lambda v: v["adapters"].update({"a/b": {**v["adapters"].pop("default"), "path": "adapters/a/b"}}),
        "adapter name 'a/b': letters, digits",
    ),
    "unknown setting": (lambda v: default(v).update(surprise=1), r"unknown \['surprise'\]"),
    "missing setting": (lambda v: default(v).pop("gamma"), r"missing \['gamma'\]"),
    "alpha of zero": (lambda v: default(v).update(alpha_tilde=0), "alpha_tilde = 0.0: must be above 0"),
    "alpha that is text": (lambda v: default(v).update(alpha_0="1"), "alpha_0 = '1': must be a finite number"),
    "huge alpha": (lambda v: default(v).update(alpha_0=10**400), "is damaged"),
    "huge weight": (lambda v: default(v).update(weight=10**400), "is damaged"),
    "tiny alpha": (lambda v: default(v).update(alpha_tilde=1e-320), "gives other log-probabilities"),
    "weight that is text": (lambda v: default(v).update(weight="1"), "weight = '1' is not a finite number"),
    "no digest": (lambda v: default(v).update(sha256=None), "sha256 is a NoneType, must be a str"),
    "base without a name": (lambda v: v["base"].pop("name"), "key 'name' is missing"),
    "revision that is a list": (
        lambda v: v["base"].update(revision=["main"]),
        "base.revision is a list, must be a str",
    ),
    "tokenizer that is text": (lambda v: v.update(tokenizer="yes"), "tokenizer is a str, must be a dict"),
    "no probe": (lambda v: v.pop("probe"), "key 'probe' is missing"),
    "probe of none": (lambda v: v["probe"]["logps"].update({"": {}}), r"probe.logps. is empty"),
    "probe of the base alone": (lambda v: v["probe"]["logps"].pop("default"), "must cover the base and every adapter"),
    "probe without ids": (lambda v: v["probe"].update(input_ids=[]), "must be 1 to 64 token ids"),
    "probe with negative ids": (lambda v: v["probe"].update(input_ids=[-1]), "must be 1 to 64 token ids"),
    "probe beyond the vocabulary": (lambda v: v["probe"].update(input_ids=[97]), "names the token 97, but the base"),
    "values beyond the vocabulary": (
        lambda v: v["probe"]["logps"].update({"": {"12345": -1.0}}),
        "names the token 12345, but the base model knows 97",
    ),
    "probe of words": (lambda v: v["probe"]["logps"].update({"": {"x": -1.0}}), "which is no token id"),
    "probe of texts": (lambda v: v["probe"]["logps"].update({"": {"1": "x"}}), "is not a finite number"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_damaged_manifest_is_refused_by_name(folder, kind):
    change, message = MANIFESTS[kind]
    rewrite(folder / MANIFEST_NAME, change)
    with pytest.raises(AdapterFormatError, match=message):
        load(folder)


TEXTS = {
    "empty": (b"", "is not valid JSON"),
    "text": (b"hello", "is not valid JSON"),
    "list": (b"[]", "holds a list, must be a JSON object"),
    "latin": ('{"a": "é"}'.encode("latin-1"), "is not valid JSON"),
    "zeros": (b"\0" * 64, "is not valid JSON"),
    "large": (b'{"a": "' + b"x" * 2**21 + b'"}', r"bytes; at most \d+ are read"),
    "deep lists": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not valid JSON"),
    "deep objects": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON"),
    "many digits": (b'{"format_version": ' + b"9" * 5000 + b"}", "is not valid JSON"),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", [MANIFEST_NAME, CONFIG])
def test_json_that_is_none_is_refused(folder, kind, name):
    content, message = TEXTS[kind]
    (folder / name).write_bytes(content)
    with pytest.raises(AdapterFormatError, match=message):
        load(folder)


@pytest.mark.parametrize("depth", [100, 300, 900, 990, 2000])
def test_nesting_that_json_still_reads_is_refused_without_a_stack_overflow(folder, depth):
    nested = b"[" * depth + b"]" * depth
    (folder / MANIFEST_NAME).write_bytes(b'{"format_version": ' + nested + b"}")
    with pytest.raises(AdapterFormatError):
        load(folder)
    (folder / MANIFEST_NAME).write_bytes(b'{"format_version": 1, "adapters": ' + nested + b"}")
    with pytest.raises(AdapterFormatError):
        load(folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["alpha_0", "weight"])
def test_numbers_that_are_not_finite_are_refused(folder, number, key):
    text = (folder / MANIFEST_NAME).read_text()
    content = json.loads(text)
    default(content)[key] = "HERE"
    (folder / MANIFEST_NAME).write_text(json.dumps(content).replace('"HERE"', number))
    with pytest.raises(AdapterFormatError, match=f"{key} = .* finite number"):
        load(folder)


def test_manifest_that_is_a_folder_or_a_pipe_is_no_manifest(folder):
    (folder / MANIFEST_NAME).unlink()
    os.mkfifo(folder / MANIFEST_NAME)
    with pytest.raises(AdapterFormatError, match="is not an adapter folder"):
        load(folder)
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()
    with pytest.raises(AdapterFormatError, match="is not an adapter folder"):
        load(folder)


# -- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["adapters", "adapters/default"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, what):
    shutil.move(folder / what, tmp_path / "elsewhere")
    (folder / what).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterFormatError, match="is missing, or leads out of the adapter folder"):
        load(folder)


def test_missing_inner_folder_is_refused(folder):
    shutil.rmtree(folder / "adapters")
    with pytest.raises(AdapterFormatError, match="is missing, or leads out of the adapter folder"):
        load(folder)


# -- adapter_config.json -------------------------------------------------------------------------------------------

EVIL = "(a+)+(a+)+(a+)+(a+)+(a+)+(a+)+$"


@pytest.mark.parametrize("pattern", [EVIL, r"(.*)*(.*)*(.*)*(.*)*x"])
def test_hostile_target_pattern_is_never_matched(folder, pattern):
    with torch.no_grad():
        expected = load(folder)(**BATCH).logits
        rewrite(folder / CONFIG, lambda v: v.update(target_modules=pattern, exclude_modules=pattern))
        assert torch.equal(load(folder)(**BATCH).logits, expected)


def test_hostile_rank_pattern_is_never_matched(folder):
    rewrite(folder / CONFIG, lambda v: v.update(rank_pattern={EVIL: 7}))
    load(folder)


CONFIGS = {
    "hostile alpha pattern": ({"alpha_pattern": {EVIL: 7}}, r"alpha_pattern '\(a\+\)\+.*is not a plain module name"),
    "alpha pattern of digits": (
        {"alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 7}},
        r"alpha_pattern 'layers.*d.*q_proj' is not a plain module name.*give each layer its own entry",
    ),
    "alpha pattern of words": ({"alpha_pattern": {r"\w_proj": 7}}, r"alpha_pattern '.*w_proj' is not a plain module"),
    "alpha patterns as a list": ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
    "bias": ({"bias": "all"}, "bias is 'all'; only adapters with bias 'none'"),
    "bias of B": ({"lora_bias": True}, "lora_bias is set"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4': .*were rewritten"),
    "initialisation as a list": ({"init_lora_weights": [1]}, r"init_lora_weights is \[1\]"),
    "dora that is text": ({"use_dora": "false"}, "use_dora is 'false', must be true or false"),
    "alpha of zero": ({"lora_alpha": 0}, r"lora_alpha is 0, must lie between 0 and 1e\+06"),
    "huge alpha": ({"lora_alpha": 10**400}, "lora_alpha is 1000+, must lie"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_unsupported_adapter_config_is_refused_by_name(folder, kind):
    values, message = CONFIGS[kind]
    rewrite(folder / CONFIG, lambda v: v.update(values))
    with pytest.raises(AdapterFormatError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["q_proj", "self_attn.q_proj", r"layers\.0\.self_attn\.q_proj"])
def test_alpha_patterns_that_are_names_are_followed(folder, name):
    rewrite(folder / CONFIG, lambda v: v.update(alpha_pattern={name: 7}))
    config, _ = read_lora(folder / "adapters/default")
    assert {*config.alpha_pattern.values(), config.lora_alpha} == {6, 7}


def test_many_alpha_patterns_take_no_time(folder):
    rewrite(folder / CONFIG, lambda v: v.update(alpha_pattern={f"a{i}": 1 for i in range(50_000)}))
    load(folder)


# -- weights -------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_weights_are_refused_and_never_unpickled(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    (folder / "adapters/default/adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(
        AdapterFormatError, match=r"adapter_model\.safetensors is missing \(pickled weights are never read"
    ):
        load(folder)
    assert not (tmp_path / "sprung").exists()


def test_pickle_by_the_name_of_safetensors_is_never_unpickled(folder, tmp_path):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(AdapterFormatError, match="is not a readable safetensors file"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


def header(**tensors):
    """A safetensors file of a header alone."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FILES = {
    "empty": b"",
    "short": b"\x05\0\0",
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "no data": header(**{NAME: {"dtype": "F32", "shape": [3, 32], "data_offsets": [0, 384]}}),
    "huge shape": header(**{NAME: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}),
    "negative": header(**{NAME: {"dtype": "F32", "shape": [-3, 32], "data_offsets": [0, 384]}}),
    "unknown dtype": header(**{NAME: {"dtype": "F99", "shape": [0], "data_offsets": [0, 0]}}),
}


@pytest.mark.parametrize("kind", FILES)
def test_damaged_safetensors_are_refused(folder, kind):
    (folder / WEIGHTS).write_bytes(FILES[kind])
    with pytest.raises(AdapterFormatError, match="is not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize("kind", ["F8_E4M3", "BOOL", "I64", "U8"])
def test_numbers_that_are_no_weights_are_refused(folder, kind):
    size = 8 if kind == "I64" else 1
    values = {NAME: {"dtype": kind, "shape": [1, 1], "data_offsets": [0, size]}}
    (folder / WEIGHTS).write_bytes(header(**values) + b"\0" * size)
    with pytest.raises(AdapterFormatError, match="holds numbers of type"):
        load(folder)


@pytest.mark.parametrize(
    "module",
    ["model", "model.layers", "model.norm", "model.embed_tokens", "no.such.layer", "q_proj", ".", "model.layers.0"],
)
def test_weights_for_modules_that_cannot_be_adapted_are_refused(folder, module):
    names = [f"base_model.model.{module}.lora_{part}.weight" for part in "AB"]
    (folder / WEIGHTS).write_bytes(save({names[0]: torch.ones(3, 32), names[1]: torch.ones(32, 3)}))
    rewrite(folder / MANIFEST_NAME, lambda v: default(v).update(sha256=file_digest(folder / WEIGHTS)))
    with pytest.raises((AdapterFormatError, ConfigError), match="fit|cannot run beside the base"):
        load(folder)


# -- anything at all -----------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value, path=()):
    """The paths to all entries of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def put(value, path, item):
    """`value` with another entry at `path`."""
    if not path:
        return item
    copied = value.copy()
    copied[path[0]] = put(value[path[0]], path[1:], item)
    return copied


def load_or_refuse(folder, original):
    """Load the folder on the original base; only our own errors come out."""
    with suppress(AdapterFormatError, ConfigError):
        QAdapterForCausalLM.from_pretrained(folder, base_model=original / "base")


@FUZZ
@given(data=st.binary(max_size=200))
@pytest.mark.parametrize("name", [MANIFEST_NAME, CONFIG, WEIGHTS])
def test_any_bytes_are_refused(folder, original, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(AdapterFormatError):
        QAdapterForCausalLM.from_pretrained(folder, base_model=original / "base")


@FUZZ
@given(value=JSON)
@pytest.mark.parametrize("name", [MANIFEST_NAME, CONFIG])
def test_any_json_is_refused(folder, original, name, value):
    (folder / name).write_text(json.dumps(value))
    with pytest.raises(AdapterFormatError):
        QAdapterForCausalLM.from_pretrained(folder, base_model=original / "base")


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("name", [MANIFEST_NAME, CONFIG])
def test_any_change_of_one_entry_loads_or_is_refused(folder, original, name, data):
    content = json.loads((original / "out" / name).read_text())
    path = data.draw(st.sampled_from(sorted(places(content), key=str)))
    (folder / name).write_text(json.dumps(put(content, path, data.draw(JSON))))
    load_or_refuse(folder, original)


@FUZZ
@given(place=st.integers(min_value=0), byte=st.integers(0, 255))
def test_any_change_of_one_byte_of_the_weights_is_refused(folder, original, place, byte):
    content = bytearray((original / "out" / WEIGHTS).read_bytes())
    place %= len(content)
    changed = content[place] != byte
    content[place] = byte
    (folder / WEIGHTS).write_bytes(content)
    if changed:
        with pytest.raises(AdapterFormatError):
            QAdapterForCausalLM.from_pretrained(folder, base_model=original / "base")


@FUZZ
@given(
    values=st.dictionaries(
        st.from_regex(r"base_model\.model\.[a-z0-9_.]{1,12}\.lora_[AB]\.weight", fullmatch=True) | st.text(max_size=12),
        st.lists(st.integers(0, 4), max_size=3),
        max_size=4,
    )
)
def test_any_tensors_are_refused_or_read(folder, values):
    (folder / WEIGHTS).write_bytes(save({name: torch.zeros(shape) for name, shape in values.items()}))
    with suppress(AdapterFormatError):
        _, tensors = read_lora(folder / "adapters" / "default")
        assert set(tensors) == set(values)


@FUZZ
@given(cut=st.integers(0, 400))
def test_any_cut_of_a_file_is_refused(folder, original, cut):
    for name in (MANIFEST_NAME, CONFIG, WEIGHTS):
        whole = (original / "out" / name).read_bytes()
        (folder / name).write_bytes(whole[: max(0, len(whole) - 2 - cut)])
        with pytest.raises(AdapterFormatError):
            QAdapterForCausalLM.from_pretrained(folder, base_model=original / "base")
        (folder / name).write_bytes(whole)


def test_manifest_survives_reading_and_writing(folder):
    manifest = read_manifest(folder)
    assert manifest.to_dict() == json.loads((folder / MANIFEST_NAME).read_text())


def test_folder_of_a_random_adapter_is_as_before(folder):
    """The fixture that all of the above damage is sound."""
    policy = load(folder)
    assert {tensor.shape[0] for name, tensor in load_file(folder / WEIGHTS).items() if "lora_A" in name} == {3}
    assert policy.adapters == tiny_policy(trained=False).adapters
