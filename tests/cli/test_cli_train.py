"""`qadapter train`: from pairs in a file to an adapter, and what is said on the way."""

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import termios
import xml.etree.ElementTree as ElementTree

import datasets
import pytest
from commands import PROMPT, QUICK, SHORT, adapter_settings, assert_refused, qadapter, start, succeeded

from qadapter.data import token_cache
from qadapter.training_log import read_log


def test_training_leaves_log_curve_and_arguments(adapter):
    assert [entry["step"] for entry in read_log(adapter / "training_log.jsonl")] == [1, 2, 3, 4, 4]
    assert ElementTree.parse(adapter / "training_curve.svg").getroot().tag.endswith("svg")
    arguments = json.loads((adapter / "training_arguments.json").read_text())
    assert (arguments["max_steps"], arguments["learning_rate"]) == (4, 0.05)


def test_training_says_how_far_it_is_a_line_an_entry(train):
    out = succeeded(train("--max-steps", 3))
    assert re.search(r"^step 1 of 3: loss 0\.\d{4}, accuracy \d+%, .*; \d:\d\d:\d\d left$", out, re.MULTILINE)
    assert re.search(r"^trained to step 3 in \d:\d\d:\d\d, [\d.e+]+ pairs a second$", out, re.MULTILINE)
    assert "{" not in out


