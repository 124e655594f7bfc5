"""Prompts that come back with what the policy makes of their tokens: texts are scored over HTTP, as lm-eval does."""

import json

import openai
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from models import tiny_tokenizer
from served import CONTEXT, RunningServer, dial, error_of, greedy_text, two_adapters

from qadapter.evaluation.columns import Column
from qadapter.evaluation.harness import PolicyLM
from qadapter.evaluation.progress import silent

FIRST, SECOND = {"first": 1.0}, {"second": 1.0}
POLICIES = {
    "base": ("base", {}, {"strength": 0.0}),
    "full strength": ("formal", {}, {"adapter_weights": FIRST}),
    "one stream": ("concise", {}, {"adapter_weights": SECOND}),
    "beyond": ("concise", {"strength": 1.5}, {"strength": 1.5, "adapter_weights": SECOND}),
    "weights": ("both", {"weights": {"formal": 0.4, "both": 0.8}}, {"adapter_weights": {"first": 0.8, "second": 0.4}}),
    "capped": ("formal", {"max_kl": 0.1}, {"adapter_weights": FIRST, "max_kl": 0.1}),
    "thresholded": (
        "formal",
        {"strength": 1.5, "min_kl": 0.2},
        {"strength": 1.5, "min_kl": 0.2, "adapter_weights": FIRST},
    ),
    "decaying": ("formal", {"decay": 0.5}, {"adapter_weights": FIRST}),  # the prompt comes before the answer
}  # fmt: skip
PROMPT = "tell me why"


def scored(client, prompt, model="formal", options=None, **request):
    request = {"max_tokens": 0, "logprobs": 2, "temperature": 0.0, "echo": True, **request}
    return client.completions.create(model=model, prompt=prompt, extra_body=dial(**(options or {})), **request)


