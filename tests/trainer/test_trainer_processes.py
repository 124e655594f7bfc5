"""Two processes train as one does with the batch of both: on the CPU, where gloo connects them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import in_two_processes, train, trained

from qadapter.training_log import LOG_NAME, read_log

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo, over which processes on a CPU meet",
)
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
def test_two_processes_train_and_evaluate_as_one(tmp_path, options):
    """Five held-out pairs fill no batch of four: none of them counts twice."""
    in_two_processes(train, tmp_path, tmp_path / "two", 2, options)
    trained(tmp_path / "one", 4, **options)
    assert_same_run(tmp_path / "two", tmp_path / "one")
