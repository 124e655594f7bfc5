"""Cases for vLLM's V2 model runner, run by test_requests.py with TRITON_INTERPRET=1."""

import pytest
import v2_stand_in  # noqa: F401 -- before anything of vLLM's
from served import MIXED, answers_at, assert_same, engine, exported, metric, prompts, tiny_folder
from test_parity import ALIKE
from vllm.exceptions import VLLMValidationError

STRENGTHS = [0.0, 1.0, 0.3, -0.5, 1.7, 1.0]


def test_each_request_has_its_own_strength(tmp_path):
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
        for wrong, message in [(float("nan"), "must be a finite number"), (1e39, "must lie within ±10000")]:
            with pytest.raises(VLLMValidationError, match=message):
                answers_at(llm, rows[:1], [wrong])
        assert_same(policy, rows[:1], answers_at(llm, rows[:1], [0.3]), strength=0.3)


def test_one_stream_refuses_strengths_unless_the_dial_is_kept(tmp_path):
    policy, _ = tiny_folder(tmp_path, config=ALIKE)
    folder = exported(policy, tmp_path / "out", strength=1.0)
    rows = prompts(*MIXED)
    with engine(folder) as llm:
        with pytest.raises(VLLMValidationError, match="this server runs one stream"):
            answers_at(llm, rows[:1], [0.5])
        assert_same(policy, rows, answers_at(llm, rows, [None] * 6), strength=1.0)
    with engine(folder, hf_overrides={"qadapter": {"dial": True}}) as llm:
        for row, answer, strength in zip(rows, answers_at(llm, rows, STRENGTHS), STRENGTHS, strict=True):
            assert_same(policy, [row], [answer], strength=strength)


def test_a_draft_model_changes_nothing(tmp_path):
    policy, base = tiny_folder(tmp_path)
    drafts = {"method": "draft_model", "model": str(base), "num_speculative_tokens": 2}
    rows = prompts(*MIXED)
    with engine(exported(policy, tmp_path / "out"), speculative_config=drafts) as llm:
        for row, answer, strength in zip(rows, answers_at(llm, rows, STRENGTHS, tokens=40), STRENGTHS, strict=True):
            assert_same(policy, [row], [answer], strength=strength)
        drafted, accepted = (metric(llm, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
        assert 0 < accepted < drafted
