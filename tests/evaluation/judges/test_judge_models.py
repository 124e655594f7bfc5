"""Reward models and pair rankers as judges, and the models that are none."""

import pytest
import torch
from models import tiny_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from qadapter import QAdapterError
from qadapter.evaluation.judges import Verdict, judge_all, make_judge, win_rate
from qadapter.evaluation.judges.models import PairJudge, RewardJudge


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory):
    return save_scorer(tmp_path_factory.mktemp("scorer"))


def save_scorer(folder, labels=1, template=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, num_labels=labels,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(template=None)
    tokenizer.save_pretrained(folder)
    return folder


def expected_score(folder, text):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(**tiny_tokenizer()(text, return_tensors="pt", return_token_type_ids=False)).logits)


def test_reward_judge_prefers_the_higher_score_of_the_chat(scorer_folder):
    scores = [expected_score(scorer_folder, f"user hello assistant {answer} ") for answer in ("yes", "no")]
    winner = "a" if scores[0] > scores[1] else "b"
    judge = make_judge(f"reward:{scorer_folder}")
    mirrored = {"a": "b", "b": "a"}[winner]
    verdicts = judge_all(judge, ["hello", [{"role": "user", "content": "hello"}], "hello"],
                         ["yes", "no", "yes"], ["no", "yes", "yes"])  # fmt: skip
    assert [verdict.winner for verdict in verdicts] == [winner, mirrored, "tie"]
    assert f"{scores[0]:.4g}" in verdicts[0].reason
    assert win_rate(verdicts).order_bias is None


def test_reward_judge_without_template_scores_the_pair(tmp_path):
    save_scorer(tmp_path, template=False)
    scores = [expected_score(tmp_path, f"hello{answer}") for answer in ("yes", "no")]
    (verdict,) = judge_all(RewardJudge.load(tmp_path), ["hello"], ["yes"], ["no"])
    assert verdict.winner == ("a" if scores[0] > scores[1] else "b")


def test_pair_judge_asks_both_orders(scorer_folder):
    def score(first, second):
        return expected_score(scorer_folder, f"<|source|>hi<|candidate1|>{first}<|candidate2|>{second}")

    signs = [score("yes", "no") > 0, score("no", "yes") > 0]
    (verdict,) = judge_all(make_judge(f"pair:{scorer_folder}"), ["hi"], ["yes"], ["no"])
    assert verdict.flipped == (signs[0] == signs[1])
    assert verdict.winner == ("tie" if verdict.flipped else "a" if signs[0] else "b")


class Constant:
    """A scorer that always says the same."""

    tokenizer = tiny_tokenizer()

    def __init__(self, value):
        self.value = value

    def score(self, ids):
        return self.value


def test_a_pair_ranker_that_always_takes_the_first_is_all_order_bias():
    verdicts = judge_all(PairJudge(Constant(1.0)), ["p"] * 4, ["a"] * 4, ["b"] * 4)
    assert {verdict.winner for verdict in verdicts} == {"tie"}
    assert win_rate(verdicts).order_bias.value == 1.0


def test_a_text_too_long_or_a_score_that_is_no_number_gives_no_verdict(scorer_folder):
    judge = RewardJudge.load(scorer_folder)
    verdicts = judge_all(judge, ["p"], ["x" * 200], ["y"])
    assert verdicts[0].winner is None
    assert "tokens are more than the judge's 128" in verdicts[0].reason
    torch.nn.init.constant_(judge.scorer.model.score.weight, float("nan"))
    (verdict,) = judge_all(judge, ["p"], ["x"], ["y"])
    assert verdict == Verdict(None, "the judge's score is nan")


def test_a_conversation_that_the_template_refuses_gives_no_verdict(scorer_folder):
    judge = RewardJudge.load(scorer_folder)
    judge.scorer.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    refused, judged = judge_all(judge, [chat, chat[1:]], ["yes", "yes"], ["no", "no"])
    assert refused.winner is None
    assert "no system role" in refused.reason
    assert judged.winner in ("a", "b")


def test_a_judge_trained_anew_in_its_folder_is_another_judge(tmp_path):
    before, again = (RewardJudge.load(save_scorer(tmp_path)).scorer.fingerprint() for _ in range(2))
    assert before == again
    model = LlamaForSequenceClassification.from_pretrained(tmp_path)
    model.score.weight.data += 1
    model.save_pretrained(tmp_path)
    assert RewardJudge.load(tmp_path).scorer.fingerprint() != before


def test_models_that_are_no_judges_are_refused(tmp_path):
    save_scorer(tmp_path / "two", labels=2)
    with pytest.raises(QAdapterError, match="has 2 scores: a judge has one"):
        make_judge(f"reward:{tmp_path / 'two'}")
    folder = save_scorer(tmp_path / "bare")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.model.save_pretrained(folder)  # the language model without its head
    with pytest.raises(QAdapterError, match="no weights for .*score.weight.*: its head would be random"):
        make_judge(f"reward:{folder}")


def test_only_safetensors_are_loaded(tmp_path):
    folder = save_scorer(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(QAdapterError, match="cannot be loaded"):
        make_judge(f"reward:{folder}")
