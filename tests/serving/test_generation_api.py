"""Both endpoints through OpenAI's own client: what is answered, and in which shape."""

import json

import openai
import pytest
import torch
from models import tiny_tokenizer
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_content_part_text_param import ChatCompletionContentPartTextParam
from served import RunningServer, chat, dial, greedy_text, prompt_ids_of

from qadapter import OffInside
from qadapter.serving.schema import IGNORED, UNSUPPORTED, ChatRequest, CompletionRequest, TextPart

GREEDY = {"temperature": 0.0, "max_tokens": 24}
FIRST, SECOND = {"first": 1.0}, {"second": 1.0}
# Request (model, dial) and the same policy as arguments of the model's forward.
POLICIES = {
    "base": ("base", {}, {"strength": 0.0}),
    "full strength": ("formal", {}, {"adapter_weights": FIRST}),
    "one stream": ("concise", {}, {"adapter_weights": SECOND}),
    "half strength": ("formal", {"strength": 0.5}, {"strength": 0.5, "adapter_weights": FIRST}),
    "beyond": ("concise", {"strength": 1.5}, {"strength": 1.5, "adapter_weights": SECOND}),
    "reversed": ("concise", {"strength": -1.0}, {"strength": -1.0, "adapter_weights": SECOND}),
    "strength 0": ("formal", {"strength": 0.0}, {"strength": 0.0}),
    "named mix": ("both", {}, {"adapter_weights": {"first": 0.5, "second": 0.5}}),
    "weights": (
        "formal",
        {"weights": {"formal": 0.4, "concise": 0.8}, "strength": 0.9},
        {"strength": 0.9, "adapter_weights": {"first": 0.4, "second": 0.8}},
    ),
    "capped": ("formal", {"max_kl": 0.1}, {"adapter_weights": FIRST, "max_kl": 0.1}),
    "thresholded": (
        "formal",
        {"strength": 1.5, "min_kl": 0.3},
        {"strength": 1.5, "min_kl": 0.3, "adapter_weights": FIRST},
    ),
    "decaying": (
        "formal",
        {"strength": 2.0, "decay": 0.7},
        {"strength": 2.0, "decay": 0.7, "adapter_weights": FIRST},
    ),
    "capped at 0": ("concise", {"max_kl": 0.0}, {"strength": 0.0}),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_an_answer_is_the_policys(server, client, policy):
    name, options, arguments = POLICIES[policy]
    answer = chat(client, "tell me", name, **GREEDY, extra_body=dial(**options))
    expected = greedy_text(server.service.engine._decoder.model, prompt_ids_of("tell me"), 24, **arguments)
    assert answer.choices[0].message.content == expected
    assert answer.model == name


def test_policies_of_this_test_differ(client):
    texts = {
        chat(client, "tell me", name, **GREEDY, extra_body=dial(**options)).choices[0].message.content
        for name, options, _ in POLICIES.values()
    }
    assert len(texts) >= 9  # three of them are the base


@pytest.mark.parametrize("options", [{}, {"decay": 0.8}, {"min_kl": 0.3}, {"max_kl": 0.1}], ids=str)
def test_an_answer_off_inside_is_what_generate_makes_of_the_condition(server, client, monkeypatch, options):
    """With a rule that turns the adapter off and on again every few characters."""
    monkeypatch.setattr(OffInside, "off", lambda self, text: len(text) % 5 < 2)
    model, ids = server.service.engine._decoder.model, torch.tensor([prompt_ids_of("tell me")])
    answers = [
        chat(client, "tell me", **GREEDY, extra_body=dial(strength=1.5, off_inside=inside, **options))
        for inside in (True, False)
    ]
    texts = [answer.choices[0].message.content for answer in answers]
    condition = OffInside(tiny_tokenizer(), strength=1.5)
    greedy = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": 1, "pad_token_id": 0}
    expected = model.generate(ids, strength=condition, adapter_weights=FIRST, **options, **greedy)[0, ids.shape[1] :]
    assert texts[0] == tiny_tokenizer().decode(expected, skip_special_tokens=True)
    assert texts[0] != texts[1]


def test_reasoning_that_the_prompt_opens_is_the_bases_until_it_ends(client):
    prompt, options = "why? <think> ", {"max_tokens": 12, "temperature": 0}
    answers = [
        client.completions.create(model=name, prompt=prompt, extra_body=body, **options).choices[0].text
        for name, body in (("formal", dial(off_inside=True)), ("base", {}), ("formal", {}))
    ]
    assert answers[0] == answers[1] != answers[2]


def test_off_inside_has_no_place_in_a_prompt_that_is_scored(client):
    with pytest.raises(openai.BadRequestError, match="off_inside is of answers"):
        client.completions.create(
            model="formal", prompt="hello", echo=True, logprobs=0, extra_body=dial(off_inside=True)
        )


def test_models_are_the_base_and_the_adapters(client):
    assert [model.id for model in client.models.list()] == ["base", "formal", "concise", "both"]
    assert client.models.retrieve("formal").owned_by == "qadapter"


def test_a_conversation_is_rendered_by_the_chat_template(client):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
        {"role": "assistant", "content": "hi", "name": "x", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "and?"},
    ]
    answer = client.chat.completions.create(model="formal", messages=messages, **GREEDY)
    text = "system be brief user hello assistant hi user and? "
    assert client.completions.create(model="formal", prompt=text, **GREEDY).choices[0].text == (
        answer.choices[0].message.content
    )
    assert answer.usage.prompt_tokens == len(text)


