"""Exports through the command line, each checked by the tool that it is for: transformers, PEFT, gguf."""

import errno
import json
import os
import re
import shlex
import shutil

import pytest
import torch
from commands import Outcome, assert_refused, process, qadapter, succeeded
from models import lora, multimodal_base, tiny_base, tiny_policy, tiny_tokenizer, train_randomly
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from qadapter import ConfigError, QAdapterConfig, QAdapterForCausalLM
from qadapter.export import distil, export_gguf_ready, export_lora, export_merged, export_vllm, gguf
from qadapter.modeling.bases import BaseSource
from qadapter.new_folders import into_new_folder

IDS = torch.arange(2, 13).unsqueeze(0)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def mean_kl(p, q):
    """KL(p ‖ q) of distributions given as logits, averaged over positions."""
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item()


@pytest.fixture
def policy(adapter):
    return QAdapterForCausalLM.from_pretrained(adapter)


@pytest.fixture
def export(adapter, tmp_path):
    """Run `qadapter export` into tmp_path/"exported"."""

    def run(*options):
        return qadapter("export", adapter, "--output-dir", tmp_path / "exported", *options)

    return run


@pytest.fixture
def exported(tmp_path):
    return tmp_path / "exported"


def test_merged_is_the_policy_to_transformers(export, exported, policy):
    out = succeeded(export("--format", "merged"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(exported)), logits(policy))
    assert float(out.rpartition(" ")[2]) < 1e-3
    assert AutoTokenizer.from_pretrained(exported).chat_template is not None


