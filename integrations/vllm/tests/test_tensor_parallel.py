"""Two ranks, each with half of the weights, the updates and the caches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from served import MIXED, assert_same, exported, prompts, tiny_folder

SCRIPT = """
import json, sys
from served import engine, greedy, prompts, MIXED

if __name__ == "__main__":
    with engine(sys.argv[1], tensor_parallel_size=2) as llm:
        answers = greedy(llm, prompts(*MIXED))
    rows = [
        (list(a.token_ids), [{token: entry.logprob for token, entry in d.items()} for d in a.logprobs]) for a in answers
    ]
    json.dump(rows, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
def test_tensor_parallel_over_two_ranks(tmp_path):
    # Two key-value heads, so that the ranks' shares differ; qwen2 has biases, too.
    policy, _ = tiny_folder(tmp_path, "qwen2", num_key_value_heads=2)
    folder = exported(policy, tmp_path / "out")
    script, result = tmp_path / "ranks.py", tmp_path / "answers.json"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": f"{here}:{here.parents[2] / 'tests'}",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, str(script), str(folder), str(result)]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.exists(), outcome.stdout[-3000:] + outcome.stderr[-3000:]
    answers = [
        SimpleNamespace(
            token_ids=tokens,
            logprobs=[{int(token): SimpleNamespace(logprob=value) for token, value in row.items()} for row in rows],
        )
        for tokens, rows in json.loads(result.read_text())
    ]
    assert_same(policy, prompts(*MIXED), answers)
