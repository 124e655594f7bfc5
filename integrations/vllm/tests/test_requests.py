"""Requests beside each other, with strengths of their own, or ended midway; and the memory that they take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import lora
from served import MIXED, UPPER, answers_at, assert_same, cache_tokens, engine, exported, greedy, prompts, tiny_folder
from vllm.exceptions import VLLMValidationError


def test_each_request_has_its_own_strength_on_the_v2_runner():
    """In a process of its own: Triton's interpreter must be chosen before anything is imported."""
    cases = Path(__file__).with_name("v2_runner_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(cases)]
    outcome = subprocess.run(command, env=os.environ | v2_environment(), capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stdout[-4000:]
    assert "3 passed" in outcome.stdout


def v2_environment():
    return {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def test_a_strength_that_the_engine_would_ignore_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    policy, _ = tiny_folder(tmp_path)
    with engine(exported(policy, tmp_path / "out")) as llm:
        with pytest.raises(VLLMValidationError, match="needs vLLM's V2 model runner"):
            answers_at(llm, prompts(5), [0.5])
        assert len(answers_at(llm, prompts(5), [None], tokens=3)[0].token_ids) == 3


def test_a_request_ended_midway_leaves_the_others_alone(tmp_path):
    from vllm import SamplingParams

    policy, _ = tiny_folder(tmp_path)
    rows = prompts(*MIXED)
    parameters = SamplingParams(temperature=0, max_tokens=16, logprobs=5, ignore_eos=True)
    with engine(exported(policy, tmp_path / "out")) as llm:
        running = {
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": row}, parameters): row
            for index, row in enumerate(rows)
        }
        ended, finished = list(running)[2], {}
        for step in range(200):
            if step == 5:
                llm.llm_engine.abort_request([ended], internal=True)
            for output in llm.llm_engine.step():
                if output.finished:
                    finished[output.request_id] = output
            if not llm.llm_engine.has_unfinished_requests():
                break
        answers = [finished[str(index)] for index in range(len(rows)) if index != 2]
        assert "2" not in finished or len(finished["2"].outputs[0].token_ids) < 16
        assert_same(policy, [rows[i] for i in range(len(rows)) if i != 2], [answer.outputs[0] for answer in answers])


@pytest.mark.parametrize(("targets", "share"), [("all-linear", 1 / 2), (UPPER, 2 / 3)])
def test_the_engine_counts_the_second_cache(tmp_path, targets, share):
    policy, base = tiny_folder(tmp_path, peft_config=lora(target_modules=targets))
    with engine(base) as llm:
        whole = cache_tokens(llm)
    with engine(exported(policy, tmp_path / "out")) as llm:
        assert cache_tokens(llm) == pytest.approx(whole * share, rel=0.02)
        rows = prompts(*[150] * 40)  # more than fits at once
        assert_same(policy, rows[-3:], greedy(llm, rows, tokens=4)[-3:])