def test_lora_is_the_policy_to_peft(export, exported, base, policy):
    succeeded(export("--format", "lora"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported)
    torch.testing.assert_close(logits(plain), logits(policy))


@pytest.mark.parametrize("form", ["merged", "lora", "gguf"])
@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_interpolated_weights_are_exported_at_any_strength(export, exported, base, policy, form, strength):
    dial = {"strength": strength, "interpolation": "weights"}
    assert (logits(policy) - policy(IDS, **dial).logits).abs().max() > 0.1
    out = succeeded(export("--format", form, "--strength", strength, "--interpolation", "weights"))
    plain = AutoModelForCausalLM.from_pretrained(base if form == "lora" else exported)
    plain = PeftModel.from_pretrained(plain, exported) if form == "lora" else plain
    with torch.no_grad():
        # Weights added up beforehand round otherwise, on some processors by more than the default tolerance.
        torch.testing.assert_close(logits(plain), policy(IDS, **dial).logits, rtol=1e-5, atol=5e-5)
    assert f"strength {strength}" in out if form == "lora" else float(out.rpartition(" ")[2]) < 1e-3


@pytest.mark.parametrize(("name", "value"), [("max_kl", 0.05), ("min_kl", 0.1), ("decay", 0.9)])
def test_a_policys_own_dial_is_not_dropped_by_an_exact_export(policy, tmp_path, name, value):
    setattr(policy, name, value)
    for write in (export_merged, export_lora):
        with pytest.raises(ConfigError, match=f"the model's own {name} = {value} is not part of any LoRA"):
            write(policy, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_base_of_few_positions_is_merged(tmp_path):
    policy = tiny_policy(tiny_base("gpt2", n_positions=32), QAdapterConfig())
    assert export_merged(policy, tmp_path / "merged") < 1e-3


@pytest.mark.parametrize(("known", "ends"), [(None, [3, "~"]), (5, [5, "~"]), ([5, 6], [5, 6, "~"]), ("~", "~")])
def test_a_merged_model_stops_where_answers_were_trained_to_end(policy, tmp_path, monkeypatch, known, ends):
    """A base that never chatted knows another end than its template writes."""
    tokenizer = tiny_tokenizer("{% for message in messages %}{{ message['content'] }}~{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["~"]})
    end = tokenizer.convert_tokens_to_ids("~")
    monkeypatch.setattr(policy.base.config, "eos_token_id", 3)  # where the settings for generation say nothing
    monkeypatch.setattr(policy.base.generation_config, "eos_token_id", end if known == "~" else known)
    export_merged(policy, tmp_path / "merged", tokenizer=tokenizer)
    loaded = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert loaded == (end if ends == "~" else [end if token == "~" else token for token in ends])


@pytest.mark.parametrize("has_settings", [True, False])
def test_vllm_stops_where_answers_were_trained_to_end(adapter, base, exported, tmp_path, has_settings):
    copy = shutil.copytree(base, tmp_path / "copy")
    settings = copy / "generation_config.json"
    if has_settings:
        settings.write_text('{"eos_token_id": 1}')
    else:
        settings.unlink()
    tokenizer = tiny_tokenizer("{% for message in messages %}{{ message['content'] }}~{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["~"]})
    export_vllm(QAdapterForCausalLM.from_pretrained(adapter, base_model=copy), exported, tokenizer)
    loaded = GenerationConfig.from_pretrained(exported).eos_token_id
    assert loaded == [1, tokenizer.convert_tokens_to_ids("~")]
    assert not has_settings or settings.read_text() == '{"eos_token_id": 1}'


def test_the_weight_of_an_interpolated_adapter_counts(policy, tmp_path):
    policy.adapter_weights = {"default": 0.5}
    assert export_merged(policy, tmp_path / "merged", interpolated=0.8) < 1e-3
    with torch.no_grad():
        expected = policy(IDS, strength=0.8, interpolation="weights").logits
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=5e-5)


@pytest.fixture
def composition(base, adapter, tmp_path):
    """A folder of two adapters of different ranks and targets."""
    other = QAdapterForCausalLM.from_base(base, peft_config=lora(r=3, target_modules=["v_proj", "down_proj"]))
    train_randomly(other, seed=5).save_pretrained(tmp_path / "other")
    adapters = {"mild": adapter, "other": tmp_path / "other"}
    policy = QAdapterForCausalLM.from_pretrained(base, adapters=adapters, adapter_weights={"mild": 0.5, "other": 0.8})
    policy.save_pretrained(tmp_path / "both", tokenizer=tiny_tokenizer())
    return policy


@pytest.mark.parametrize("form", ["merged", "lora", "gguf"])
@pytest.mark.parametrize("weights", [None, {"mild": -0.4, "other": 1.2}, {"other": 0.7}])
def test_a_composition_of_interpolated_weights_is_exported_exactly(
    form, weights, composition, base, exported, tmp_path
):
    dial = {"strength": 0.6, "interpolation": "weights", "adapter_weights": weights}
    options = ["--adapter-weights", *(f"{name}={weight}" for name, weight in weights.items())] if weights else []
    out = succeeded(
        qadapter("export", tmp_path / "both", "--format", form, "--strength", 0.6, "--interpolation", "weights",
                 "--output-dir", exported, *options)
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(base if form == "lora" else exported)
    plain = PeftModel.from_pretrained(plain, exported) if form == "lora" else plain
    with torch.no_grad():
        expected = composition(IDS, **dial).logits
    torch.testing.assert_close(logits(plain), expected)
    assert form == "lora" or float(out.rpartition(" ")[2]) < 1e-3


def test_a_lora_of_several_has_their_ranks_alone_and_needs_no_files_of_the_base(tmp_path):
    ranks = {"one": 3, "two": 5, "idle": 16}
    configs = {name: lora(r=rank, target_modules=["q_proj", "v_proj"]) for name, rank in ranks.items()}
    base = tiny_base()
    policy = train_randomly(QAdapterForCausalLM(base, dict.fromkeys(ranks, QAdapterConfig()), configs)).eval()
    policy.adapter_weights = {"one": 0.5, "two": -1.0, "idle": 0.0}
    export_lora(policy, tmp_path / "lora", interpolated=1.0)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 8
    with torch.no_grad():
        expected = policy(IDS, strength=1.0, interpolation="weights").logits
    plain = PeftModel.from_pretrained(tiny_base(), tmp_path / "lora")
    torch.testing.assert_close(logits(plain), expected)


def test_one_adapter_of_a_folder_of_several_is_exported_where_it_is_the_policy(composition, base, exported):
    composition.adapter_weights = {"mild": 0.0, "other": 1.0}
    assert export_merged(composition, exported) < 1e-3
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(exported)), logits(composition))


def test_a_composition_of_logits_is_not_merged(composition, exported, tmp_path):
    outcome = qadapter("export", tmp_path / "both", "--output-dir", exported)
    assert_refused(outcome, "it mixes 2 adapters' logits. Add --interpolation weights.*or distil it")
    assert not exported.exists()


def test_a_dora_is_not_exported_at_another_strength(tmp_path):
    policy = QAdapterForCausalLM.from_base(tiny_base(), peft_config=lora(use_dora=True))
    with pytest.raises(ConfigError, match="DoRA's weights do not grow with the strength alone"):
        export_merged(policy, tmp_path / "merged", interpolated=0.5)
    assert not (tmp_path / "merged").exists()


def test_gguf_knows_every_tensor_of_the_gguf_ready_folder(export, exported):
    package = pytest.importorskip("gguf", reason="the extra `builtin` brings gguf")
    succeeded(export("--format", "gguf"))
    layers = json.loads((exported / "config.json").read_text())["num_hidden_layers"]
    names = package.get_tensor_name_map(package.MODEL_ARCH.LLAMA, layers)
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        unknown = [name for name in file.keys() if names.get_name(name, (".weight", ".bias")) is None]  # noqa: SIM118
    assert unknown == []
    assert f"convert_hf_to_gguf.py {exported.name}" in (exported / "README.md").read_text()


def test_the_gguf_ready_tokenizer_is_read_by_transformers_4(export, exported, base):
    """Of which llama.cpp's converter asks for 4.57: no TokenizersBackend there, and extra tokens by their old name."""
    succeeded(export("--format", "gguf"))
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config
    assert {index: token["content"] for index, token in config["added_tokens_decoder"].items()} == {
        "0": "<pad>",
        "1": "</s>",
    }
    ours, theirs = AutoTokenizer.from_pretrained(exported), AutoTokenizer.from_pretrained(base)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours("Question 3?</s>").input_ids == theirs("Question 3?</s>").input_ids


@pytest.fixture
def sentencepiece_policy(tmp_path):
    """A policy whose base has a tokenizer such as transformers makes of a SentencePiece file; and that tokenizer."""
    tiny_base(vocab_size=100).save_pretrained(tmp_path / "base")
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *map(chr, range(32, 127))])}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "base")
    return QAdapterForCausalLM.from_base(tmp_path / "base").eval(), tokenizer


