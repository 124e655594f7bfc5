"""Benchmarks through lm-eval: our path against its own, and answers sampled from the policy and nothing else."""

import pytest
import torch
from benchmark_tasks import LETTERS, SUMS, letter_task, sum_task, writing_task
from models import plain_peft, tiny_policy, tiny_tokenizer

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qadapter.evaluation.forgetting import run_tasks
from qadapter.evaluation.harness import PolicyLM, load_tasks


def test_numbers_of_the_base_equal_those_of_lm_evals_own_path(base, policy, tmp_path):
    tasks = [sum_task(tmp_path), letter_task(tmp_path), writing_task(tmp_path)]
    tokenizer = tiny_tokenizer()
    ours = run_tasks(policy, tokenizer, tasks, {"policy": {"strength": 1.0}}, batch_size=3)["tasks"]
    # The same tasks, but model and evaluation are lm-eval's alone.
    manager = load_tasks(tasks).manager
    lm = HFLM(pretrained=base, tokenizer=tiny_tokenizer(), batch_size=3)
    own = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    for task, metric in (("sums", "acc"), ("letters", "acc"), ("writing", "exact_match")):
        samples = sorted(own["samples"][task], key=lambda sample: sample["doc_id"])
        assert ours[task]["scores"]["base"] == [sample[metric] for sample in samples]
        assert ours[task]["columns"]["base"]["value"] == pytest.approx(own["results"][task][f"{metric},none"])
        assert ours[task]["n"] == len(samples)
    assert ours["writing"]["answers"]["base"] == [sample["resps"][0][0] for sample in own["samples"]["writing"]]


def test_likelihoods_of_strength_zero_equal_the_bare_base_bit_by_bit(base, policy):
    requests = [
        Instance("loglikelihood", {}, (question, f" {answer}"), index, ("t", index, 1))
        for index, (question, answer) in enumerate(SUMS)
    ]
    bare = HFLM(pretrained=base, tokenizer=tiny_tokenizer(), batch_size=4).loglikelihood(requests)
    lm = PolicyLM(policy, tiny_tokenizer(), 4, lambda name, total: lambda done: None)
    with policy.dial(strength=0.0):
        assert lm.loglikelihood(requests) == bare
    assert lm.loglikelihood(requests) != bare  # the policy's own


def test_generating_tasks_sample_from_the_policy_not_from_its_lora_or_base(base, policy, tmp_path):
    task, tokenizer = writing_task(tmp_path), tiny_tokenizer()
    answers = run_tasks(policy, tokenizer, [task], {"policy": {}, "half": {"strength": 0.5}})["tasks"]["writing"][
        "answers"
    ]
    for column, strength in (("base", 0.0), ("policy", 1.0), ("half", 0.5)):
        expected = []
        for question, _ in LETTERS[:7]:
            ids = torch.tensor([tokenizer(question)["input_ids"]])
            output = policy.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, strength=strength
            )
            expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split("~")[0])
        assert answers[column] == expected
    plain = HFLM(pretrained=plain_peft(base, policy).get_base_model(), tokenizer=tokenizer, batch_size=8)
    samples = simple_evaluate(model=plain, tasks=[task], task_manager=load_tasks([task]).manager)["samples"]["writing"]
    lora_answers = [sample["resps"][0][0] for sample in samples]
    assert all(a != b for a, b in zip(answers["policy"], lora_answers, strict=True))
    assert all(a != b for a, b in zip(answers["policy"], answers["base"], strict=True))
    assert answers["half"] != answers["policy"]


def test_the_same_call_gives_the_same_numbers_even_when_sampling(policy, tmp_path):
    task = writing_task(tmp_path, do_sample=True, temperature=1.0)
    calls = [run_tasks(policy, tiny_tokenizer(), [task], {"p": {}}, seed=seed) for seed in (3, 3, 4)]
    assert calls[0] == calls[1]
    assert calls[0]["tasks"]["writing"]["answers"] != calls[2]["tasks"]["writing"]["answers"]


def test_model_and_tokenizer_are_left_as_they_were(base, tmp_path):
    policy, tokenizer = tiny_policy(base).train(), tiny_tokenizer()
    tokenizer.pad_token = None
    policy.strength, policy.max_kl = 0.7, 0.1
    weights = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    run_tasks(policy, tokenizer, [letter_task(tmp_path)], {"p": {"strength": 0.2, "max_kl": 0.01}}, limit=2)
    assert policy.training
    assert (policy.strength, policy.max_kl, policy.adapter_weights) == (0.7, 0.1, {"default": 1.0})
    assert tokenizer.pad_token is None
    assert all(torch.equal(parameter, weights[name]) for name, parameter in policy.named_parameters())


def test_every_setting_of_a_column_reaches_the_model(policy, tmp_path):
    columns = {
        "zero": {"strength": 0.0},
        "weightless": {"adapter_weights": {"default": 0.0}},
        "capped": {"max_kl": 0.0},
        "full": {"strength": 1.0},
    }
    answers = run_tasks(policy, tiny_tokenizer(), [writing_task(tmp_path)], columns)["tasks"]["writing"]["answers"]
    assert answers["zero"] == answers["weightless"] == answers["capped"] == answers["base"]
    assert answers["full"] != answers["base"]


def test_one_pass_for_all_columns_gives_the_same_scores(policy, tmp_path):
    tasks = [sum_task(tmp_path), letter_task(tmp_path), writing_task(tmp_path)]
    columns = {str(strength): {"strength": strength} for strength in (0.5, 1.0, 1.5)}
    apart, shared = (
        run_tasks(policy, tiny_tokenizer(), tasks, columns, limit=9, shared=shared)["tasks"] for shared in (False, True)
    )
    assert shared == apart
