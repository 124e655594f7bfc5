"""Requests beside each other, with strengths of their own, or ended midway; and the memory that they take."""

import pytest
from models import lora
from served import MIXED, UPPER, assert_same, cache_tokens, engine, exported, greedy, prompts, tiny_folder

STRENGTHS = [0.0, 1.0, 0.3, -0.5, 1.7, 1.0]


def answers_at(llm, rows, strengths, tokens=16):
    """Greedy answers of one batch with a strength for each row."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, extra_args=extra)
        for extra in ({} if strength is None else {"qadapter_strength": strength} for strength in strengths)
    ]
    inputs = [{"prompt_token_ids": row} for row in rows]
    return [output.outputs[0] for output in llm.generate(inputs, parameters, use_tqdm=False)]


def test_each_request_has_its_own_strength(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    policy, _ = tiny_folder(tmp_path)
    rows = prompts(*MIXED)
    with engine(exported(policy, tmp_path / "out"), max_num_batched_tokens=32) as llm:
        answers = answers_at(llm, rows, STRENGTHS)
        for row, answer, strength in zip(rows, answers, STRENGTHS, strict=True):
            assert_same(policy, [row], [answer], strength=strength)
        # The same prompts again: their prefixes are cached, the strengths are others, slots are used again.
        answers = answers_at(llm, rows, [None, 0.2, None, 1.0, 0.0, None])
        for row, answer, strength in zip(rows, answers, [0.7, 0.2, 0.7, 1.0, 0.0, 0.7], strict=True):
            assert_same(policy, [row], [answer], strength=strength)
        with pytest.raises(ValueError, match="must be a finite number"):
            answers_at(llm, rows[:1], [float("nan")])


def test_a_strength_that_the_engine_would_ignore_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    policy, _ = tiny_folder(tmp_path)
    with engine(exported(policy, tmp_path / "out")) as llm:
        with pytest.raises(ValueError, match="needs vLLM's V2 model runner"):
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