THINKING = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}no thoughts {% endif %}{{ style | default('') }}"
)


def test_variables_of_the_chat_template_come_with_the_request():
    """As `{"enable_thinking": false}` for Qwen 3."""
    server = RunningServer(tokenizer=tiny_tokenizer(THINKING))
    messages = [{"role": "user", "content": "hi"}]
    try:
        with server.client() as client:

            def prompt_tokens(**variables):
                body = {"chat_template_kwargs": variables} if variables else {}
                answer = client.chat.completions.create(model="formal", messages=messages, extra_body=body, **GREEDY)
                return answer.usage.prompt_tokens

            assert prompt_tokens() == prompt_tokens(enable_thinking=True) == len("hi ")
            assert prompt_tokens(enable_thinking=False, style="x") == len("hi no thoughts x")
            for name in ("chat_template", "tokenize", "messages", "self", "pad_token", "other", "a.b", "enable_think"):
                with pytest.raises(openai.BadRequestError, match=f"reads no variable '{name}'"):
                    prompt_tokens(**{name: "x"})
            for value in (["x"], {"a": 1}, "x" * 1001):
                with pytest.raises(openai.BadRequestError, match="chat_template_kwargs.style"):
                    prompt_tokens(style=value)
    finally:
        server.stop()


EFFORT = "{{ messages[0]['content'] }}{{ reasoning_effort | default('') }}"
NAMED = "{% for message in messages %}{{ message['name'] | default('-') }}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "accepted", "refused"),
    [
        (EFFORT, {"low": "hilow", "none": "hinone"}, []),
        (THINKING, {"none": "hi no thoughts "}, ["low"]),
        ("{{ messages[0]['content'] }}", {"none": "hi"}, ["low"]),
        ("{{ messages[0]['content'] }}<think>", {}, ["none", "low"]),  # it always thinks
    ],
)
def test_an_effort_reaches_the_chat_template_or_is_refused(template, accepted, refused):
    server = RunningServer(tokenizer=tiny_tokenizer(template))
    messages = [{"role": "user", "content": "hi"}]
    try:
        with server.client() as client:

            def prompt_tokens(effort):
                return client.chat.completions.create(
                    model="formal", messages=messages, reasoning_effort=effort, **GREEDY
                ).usage.prompt_tokens

            assert {effort: prompt_tokens(effort) for effort in accepted} == {
                effort: len(text) for effort, text in accepted.items()
            }
            for effort in refused:
                with pytest.raises(openai.BadRequestError, match="has no such choice") as caught:
                    prompt_tokens(effort)
                assert caught.value.param == "reasoning_effort"
    finally:
        server.stop()


def test_a_messages_name_reaches_the_chat_template():
    server = RunningServer(tokenizer=tiny_tokenizer(NAMED))
    try:
        with server.client() as client:
            said = [{"role": "user", "content": "hi", "name": "bob"}, {"role": "user", "content": "yo"}]
            answer = client.chat.completions.create(model="formal", messages=said, **GREEDY)
            text = client.completions.create(model="formal", prompt="bobhi-yo", **GREEDY)
            assert answer.choices[0].message.content == text.choices[0].text
            assert answer.usage == text.usage
    finally:
        server.stop()


def test_prompts_may_be_texts_or_ids_one_or_several(client):
    ids = tiny_tokenizer()("one")["input_ids"]
    several = client.completions.create(model="formal", prompt=["one", "other"], n=2, seed=3, max_tokens=9)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    for prompt, expected in (("one", several.choices[:2]), (ids, several.choices[:2]), ([ids], several.choices[:2])):
        alone = client.completions.create(model="formal", prompt=prompt, n=2, best_of=2, seed=3, max_tokens=9)
        assert [choice.text for choice in alone.choices] == [choice.text for choice in expected]
    assert several.usage.prompt_tokens == len("one") + len("other")


@pytest.mark.parametrize("sampling", [GREEDY, {"seed": 5, "max_tokens": 30, "n": 3}])
def test_streamed_pieces_make_up_the_whole_answer(client, sampling):
    options = {**sampling, "logprobs": True, "top_logprobs": 2, "stop": ["q!", "zz"]}
    whole = chat(client, **options)
    texts, reports, reasons = {}, {}, {}
    stream = chat(client, stream=True, stream_options={"include_usage": True}, **options)
    chunks = list(stream)
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert reasons.get(choice.index) is None
        assert chunk.usage is None
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        reports.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
        reasons[choice.index] = choice.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reports[choice.index] == choice.logprobs.content
        assert reasons[choice.index] == choice.finish_reason


