"""Data and settings that cannot work: one clear line, an exit code, and nothing half-written."""

import errno
import json
import logging
import shutil
import sys
import warnings
from types import ModuleType

import pytest
import torch
from commands import assert_refused, qadapter, succeeded

from qadapter.cli import PATIENCE_SECONDS, one_line
from qadapter.cli.policies import quiet_libraries
from qadapter.errors import DataError

GOOD = {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}
CHAT = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "Yes."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


# -- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "pairs.jsonl: the dataset is empty"),
        ([{"q": "a", "good": "b", "bad": "c"}], "(?s)q, good, bad.*--columns prompt="),
        ([GOOD, {**GOOD, "rejected": ""}], "pairs.jsonl, line 2: rejected holds no answer"),
        ([GOOD, {"prompt": "a", "chosen": "b"}], "pairs.jsonl, line 2: rejected is missing"),
        (
            [GOOD, {**GOOD, "rejected": "Yes."}],
            "line 2: chosen and rejected are the same;.* --drop-bad-rows leaves them",
        ),
        ([GOOD, b'{"prompt": "a", "chosen": "\xff"}'], "line 2: not UTF-8: invalid start byte at byte 28; save the"),
        ([GOOD, GOOD, b'{"prompt": '], "pairs.jsonl, line 3: not JSON: Expecting value at character 13"),
        ([{**GOOD, "rejected": "a" * 99}], r"no pair is left.*answer too long: 1\).*raise max_length"),
    ],
)
def test_bad_rows_are_named(train, write_pairs, folder, rows, match):
    assert_refused(train("--max-length", 60, dataset=write_pairs(rows)), match, folder=folder)
    assert not folder.exists()


def test_sides_that_answer_different_prompts_are_named(train, write_pairs, folder):
    sides = [[{"role": "user", "content": text}, {"role": "assistant", "content": "a"}] for text in ("Why?", "Who?")]
    rows = [dict(zip(("chosen", "rejected"), sides, strict=True))]
    assert_refused(train(dataset=write_pairs(rows)), "line 1: .*both sides have to answer the same prompt")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: no such file, and not a dataset name either. Give the path"),
        ("nobody/nothing", "nobody/nothing: the dataset cannot be loaded from the hub.*or give the path of a local"),
    ],
)
def test_a_dataset_that_is_not_there_is_named(train, folder, dataset, match):
    assert_refused(train(dataset=dataset), match)
    assert not folder.exists()


def test_chat_data_for_a_base_without_a_chat_template_is_refused(train, plain_base, write_pairs, folder):
    outcome = train(model=plain_base, dataset=write_pairs([CHAT]))
    assert_refused(outcome, "the tokenizer has no chat template; use an instruction-tuned model")
    assert not folder.exists()