def defined(model, ids, **arguments):
    """The slow twin: log-probabilities (T - 1, V) of what follows each token, from the model's own forward."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False, **arguments).logits[0, :-1].log_softmax(-1)


def assert_defined(choice, model, ids, **arguments):
    logps = defined(model, ids, **arguments)
    found = choice.logprobs
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    own = logps.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.tensor(found.token_logprobs[1:]), own, rtol=1e-4, atol=1e-4)
    likeliest = torch.tensor([max(top.values()) for top in found.top_logprobs[1:]])
    torch.testing.assert_close(likeliest, logps.max(-1).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tokens_of_a_prompt_are_scored_by_the_policy(server, client, policy):
    name, options, arguments = POLICIES[policy]
    answer = scored(client, PROMPT, name, options)
    (choice,) = answer.choices
    assert_defined(choice, server.service.engine._decoder.model, tiny_tokenizer().encode(PROMPT), **arguments)
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert choice.logprobs.tokens == list(PROMPT)
    assert choice.logprobs.text_offset == list(range(len(PROMPT)))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 0)


def test_an_answer_follows_its_prompt(client):
    alone = client.completions.create(model="formal", prompt=PROMPT, temperature=0.0, max_tokens=5, logprobs=1, n=2)
    echoed = scored(client, PROMPT, max_tokens=5, logprobs=1, n=2)
    for one, other in zip(alone.choices, echoed.choices, strict=True):
        assert other.text == PROMPT + one.text
        assert other.logprobs.tokens == [*PROMPT, *one.logprobs.tokens]
        answer = other.logprobs.token_logprobs[len(PROMPT) :]
        assert answer == pytest.approx(one.logprobs.token_logprobs, rel=1e-4, abs=1e-4)
        assert other.finish_reason == one.finish_reason
    assert echoed.usage == alone.usage


def test_a_stop_string_in_the_prompt_does_not_stop(client):
    stopped = scored(client, "a b", max_tokens=4, stop=[" "])
    assert stopped.choices[0].text.startswith("a b")
    assert " " not in stopped.choices[0].text.removeprefix("a b")


def test_an_echo_without_logprobs_is_text_only(client):
    (choice,) = scored(client, PROMPT, logprobs=None).choices
    assert (choice.text, choice.logprobs) == (PROMPT, None)


def test_a_stream_begins_with_the_prompt(client):
    pieces = list(scored(client, PROMPT, max_tokens=3, stream=True))
    assert pieces[0].choices[0].text == PROMPT
    assert len(pieces[0].choices[0].logprobs.tokens) == len(PROMPT)
    whole = scored(client, PROMPT, max_tokens=3).choices[0]
    assert "".join(piece.choices[0].text for piece in pieces) == whole.text
    only = list(scored(client, PROMPT, stream=True))
    assert [(piece.choices[0].text, piece.choices[0].finish_reason) for piece in only] == [(PROMPT, "length")]


@pytest.mark.parametrize("budget", [3, 8, 64])
def test_prompts_of_all_lengths_in_pieces_equal_each_alone(budget, monkeypatch):
    """Budgets smaller than a prompt take it in several pieces; and logits of few columns are made at a time."""
    monkeypatch.setattr("qadapter.serving.decoder.WATCHED_LOGITS", 500)
    model = two_adapters()
    running = RunningServer(model, prefill_tokens=budget)
    prompts = [[5, 9, 33], [7], list(range(2, 25)), [11, 12], list(range(40, 57))]
    try:
        with running.client() as client:
            choices = scored(client, prompts).choices
            mixed = client.completions.create(model="base", prompt=[*prompts, *prompts], max_tokens=1)
            pieces = [piece.choices[0] for piece in scored(client, prompts[2], stream=True)]
        assert len(mixed.choices) == 10
        assert len(pieces) == -(-len(prompts[2]) // budget)  # nobody waits longer than for a chunk
        assert [token for piece in pieces for token in piece.logprobs.tokens] == choices[2].logprobs.tokens
        for prompt, choice in zip(prompts, choices, strict=True):
            assert len(choice.logprobs.tokens) == len(prompt)
            assert_defined(choice, model, prompt, adapter_weights=FIRST)
    finally:
        running.stop()


def test_the_whole_context_can_be_scored(client):
    assert len(scored(client, [5] * CONTEXT).choices[0].logprobs.tokens) == CONTEXT
    with pytest.raises(openai.BadRequestError, match="shorten one of them"):
        scored(client, [5] * CONTEXT, max_tokens=1)


def test_what_is_no_echo_is_refused(server):
    for path, body, param in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "echo": 1}, "echo"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "echo": True}, "echo"),
    ):
        assert error_of(server.post(path, json.dumps({"model": "formal", **body})), 400)["param"] == param


def test_scores_that_are_not_finite_fail_their_own_request_only(server, client, monkeypatch):
    model = server.service.engine._decoder.model
    broken = model.base.lm_head.weight.clone()
    broken[7] = torch.nan
    with monkeypatch.context() as patched:
        patched.setattr(model.base.lm_head.weight, "data", broken)
        with pytest.raises(openai.InternalServerError, match="not finite"):
            scored(client, PROMPT)
    assert scored(client, PROMPT).choices[0].text == PROMPT


@pytest.mark.parametrize(("name", "strength"), [("base", 0.0), ("formal", 1.0), ("formal@0.5", 0.5)])
def test_lm_evals_own_client_scores_as_lm_eval_does_here(server, name, strength, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    remote = LocalCompletionsAPI(
        model=name, base_url=f"{server.url}/v1/completions", tokenizer=str(tmp_path), tokenizer_backend="huggingface",
        max_length=CONTEXT, batch_size=3,
    )  # fmt: skip
    policy = server.service.engine._decoder.model
    with Column(name, strength, adapter_weights=FIRST).applied(policy):
        local = PolicyLM(policy, tokenizer, 3, silent, name)
        likeliest = greedy_text(policy, tokenizer.encode("tell me"), 2)
        for kind, arguments in (
            ("loglikelihood", [("why is it", " so"), ("tell me", likeliest), ("a", "b")]),  # and whether it is greedy
            ("loglikelihood_rolling", [("one two",), ("three",)]),
        ):
            requests = [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]
            found, expected = (torch.tensor(getattr(lm, kind)(requests)) for lm in (remote, local))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