def test_the_gguf_ready_folder_has_the_base_s_sentencepiece_file(sentencepiece_policy, exported, tmp_path):
    (tmp_path / "base/tokenizer.model").write_bytes(b"pieces and scores")
    export_gguf_ready(sentencepiece_policy[0], exported, sentencepiece_policy[1])
    assert (exported / "tokenizer.model").read_bytes() == b"pieces and scores"


def test_a_sentencepiece_file_that_is_missing_is_warned_of(sentencepiece_policy, exported):
    with pytest.warns(UserWarning, match=r"tokenizer\.model of .*base' is not to be had .*Copy it from the base into"):
        export_gguf_ready(sentencepiece_policy[0], exported, sentencepiece_policy[1])
    assert (exported / "README.md").exists()


def test_the_gguf_ready_readme_can_be_pasted_whatever_the_folder_is_called(adapter, tmp_path, monkeypatch):
    """The working folder, too, which has its name from elsewhere."""
    folder = tmp_path / "it's $(touch mine)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    succeeded(qadapter("export", adapter, "--format", "gguf", "--output-dir", "."))
    commands = [shlex.split(line) for line in (folder / "README.md").read_text().splitlines() if line.startswith("   ")]
    named = [word for command in commands for word in command if word.startswith("it's")]
    assert {word.removeprefix(folder.name) for word in named} == {"", ".gguf", "-q4_k_m.gguf"}