def test_in_a_terminal_training_draws_a_bar(base, pairs, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    options = ("--model", base, "--dataset", pairs, "--output-dir", tmp_path / "run", *QUICK)
    with start("train", *options, stderr=theirs) as running:
        os.close(theirs)
        out, _ = running.communicate(timeout=100)
    drawn = bytearray()
    with contextlib.suppress(OSError):  # so Linux ends a terminal that nobody writes to any more
        while chunk := os.read(ours, 65536):
            drawn += chunk
    os.close(ours)
    assert "step 4 of 4: loss" in out
    assert "4/4 [" in drawn.decode()


def test_an_error_stands_on_a_line_of_its_own_behind_a_bar(train):
    outcome = train("--disable-tqdm", "false", "--learning-rate", 1e30, "--max-steps", 6)
    *drawn, said, rest = outcome.err.split("\n")
    assert (outcome.code, rest) == (1, "")
    assert re.match(r"error: the mean loss up to step \d is (nan|inf)", said)
    assert any("/6 [" in line for line in drawn)


def test_the_same_command_trains_the_same_adapter_and_another_seed_another(train, adapter, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    succeeded(train(folder=same))
    succeeded(train("--seed", 5, folder=other))
    weights = "adapters/default/adapter_model.safetensors"
    expected = (adapter / weights).read_bytes()
    assert (same / weights).read_bytes() == expected != (other / weights).read_bytes()


def test_train_says_where_the_adapter_is_and_what_to_try(train, tmp_path):
    assert succeeded(train()).endswith(
        f"adapter written to {tmp_path / 'run'}; try: qadapter chat {tmp_path / 'run'}\n"
    )


def test_the_command_to_try_can_be_pasted_whatever_the_folder_s_name(train, tmp_path):
    folder = tmp_path / "it's mine; ls"
    command = succeeded(train("--max-steps", 1, folder=folder)).rstrip().rpartition("try: ")[2]
    assert shlex.split(command) == ["qadapter", "chat", str(folder)]


def test_without_a_chat_template_train_suggests_generate(train, plain_base, tmp_path):
    outcome = train(model=plain_base)
    assert succeeded(outcome).endswith(f"try: qadapter generate {tmp_path / 'run'}\n")


def test_all_linear_adapts_what_no_names_do(train, adapter, tmp_path):
    succeeded(train("--lora-target-modules", "all-linear", "--max-steps", 1))
    assert adapter_settings(tmp_path / "run")["modules"] == adapter_settings(adapter)["modules"]


@pytest.mark.filterwarnings("always:target_modules")
def test_a_target_that_is_not_there_is_warned_of(train):
    assert "warning: target_modules: no layer" in train("--lora-target-modules", "q_proj", "vproj").err


def test_a_list_given_in_two_options_is_warned_of(train, pairs):
    outcome = train("--dataset", pairs)
    succeeded(outcome)
    assert outcome.err == "warning: --dataset is given 2 times and the last one counts: write all values behind one.\n"
    assert "warning" not in train("--max-steps", 1, "--overwrite").err


def test_the_policy_is_held_to_the_base_on_texts(train, tmp_path):
    """Those of a file, and those that the base writes."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Text {number} of no preference."}) + "\n" for number in range(3)))
    for given in ((), ("--retention-texts", texts)):
        succeeded(train("--retention", 2, "--max-steps", 3, *given, "--overwrite"))
        assert adapter_settings(tmp_path / "run")["retention"] == 2.0
        assert any("qadapter/retained_kl" in entry for entry in read_log(tmp_path / "run" / "training_log.jsonl"))
    assert_refused(train("--retention-texts", texts, "--overwrite"), "retention_texts = .*, but retention = 0")


def test_held_out_pairs_are_reported(train):
    assert re.search(r"held out: accuracy [01]\.\d{3}, KL from the base \d", succeeded(train("--eval-fraction", 0.3)))


def test_held_out_pairs_are_evaluated_each_epoch_unless_told_otherwise(train, tmp_path):
    """2 of 7 pairs are held out; 5 pairs in batches of 2 are 3 steps an epoch."""
    batches = ("--per-device-train-batch-size", 2, "--max-steps", 6, "--eval-fraction", 0.3)
    best = ("--load-best-model-at-end", "--save-strategy", "epoch")
    steps = ("--eval-steps", 2)
    for extra, expected in (
        ((), [3, 6]),
        (best, [3, 6, 6]),
        (("--eval-strategy", "no"), [6]),
        (steps, [2, 4, 6]),
        ((*steps, "--eval-strategy", "epoch"), [3, 6]),
    ):
        assert "held out: accuracy" in succeeded(train(*batches, *extra, "--overwrite"))
        entries = read_log(tmp_path / "run" / "training_log.jsonl")
        assert [entry["step"] for entry in entries if "eval_loss" in entry] == expected


def test_a_streamed_dataset_can_be_trained_on(train):
    succeeded(train("--streaming"))


def test_the_base_s_states_are_kept_in_a_folder_and_a_batch_runs_in_parts(train, tmp_path):
    plain = ("--per-device-train-batch-size", 4, "--overwrite")
    losses = []
    for options in ((), ("--cache-base-states", tmp_path / "states", "--micro-batch-tokens", 40)):
        succeeded(train(*plain, *options))
        losses.append([e["loss"] for e in read_log(tmp_path / "run" / "training_log.jsonl") if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    kept = sorted(path.name for path in (tmp_path / "states").iterdir())
    assert kept == ["base_states.json", "pairs-00000000.safetensors"]


def test_tokens_are_kept_unless_told_otherwise(train, tmp_path, monkeypatch):
    """What was cut is said of kept tokens too. The threshold is lowered to what the file has."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "LEAST_ROWS", 7)
    weights = tmp_path / "run" / "adapters" / "default" / "adapter_model.safetensors"
    results = []
    for options, entries in ((("--cache-tokens", "false"), 0), ((), 1), ((), 1)):
        outcome = train("--max-length", 36, "--overwrite", *options)
        succeeded(outcome)
        results.append((outcome.err, weights.read_bytes()))
        assert len(list((tmp_path / "cache").glob("qadapter/*"))) == entries
    assert results[1:] == results[:1] * 2
    assert re.search("training pairs: 7 rows, 7 kept, 7 prompts truncated", results[0][0])


def test_several_files_are_mixed_by_weight(train, pairs, write_pairs, tmp_path):
    """7 pairs at a share of a half: all are used, with 7 of the 20 others; a batch of 14 is one epoch."""
    others = write_pairs([{"prompt": f"Other {n}?", "chosen": "a", "rejected": "b"} for n in range(20)])
    succeeded(train("--dataset", f"{pairs}=0.5", f"{others}=0.5", "--per-device-train-batch-size", 14))
    assert read_log(tmp_path / "run" / "training_log.jsonl")[-1]["epoch"] == 4


def test_held_out_pairs_may_come_from_a_file_of_their_own(train, write_pairs):
    held_out = write_pairs([{"prompt": "Who?", "chosen": "a", "rejected": "b"}], "held_out.jsonl")
    outcome = train("--eval-dataset", held_out)
    assert "held out: accuracy" in succeeded(outcome)
    assert outcome.err == ""


def test_held_out_pairs_may_be_another_split_of_the_hub_dataset(train, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, **_):
        asked.append((name, split))
        return datasets.Dataset.from_list([{"prompt": f"{split}?", "chosen": "a", "rejected": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = ("--dataset-split", "train_prefs", "--eval-split", "test_prefs")
    outcome = train(*splits, "--eval-dataset", "org/name", dataset="org/name")
    assert "held out: accuracy" in succeeded(outcome)
    assert (asked, outcome.err) == ([("org/name", "train_prefs"), ("org/name", "test_prefs")], "")


def test_held_out_pairs_whose_prompts_are_trained_on_are_warned_of(train, write_pairs):
    """Whether as text or as messages."""
    rows = [
        {"prompt": "Question 3?", "chosen": "a", "rejected": "b"},
        {"prompt": "Who?", "chosen": "a", "rejected": "b"},
    ]
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    for held_out in (rows, chats):
        outcome = train("--overwrite", "--eval-dataset", write_pairs(held_out, "held_out.jsonl"))
        succeeded(outcome)
        assert outcome.err.startswith("warning: 1 of 2 held-out pairs have a prompt that is trained on")


def test_the_adapter_finds_its_base_from_another_folder(base, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    folder = tmp_path / "run"
    succeeded(qadapter("train", "--model", base.name, "--dataset", pairs, "--output-dir", folder, "--max-steps", 1))
    monkeypatch.chdir(folder)
    succeeded(qadapter("generate", ".", "--prompt", PROMPT, *SHORT))


def test_dropped_bad_rows_are_said_and_the_rest_is_trained_on(train, write_pairs):
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(3)] + [b"{"]
    outcome = train("--drop-bad-rows", dataset=write_pairs(rows))
    succeeded(outcome)
    assert re.search(r"^warning: .*dropped 1 of 4 rows \(unreadable: 1\)", outcome.err, re.MULTILINE)


def test_a_prompt_beyond_the_limit_is_cut_and_said(train, write_pairs):
    rows = [
        {"prompt": "Short?", "chosen": "a", "rejected": "b"},
        {"prompt": "x" * 100, "chosen": "a", "rejected": "b"},
    ]
    outcome = train("--max-length", 40, dataset=write_pairs(rows))
    succeeded(outcome)
    assert outcome.err == "warning: training pairs: 2 rows, 2 kept, 1 prompts truncated\n"


def test_an_answer_beyond_the_limit_is_left_out_and_said(train, write_pairs):
    rows = [
        {"prompt": "Short?", "chosen": "a", "rejected": "b"},
        {"prompt": "Long?", "chosen": "a" * 100, "rejected": "b"},
    ]
    outcome = train("--max-length", 40, dataset=write_pairs(rows))
    succeeded(outcome)
    counted, explained = outcome.err.splitlines()
    assert counted == "warning: training pairs: 2 rows, 1 kept, 1 dropped (answer too long: 1)"
    assert explained.startswith("warning: training pairs: answer too long, row 2: the longer answer has 101 tokens")
    assert explained.endswith("raise max_length to keep such rows.")


def changed_config(base, folder, **changes):
    """A copy of a base's folder with other values in its config.json; its weights are never read."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 20}, "the pairs hold token [0-9]+, but the base's embeddings have 20 rows"),
        ({"model_type": "gpt2", "max_position_embeddings": 9}, "7 of 7 pairs are longer than the base's 9 positions"),
    ],
)
def test_pairs_that_the_base_cannot_run_are_refused_by_check_and_training(train, base, pairs, tmp_path, changes, match):
    small = changed_config(base, tmp_path / "small", **changes)
    assert_refused(train(model=small), match, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    outcome = qadapter("data", "check", pairs, "--model", small, "--json")
    assert outcome.code == 1
    assert re.search(match, json.loads(outcome.out)["tokenisation_error"])