def test_data_check_of_a_missing_file_is_one_line():
    assert_refused(qadapter("data", "check", "nowhere.jsonl"), "nowhere.jsonl: no such file")


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--alpha-0", "-0.5"), r"alpha_0 = -0.5: must be 0 or above"),
        (("--alpha-tilde", "-1"), r"alpha_tilde = -1.0: must be above 0"),
        (("--alpha-tilde", "0"), r"alpha_tilde = 0.0: must be above 0"),
        (("--gamma", "0"), r"gamma = 0.0: must lie in \(0, 1\]"),
        (("--discount-floor", "1.5"), r"discount_floor = 1.5: must lie in \[0, 1\]"),
        (("--gamma", "1.5"), r"gamma = 1.5: must lie in \(0, 1\]"),
        (("--beta", "nan"), r"beta = nan: must be a finite number"),
        (("--parametrisation", "values"), 'parametrisation = \'values\': must be "residual" or "logits"'),
        (("--fp16",), "fp16 = true: float16 training of this objective diverges. Use bf16"),
        (("--dtype", "float16"), "dtype = float16: training in it diverges. Use bfloat16 or float32"),
        (("--dtype", "int8"), "dtype = 'int8': choose auto, float32 or bfloat16"),
        (("--lora-r", "0"), "lora_r = 0: must be at least 1"),
        (("--lora-alpha", "-2"), "lora_alpha = -2.0: must be a number above 0"),
        (("--lora-dropout", "1"), r"lora_dropout = 1.0: must lie in \[0, 1\)"),
        (("--lora-target-modules", "nope"), "'nope'.* not found in the base model"),
        (("--learning-rate", "-1"), "learning_rate = -1.0: must be a number above 0"),
        (("--learning-rate", "nan"), "learning_rate = nan: must be a number above 0"),
        (("--seed", "-1"), r"seed = -1: must lie in \[0, 2\*\*32\)"),
        (("--lora-r", "5000"), r"LoraConfig.r = 5000: must be 4096 or below"),
        (("--dataloader-drop-last", "--per-device-train-batch-size", "9"), "7 pairs do not fill a batch of 9"),
        (("--per-device-train-batch-size", "0"), "per_device_train_batch_size = 0: must be at least 1"),
        (("--gradient-accumulation-steps", "0"), "gradient_accumulation_steps.*0"),
        (("--max-steps", "-1", "--num-train-epochs", "0"), "num_train_epochs = 0.0: must be above 0"),
        (("--preset", "author"), "preset 'author' is unknown: choose one of default, undiscounted, kl, authors"),
        (("--columns", "prompt"), "--columns 'prompt': write NAME=YOUR_COLUMN"),
        (("--columns", "prompt=a", "chosen=b", "prompt=c"), "--columns names 'prompt' twice: keep one"),
        (("--max-rows", "0"), "max_rows is 0; it has to be at least 1"),
        (("--dataset-split", "test"), "a file has only the split 'train', not 'test'"),
        (("--eval-split", "test"), "eval_split = 'test': there is no eval_dataset of which it is a split"),
        (("--eval-fraction", "1.5"), "eval_fraction is 1.5; it has to lie between 0 and 1"),
        (("--eval-fraction", "0.5", "--eval-dataset", "builtin"), "exclude each other: choose one"),
        (("--eval-fraction", "0.5", "--streaming"), "eval_fraction cannot split a streamed dataset"),
        (("--streaming", "--max-steps", "-1"), "the length of a streamed dataset is not known: give --max-steps"),
        (("--streaming", "--cache-base-states", "memory"), "cache_base_states needs a dataset of known length"),
        (("--streaming", "--retention", "1"), "retention needs a dataset of known length: leave --streaming out"),
        (("--retention", "-1"), "retention = -1.0: must be 0 or above"),
        (("--retention", "1", "--retention-texts", "nowhere.txt"), "'nowhere.txt': must be \"own\" or a file of texts"),
        (("--micro-batch-tokens", "0"), "micro_batch_tokens = 0: must be at least 1"),
        (("--revision", "v2"), "revision = 'v2': .*tiny-llama is a folder, which has none"),
        (("--load-best-model-at-end",), "load_best_model_at_end requires"),
        (
            ("--metric-for-best-model", "eval_acc"),
            "metric_for_best_model = 'eval_acc': choose one of loss, rewards",
        ),
        (("--load-in-4bit", "--load-in-8bit"), "load_in_4bit and load_in_8bit exclude each other"),
        (("--resume-from-checkpoint", "last"), "run has no checkpoint to resume from"),
    ],
)
def test_impossible_settings_are_named(train, folder, options, match):
    assert_refused(train(*options), match, folder=folder)
    assert not folder.exists()


def test_training_that_diverges_is_one_line(train, folder):
    outcome = train("--learning-rate", "1e30")
    assert_refused(
        outcome, r"the mean loss up to step \d is (nan|inf): .* Lower learning_rate \(1e\+30\)", folder=folder
    )