def test_streamed_completions_make_up_the_whole_text(client):
    options = {"model": "concise", "prompt": ["a", "b"], "seed": 1, "max_tokens": 12, "logprobs": 2}
    whole = client.completions.create(**options)
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [texts[0], texts[1]] == [choice.text for choice in whole.choices]


def test_a_seed_fixes_the_answer_and_its_choices_differ(client):
    def texts(**options):
        return [choice.message.content for choice in chat(client, max_tokens=40, n=3, **options).choices]

    assert texts(seed=11) == texts(seed=11)
    assert len({*texts(seed=11), *texts(seed=12)}) == 6
    prompts = client.completions.create(model="formal", prompt=["hello there"] * 4, max_tokens=40)
    assert len({choice.text for choice in prompts.choices}) == 4
    assert texts() != texts()  # single answers without a seed may be equal, when both end at once


def test_an_answer_ends_with_the_models_end_token_or_at_its_length(client):
    answers = [chat(client, seed=seed, n=8, max_tokens=100, logprobs=True) for seed in range(3)]
    tokens = {"stop": [], "length": []}
    for answer in answers:
        counted = 0
        for choice in answer.choices:
            tokens[choice.finish_reason].append(len(choice.logprobs.content))
            # The end token is counted, but neither shown nor reported.
            counted += len(choice.logprobs.content) + (choice.finish_reason == "stop")
            assert "</s>" not in choice.message.content
        assert answer.usage.completion_tokens == counted
    assert set(tokens["length"]) == {100}
    assert tokens["stop"]
    assert max(tokens["stop"]) < 100


def test_a_stop_string_ends_the_answer_before_it(client):
    whole = chat(client, **GREEDY).choices[0].message.content
    stop = whole[5:8]
    place = whole.find(stop)
    answer = chat(client, **GREEDY, stop=stop)
    assert answer.choices[0].message.content == whole[:place]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == place + len(stop)


def test_logprobs_are_those_of_the_policy(server, client):
    answer = chat(client, "hello", temperature=0.8, seed=2, max_tokens=15, logprobs=True, top_logprobs=5)
    (choice,) = answer.choices
    assert "".join(bytes(entry.bytes).decode() for entry in choice.logprobs.content) == choice.message.content
    prompt, ids = prompt_ids_of("hello"), tiny_tokenizer()(choice.message.content)["input_ids"]
    model = server.service.engine._decoder.model
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids]), adapter_weights=FIRST, use_cache=False).logits
    logps = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = logps.gather(-1, torch.tensor(ids).unsqueeze(-1)).sum().item()
    assert sum(entry.logprob for entry in choice.logprobs.content) == pytest.approx(expected, abs=1e-3)
    for entry, row in zip(choice.logprobs.content, logps, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)


def test_completions_report_logprobs_in_their_older_shape(client):
    (choice,) = client.completions.create(model="formal", prompt="a", max_tokens=6, temperature=0, logprobs=2).choices
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == list(range(6))
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())


@pytest.mark.parametrize("alternatives", [0, 1])
def test_completions_report_the_logprob_of_the_answers_own_token_too(client, alternatives):
    options = {"prompt": "a", "max_tokens": 9, "temperature": 2.0, "seed": 1, "logprobs": alternatives}
    logprobs = client.completions.create(model="formal", **options).choices[0].logprobs
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob
        assert len(top) <= alternatives + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": True, "stream_options": {"include_usage": None}},
        {"qadapter": {"strength": None, "weights": None, "max_kl": None, "decay": None}},
        {"messages": [{"role": "assistant", "content": "a", "refusal": None, "tool_calls": [], "annotations": []}]},
    ],
)
def test_fields_of_objects_may_be_empty(server, changes):
    body = {"model": "formal", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **changes}
    assert server.post("/v1/chat/completions", json.dumps(body)).status_code == 200


def test_penalties_make_repetition_rarer(client):
    def repeated(**penalties):
        text = chat(client, temperature=0, max_tokens=90, **penalties).choices[0].message.content
        return 1 - len(set(text)) / len(text)

    assert repeated(presence_penalty=2.0) < repeated()
    assert repeated(frequency_penalty=2.0) < repeated()


def test_max_completion_tokens_and_max_tokens_bound_the_answer(client):
    for option in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, temperature=0, **{option: 7})
        assert answer.usage.completion_tokens == 7
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7
        assert answer.choices[0].finish_reason == "length"


def test_every_field_of_the_official_client_is_known():
    """It is taken, ignored, or refused by its name."""
    for params, kind in ((chat_params, ChatRequest), (completion_params, CompletionRequest)):
        known = kind.model_fields.keys() | IGNORED | UNSUPPORTED.keys()
        assert params.CompletionCreateParamsBase.__annotations__.keys() <= known | {"stream"}
    assert ChatCompletionContentPartTextParam.__annotations__.keys() <= TextPart.model_fields.keys()


def test_fields_without_meaning_here_are_ignored(client):
    ignored = {"user": "me", "store": False, "metadata": {"a": "b"}, "tools": [], "logit_bias": {}}
    answer = chat(client, max_tokens=2, temperature=0, **ignored)
    assert answer.usage.completion_tokens == 2