def test_a_gguf_ready_folder_that_could_not_be_finished_is_not_there(sentencepiece_policy, exported, monkeypatch):
    """Its checkpoint would convert, with texts split otherwise."""

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (exported.parent / "base/tokenizer.model").write_bytes(b"pieces and scores")
    monkeypatch.setattr(gguf.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left"):
        export_gguf_ready(sentencepiece_policy[0], exported, sentencepiece_policy[1])
    assert [path.name for path in exported.parent.iterdir()] == ["base"]


def test_a_number_format_that_gguf_lacks_is_refused(adapter, exported):
    with pytest.raises(ConfigError, match=r"in torch\.float64, which GGUF does not have: load it with dtype="):
        export_gguf_ready(QAdapterForCausalLM.from_pretrained(adapter, dtype=torch.float64), exported)
    assert not exported.exists()


def test_distilled_approaches_the_policy_at_half_strength(export, exported, base, policy, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Question {number}?\n" for number in range(8)))
    options = ("--strength", 0.5, "--prompts-file", prompts, "--epochs", 8, "--max-new-tokens", 12)
    out = succeeded(export("--format", "distilled", *options))
    assert "on 4 held-out prompts" in out
    card = (exported / "README.md").read_text()
    assert "strength 0.5" in card
    (gap,) = re.findall(r"KL\(policy ‖ LoRA\) on 4 held-out prompts: \d\.\d{4} nats a token", out)
    assert gap in card
    policy.strength = 0.5
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported)
    models = (student, AutoModelForCausalLM.from_pretrained(base))
    after, before = (mean_kl(logits(policy), logits(model)) for model in models)
    assert after < before / 2


def test_a_distilled_lora_s_card_names_the_whole_dial(export, exported, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne\n")
    dial = ("--strength", 1.5, "--adapter-weights", "default=0.7", "--cap", 0.1, "--threshold", 0.01, "--decay", 0.9)
    options = ("--prompts-file", tmp_path / "prompts.txt", "--epochs", 1, "--max-new-tokens", 2)
    succeeded(export("--format", "distilled", *dial, *options))
    card = (exported / "README.md").read_text()
    assert "strength 1.5, weights default=0.7, decay 0.9, KL cap 0.1 nats, threshold 0.01 nats, distilled on" in card


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_dora_is_distilled_into_as_many_ranks(base, strength):
    """Which begin at nothing: its magnitudes have no place in a plain LoRA; nor has any adapter at strength 0."""
    policy = QAdapterForCausalLM.from_base(base, peft_config=lora(use_dora=True))
    found = distil(train_randomly(policy).eval(), tiny_tokenizer(), list("abcde"), strength, 1, max_new_tokens=2)
    assert found.student.peft_config["default"].r == 3
    assert found.kl_before == pytest.approx(found.kl_base)


def test_a_distilled_lora_names_the_base_as_the_adapter_does(policy, tmp_path):
    """And not the folder of the built-in model's copy on this machine."""
    policy.base_source = BaseSource(policy.base_source.path, "someone/base", None)
    student = distil(policy, tiny_tokenizer(), list("abcde"), epochs=1, max_new_tokens=2).student
    student.save_pretrained(tmp_path, save_embedding_layers=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"


def test_vllm_is_the_policy_over_the_folder_s_own_weights(adapter, exported, policy):
    """As a process, whose whole output is the command to run next."""
    outcome = process("export", adapter, "--format", "vllm", "--strength", 0.5, "--output-dir", exported)
    command = f"vllm serve {exported} --generation-config vllm"
    assert outcome == Outcome(0, f"folder for vLLM written to {exported}: {command}\n", "")
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["QAdapterLlamaForCausalLM"]
    assert config["qadapter"] == {"strength": 0.5}
    torch.testing.assert_close(
        logits(QAdapterForCausalLM.from_pretrained(exported, base_model=exported)), logits(policy), rtol=0, atol=0
    )
    assert AutoTokenizer.from_pretrained(exported).chat_template is not None


@pytest.mark.parametrize("strength", [float("nan"), 1e6, "high"])
def test_a_strength_that_vllm_would_refuse_is_refused_before_anything_is_written(policy, exported, strength):
    with pytest.raises(ConfigError, match=re.escape(f"strength = {strength!r}: must")):
        export_vllm(policy, exported, strength=strength)
    assert not exported.exists()


def test_a_base_that_the_vllm_plugin_lacks_is_refused(exported, tmp_path):
    """As a process, too: the reason is one line and nothing is written."""
    tiny_base("gpt2").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    QAdapterForCausalLM.from_base(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    outcome = process("export", tmp_path / "adapter", "--format", "vllm", "--output-dir", exported)
    assert_refused(outcome, "the vLLM plugin has no GPT2LMHeadModel: it serves LlamaForCausalLM.*Use `qadapter serve`")
    assert not exported.exists()


@pytest.mark.parametrize(
    ("options", "match", "code"),
    [
        (("--strength", 0.5), "--strength 0.5 cannot be exported exactly: add --interpolation weights, or use", 1),
        (("--format", "distilled"), "--prompts-file is missing", 1),
        (("--format", "distilled", "--prompts-file", "nowhere.txt"), "nowhere.txt cannot be read: No such file", 1),
        (("--format", "distilled", "--epochs", 0), "--epochs 0: must be at least 1", 1),
        (("--prompts-file", __file__), "--prompts-file is for --format distilled, not for merged", 1),
        (("--format", "onnx"), "invalid choice: 'onnx'", 2),
        (("--interpolation", "weights", "--cap", 0.1), "--cap cannot be exported as merged", 1),
        (("--adapter-weights", "default=0.5"), "--adapter-weights cannot be exported as merged", 1),
        (("--interpolation", "weights", "--adapter-weights", "x=1"), r"adapter_weights names \['x'\]", 1),
        (("--format", "vllm", "--interpolation", "weights"), "--interpolation cannot be exported as vllm", 1),
        (("--cap", 0.1), "--cap cannot be exported as merged: use --format distilled", 1),
        (("--format", "vllm", "--decay", 0.9), "--decay cannot be exported as vllm: use --format distilled", 1),
        (("--format", "distilled", "--cap", -1), "--cap -1: must be a finite number of nats, 0 or above", 1),
    ],
)
def test_an_impossible_export_writes_nothing(export, exported, options, match, code):
    assert_refused(export(*options), match, code)
    assert not exported.exists()


@pytest.mark.parametrize("form", ["merged", "lora", "distilled", "gguf", "vllm"])
def test_all_files_of_an_export_follow_the_umask(export, exported, tmp_path, form):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne\n")
    distilled = ("--prompts-file", tmp_path / "prompts.txt", "--epochs", 1, "--max-new-tokens", 2)
    before = os.umask(0o027)
    try:
        succeeded(export("--format", form, *(distilled if form == "distilled" else ())))
    finally:
        os.umask(before)
    # The base's weights in vLLM's folder are the base's own files.
    own = [path for path in exported.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    assert any(path.suffix == ".safetensors" for path in own)
    assert {oct(path.stat().st_mode & 0o777) for path in own} == {"0o640"}


def test_export_overwrites_nothing(export, exported):
    exported.mkdir()
    (exported / "mine.txt").write_text("precious")
    assert_refused(export(), "exported exists and is not empty: choose another one")
    assert [path.name for path in exported.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("spelling", [".", "link"])
def test_an_empty_folder_that_is_there_is_filled(adapter, exported, monkeypatch, spelling):
    """Such as a mount, which nothing can replace: the working folder and a link to one cannot be replaced either."""
    exported.mkdir()
    (exported.parent / "link").symlink_to(exported)
    monkeypatch.chdir(exported if spelling == "." else exported.parent)
    succeeded(qadapter("export", adapter, "--output-dir", spelling))
    assert {path.name for path in exported.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not list(exported.glob(".*")) + list(exported.parent.glob(".*"))


@pytest.mark.parametrize("there", [True, False])
def test_what_is_written_into_the_folder_meanwhile_is_kept(exported, there):
    def write(scratch):
        (scratch / "config.json").write_text("{}")
        exported.mkdir(exist_ok=True)
        (exported / "config.json").write_text("precious")

    if there:
        exported.mkdir()
    with pytest.raises(ConfigError, match="choose another"):
        into_new_folder(exported, write)
    assert (exported / "config.json").read_text() == "precious"
    assert len(list(exported.iterdir())) == len(list(exported.parent.iterdir())) == 1


def test_a_folder_in_a_file_is_refused_before_anything_is_loaded(adapter, tmp_path):
    (tmp_path / "file").write_text("mine")
    outcome = qadapter("export", "nowhere", "--output-dir", tmp_path / "file/new/exported")
    assert_refused(outcome, "file/new/exported: .*/file is a file. Choose another one")


def test_an_adapter_of_another_weight_than_1_is_not_merged(adapter, base, tmp_path):
    """It is the policy at another strength, which needs the base's stream."""
    policy = QAdapterForCausalLM.from_pretrained(base, adapters={"mild": adapter}, adapter_weights={"mild": 0.5})
    policy.save_pretrained(tmp_path / "mild", tokenizer=tiny_tokenizer())
    for kind in ("merged", "lora", "gguf"):
        outcome = qadapter("export", tmp_path / "mild", "--format", kind, "--output-dir", tmp_path / "exported")
        assert_refused(outcome, r"cannot be merged exactly: its adapter has weight 0\.5\. Add --interpolation weights")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT: merging may be complicated
@pytest.mark.parametrize("multimodal", [False, True])
def test_a_head_with_a_lora_is_tied_to_the_embeddings_no_more(exported, multimodal):
    """The config says so, for those that do not see it by the weights; that of the text, too, where it is a part."""
    base = multimodal_base(tied=True) if multimodal else tiny_base(tie_word_embeddings=True)
    policy = QAdapterForCausalLM.from_base(base, peft_config=lora(target_modules=r".*layers.1.*down_proj|lm_head"))
    assert export_merged(train_randomly(policy).eval(), exported) < 1e-3
    config = json.loads((exported / "config.json").read_text())
    for part in (config, config["text_config"]) if multimodal else (config,):
        assert part["tie_word_embeddings"] is False
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        assert any(name.endswith("lm_head.weight") for name in file.keys())  # noqa: SIM118 -- not a dict


def test_a_policy_that_needs_both_streams_is_not_merged(train, tmp_path):
    succeeded(train("--alpha-0", 0.05, "--max-steps", 1))
    outcome = qadapter("export", tmp_path / "run", "--output-dir", tmp_path / "exported")
    assert_refused(outcome, "alpha_0 differs from alpha_tilde.*--format distilled")
    assert not (tmp_path / "exported").exists()


def test_vllm_is_given_the_models_own_strength_and_weights(policy, exported, tmp_path):
    policy.strength, policy.adapter_weights = 0.3, {"default": 0.5}
    policy.max_kl, policy.min_kl = float("inf"), 0.0  # which are none
    export_vllm(policy, exported, tiny_tokenizer())
    assert json.loads((exported / "config.json").read_text())["qadapter"] == {"strength": 0.3}
    written = QAdapterForCausalLM.from_pretrained(exported, base_model=exported)
    assert written.adapter_weights == {"default": 0.5}
    export_vllm(policy, tmp_path / "given", tiny_tokenizer(), strength=1.0)
    assert json.loads((tmp_path / "given/config.json").read_text())["qadapter"] == {"strength": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_kl", 0.1, r"own max_kl = 0\.1 cannot be exported for vLLM, .*: set it to None, .*, or distil the policy"),
        ("max_kl", torch.tensor(0.1), r"own max_kl = tensor\(0\.1.*\) cannot be exported for vLLM"),
        ("min_kl", 0.05, r"own min_kl = 0\.05 cannot be exported for vLLM"),
        ("decay", 0.5, r"own decay = 0\.5 cannot be exported for vLLM, .*: set it to 1\.0"),
        ("interpolation", "weights", r"own interpolation = 'weights' cannot be exported for vLLM"),
        ("strength", lambda state: 0.5, r"strength = <function .*: must be a finite number"),
    ],
)
def test_a_setting_of_the_model_that_the_vllm_plugin_lacks_is_refused(policy, exported, name, value, said):
    setattr(policy, name, value)
    with pytest.raises(ConfigError, match=said):
        export_vllm(policy, exported)
    assert not exported.exists()


def test_a_dora_is_not_exported_for_vllm(base, exported):
    """The plugin would refuse it at the start; one of weight 0 it does not read."""
    adapters = {"plain": lora(), "dora": lora(use_dora=True)}
    policy = QAdapterForCausalLM(tiny_base(), dict.fromkeys(adapters, QAdapterConfig()), adapters).eval()
    policy.base_source = QAdapterForCausalLM.from_base(base).base_source
    with pytest.raises(ConfigError, match="'dora' is a DoRA adapter, .* not supported on vLLM.*serve`, or merge it"):
        export_vllm(policy, exported)
    assert not exported.exists()
    policy.adapter_weights["dora"] = 0.0
    export_vllm(policy, exported)