@pytest.mark.parametrize("option", ["--load-in-4bit", "--load-in-8bit"])
def test_quantising_without_bitsandbytes_says_what_to_install(train, folder, monkeypatch, option):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert_refused(
        train(option),
        r"the base is to be quantised, and bitsandbytes cannot be used.*pip install 'qadapter\[quantised\]'",
    )
    assert not folder.exists()


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "unheard-of"])
@pytest.mark.parametrize("options", [(), ("--load-in-4bit",)])
def test_a_quantised_base_is_refused_before_anything_is_read(
    train, base, tmp_path, folder, monkeypatch, method, options
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    copy = shutil.copytree(base, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    outcome = train(*options, model=copy, dataset="nowhere.jsonl")
    assert_refused(
        outcome, rf"base model '{copy}' is quantised \({method}\), .*Train on the model that it was made from"
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("nobody/nothing", "'nobody/nothing'"),
        ("./nowhere", "base model './nowhere': there is no such folder. Give a folder with config.json"),
        ("/no/where", "base model '/no/where': there is no such folder"),
        (__file__, "test_cli_bad_input.py': there is no such folder"),
    ],
)
def test_an_unknown_base_is_named(train, folder, model, match):
    assert_refused(train(model=model), match)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("trian",), "unknown command 'trian'. Commands: .*train"),
        (("train", "--bogus", "1"), "unrecognized arguments: --bogus 1. See qadapter train --help"),
        (("train", "--beta", "much"), "--beta: invalid float value: 'much'"),
        (("train", "--lr-scheduler-type", "zigzag"), "invalid choice: 'zigzag'"),
        (("generate",), "the following arguments are required: adapter. See qadapter generate --help"),
        (("train", "a/run.yml"), r"a/run.yml\. Did you mean --config a/run.yml\? See qadapter train"),
        (("train", "--model_name_or_path", "m"), r"model_name_or_path m\. Did you mean --model\? See qadapter train"),
        (("train", "--lora-rank", "1"), r"Did you mean --lora-r\?"),
        (("generate", "a", "--stength", "1"), r"--stength 1\. Did you mean --strength\? See qadapter generate --help"),
        (("info", "a", "b"), "unrecognized arguments: b"),
        (("chat", "a", "--stren", "1"), "unrecognized arguments: --stren 1"),
        (("data",), "write qadapter data check FILE_OR_HUB_ID"),
        (("data", "chekc", "a.jsonl"), "write qadapter data check FILE_OR_HUB_ID"),
        (("wrap", "a"), "the following arguments are required: --output-dir"),
    ],
)
def test_a_command_line_that_cannot_be_understood_exits_with_2(arguments, match):
    assert_refused(qadapter(*arguments), match, code=2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--strength", "nan"), "strength = nan: must be a finite number"),
        (("--strength", "inf"), "strength = inf: must be a finite number"),
        (("--max-new-tokens", "0"), "max_new_tokens = 0: must be at least 1"),
        (("--temperature", "-1"), r"temperature = -1.0: must lie in \[0, 100\)"),
        (("--temperature", "nan"), r"temperature = nan: must lie in \[0, 100\)"),
        (("--top-p", "0"), r"top_p = 0.0: must lie in \(0, 1\]"),
        (("--batch-size", "0", "--json"), "batch_size = 0: must be at least 1"),
        (("--base-model", "nobody/nothing"), "nobody/nothing"),
    ],
)
def test_impossible_settings_of_generate_are_named(adapter, options, match):
    assert_refused(qadapter("generate", adapter, "--prompt", "Why?", *options), match)


def test_a_prompt_that_is_no_unicode_text_is_refused(adapter):
    """As a shell hands over bytes in another encoding."""
    assert_refused(qadapter("generate", adapter, "--prompt", "caf\udce9"), "--prompt: prompt holds half of a surrogate")


