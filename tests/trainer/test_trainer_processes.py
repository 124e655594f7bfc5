"""Two processes train as one does with the batch of both: on the CPU, where gloo connects them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from two_processes import (
    in_two_processes,
    run_command,
    train,
    train_sharded,
    train_with_kept_states,
    trained,
    trained_retaining,
)

from benchmarks.experiments.tiny import write_tiny_base
from qadapter.cli import main
from qadapter.modeling.manifest import read_manifest
from qadapter.training_log import LOG_NAME, read_log

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo, over which processes on a CPU meet",
)
CONFIGS = Path(__file__).parents[2] / "configs"
FSDP2 = CONFIGS / "accelerate" / "fsdp2.yaml"
WEIGHTS = Path("adapters/default/adapter_model.safetensors")


def assert_same_run(folder, expected):
    """Logs and adapters agree up to float32 rounding: sums over a batch have another order."""
    entries, twins = read_log(folder / LOG_NAME), read_log(expected / LOG_NAME)
    for entry, twin in zip(entries, twins, strict=True):
        assert entry.keys() == twin.keys()
        figures = [name for name in twin if not name.endswith(("runtime", "per_second"))]
        for name in figures:
            assert entry[name] == pytest.approx(twin[name], rel=1e-4, abs=1e-5), name
    weights, twins = load_file(folder / WEIGHTS), load_file(expected / WEIGHTS)
    assert weights.keys() == twins.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, twins[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "epoch"},
        {"gradient_accumulation_steps": 2, "micro_batch_tokens": 24, "packing": False},
    ],
    ids=["plain", "accumulated in parts"],
)
@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path, options):
    """Five held-out pairs fill no batch of four: none of them counts twice."""
    in_two_processes(train, tmp_path, tmp_path / "two", 2, options)
    trained(tmp_path / "one", 4, **options)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_two_processes_share_the_work_of_keeping_the_bases_states(tmp_path):
    options = {"cache_base_states": str(tmp_path / "states")}
    in_two_processes(train_with_kept_states, tmp_path, tmp_path / "two", 2, options)
    trained(tmp_path / "one", 4)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_two_processes_hold_to_the_base_on_the_same_texts(tmp_path):
    """Also in a step of which only one of them has a text."""
    in_two_processes(trained_retaining, tmp_path, tmp_path / "two", 2)
    trained_retaining(tmp_path / "one", 4)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def fsdp2_settings():
    return yaml.safe_load(FSDP2.read_text())["fsdp_config"]


# transformers 5.23 has a new name for it, which 5.19 does not know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_fsdp2_trains_saves_and_evaluates_as_one_process(tmp_path):
    options = {"gradient_checkpointing": True}
    in_two_processes(train_sharded, tmp_path, tmp_path / "two", 2, options, fsdp2_settings())
    trained(tmp_path / "one", 4, **options)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert two.base["fingerprint"] == one.base["fingerprint"]
    assert two.probe["logps"].keys() == one.probe["logps"].keys()
    for name, logps in one.probe["logps"].items():
        assert two.probe["logps"][name] == pytest.approx(logps, abs=1e-4)


def test_fsdp2_in_bfloat16_does_not_round_the_statistics(tmp_path):
    """A new adapter says what the base says, at every token."""
    options = {"new": True, "bf16": True, "max_steps": 1}
    in_two_processes(train_sharded, tmp_path, tmp_path / "run", 2, options, fsdp2_settings())
    entry = read_log(tmp_path / "run" / LOG_NAME)[0]
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert entry["qadapter/kl"] == pytest.approx(0, abs=1e-6)


def test_one_process_speaks_for_both(tmp_path):
    rows = [{"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, not {n}."} for n in range(8)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["--model", write_tiny_base(tmp_path / "base"), "--dataset", pairs, "--output-dir", tmp_path / "run"]
    own += ["--eval-dataset", pairs, "--use-cpu", "--max-steps", 1]  # of which it warns
    in_two_processes(run_command, tmp_path, tmp_path / "said", ["train", *map(str, own)])
    said = (tmp_path / "said.0").read_text()
    for words in ("warning: 8 of 8 held-out pairs", "held out: accuracy", "adapter written to"):
        assert said.count(words) == 1
    assert (tmp_path / "said.1").read_text() == ""


def test_zero3_trains_and_saves_as_one_process(tmp_path):
    """The recipe as it is started, by accelerate and its file, on two CPU processes in float32."""
    pytest.importorskip("deepspeed", reason="deepspeed is not among the tests' packages: pip install deepspeed")
    settings = yaml.safe_load((CONFIGS / "accelerate" / "zero3.yaml").read_text())
    file = tmp_path / "zero3.yaml"
    file.write_text(yaml.safe_dump(settings | {"num_processes": 2, "mixed_precision": "no"}))
    rows = [{"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, not {n}."} for n in range(24)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["train", "--config", CONFIGS / "llama-3.1-8b-dsp-zero3.yaml", "--model", write_tiny_base(tmp_path / "base")]
    own += ["--dataset", pairs, "--use-cpu", "--bf16", "false", "--dtype", "float32", "--max-steps", 3]
    own += ["--logging-steps", 1, "--output-dir"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*map(str, [*launch, "-m", "qadapter", *own, tmp_path / "two"])], env=environment, check=True, timeout=600
    )
    assert main([*map(str, [*own, tmp_path / "one", "--per-device-train-batch-size", 2])]) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert two.base["fingerprint"] == one.base["fingerprint"]