def test_generate_without_a_prompt_says_where_to_give_one(adapter):
    assert_refused(qadapter("generate", adapter, stdin="\n"), "there is no prompt: give --prompt TEXT, --prompts-file")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b'{"prompt": 1}\n', 'line 1: must be an object with a text as its prompt, {"prompt": "..."}'),
        (b'{"text": "a"}\n', "line 1: must be an object with a text as its prompt"),
        (b'\n["a"]\n', "line 2: must be an object with a text as its prompt"),
        (b'{"prompt": "a"}\n{"prompt"\n', "line 2: not JSON: Expecting ':' delimiter at character 10"),
        (b"\xff\n", "is not UTF-8 text: .*Save it as UTF-8"),
        (b'{"prompt": "a\\ud83d"}\n', "line 1: prompt holds half of a surrogate pair, which is no text"),
        (b"\n", "there is no prompt"),
    ],
)
def test_bad_prompt_files_are_named(adapter, tmp_path, data, match):
    (tmp_path / "prompts.jsonl").write_bytes(data)
    assert_refused(qadapter("generate", adapter, "--prompts-file", tmp_path / "prompts.jsonl"), match)


def test_rows_of_another_kind_are_no_prompts(adapter, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt\nWhy?\n")
    match = r"prompts.csv: give plain text, or JSON Lines in a file that ends with \.jsonl"
    assert_refused(qadapter("generate", adapter, "--prompts-file", tmp_path / "prompts.csv"), match)


@pytest.mark.parametrize("command", ["generate", "chat", "info", "export"])
def test_a_folder_that_is_not_there_is_named(tmp_path, command):
    options = ("--output-dir", tmp_path / "out") if command == "export" else ()
    outcome = qadapter(command, tmp_path / "none", *options, stdin="Why?\n")
    assert_refused(outcome, "none: there is no such adapter folder. Train one with `qadapter train`")


def test_an_adapter_that_the_hub_does_not_have_is_named():
    outcome = qadapter("info", "nobody/nothing")
    assert_refused(outcome, "nobody/nothing: no such folder here, and the hub has no readable repository of that name")


def test_chat_needs_a_chat_template(train, plain_base, folder):
    succeeded(train(model=plain_base))
    outcome = qadapter("chat", folder, stdin="Why?\n")
    assert_refused(outcome, f"plain-llama has no chat template.*use `qadapter generate {folder}`")
    assert outcome.out == ""


@pytest.mark.parametrize(("rank", "waits"), [(None, []), ("0", []), ("1", [PATIENCE_SECONDS])])
def test_of_several_processes_the_first_one_has_the_word(monkeypatch, rank, waits):
    """The launcher ends the others while they wait; where they fail alone, they are heard after all."""
    waited = []
    monkeypatch.setattr("qadapter.cli.time.sleep", waited.append)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert_refused(qadapter("train"), "--model is missing")
    assert waited == waits


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("rank", "lines"), [("0", 2), ("1", 0)])
def test_of_several_processes_the_first_one_warns(monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with quiet_libraries():
        logging.getLogger("qadapter").warning("mind the gap")
        warnings.warn("mind the step", stacklevel=1)
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_debug_shows_the_traceback_before_the_line(train):
    outcome = train("--debug", dataset="nowhere.jsonl")
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback (most recent call last):\n")
    assert outcome.err.splitlines()[-1].startswith("error: nowhere.jsonl: no such file")


def test_an_error_nobody_foresaw_names_its_type_and_debug(adapter, monkeypatch):
    def fail(*_):
        raise RuntimeError("boom\nat great length")

    monkeypatch.setattr("qadapter.cli.info.describe", fail)
    assert_refused(
        qadapter("info", adapter), r"error: RuntimeError: boom \(run again with --debug for the traceback\)\n"
    )


def test_an_error_of_the_system_names_the_file(adapter, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "secret.json")

    monkeypatch.setattr("qadapter.cli.info.describe", fail)
    assert_refused(qadapter("info", adapter), r"error: Permission denied: secret.json\n")


def test_what_a_process_that_loads_data_refuses_is_said_without_its_traceback():
    class Refusing(torch.utils.data.IterableDataset):
        def __iter__(self):
            raise DataError("pairs.jsonl, line 7: rejected is missing")
            yield

    with pytest.raises(DataError, match="Traceback") as caught:
        next(iter(torch.utils.data.DataLoader(Refusing(), num_workers=1)))
    assert one_line(caught.value) == "pairs.jsonl, line 7: rejected is missing"
