"""Text in, text out: templates, padding, batching, streaming, and streams that are left or fail."""

import itertools
import threading
from contextlib import nullcontext

import pytest
import torch
from models import tiny_base, tiny_policy, tiny_tokenizer
from tokenizers import decoders
from tokenizers.processors import TemplateProcessing

from qadapter import QAdapterConfig, generation
from qadapter.data.encoding import PlainEncoder
from qadapter.errors import ConfigError, DataError
from qadapter.generation import Answer, Sampling, encode, end_tokens, generate_texts, stream_text

PROMPTS = ["Why?", "Where is the exit?", "a"]
SHORT = Sampling(max_new_tokens=9)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}{% if add_generation_prompt %}! {% endif %}"
)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(tiny_base(max_position_embeddings=512, eos_token_id=1))


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(TEMPLATE)


@pytest.fixture
def plain_tokenizer():
    return tiny_tokenizer(None)


def threads():
    return set(threading.enumerate()) - {threading.current_thread()}


# -- encode --------------------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left(plain_tokenizer):
    """Characters are tokens here, and <pad> is token 0."""
    batch = encode(plain_tokenizer, ["abc", "d"])
    a, b, c, d = (plain_tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    assert batch["input_ids"].tolist() == [[a, b, c], [0, 0, d]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_plain_prompt_becomes_a_users_message_where_there_is_a_template(tokenizer):
    [row] = encode(tokenizer, ["Why?"])["input_ids"]
    assert tokenizer.decode(row) == "user: Why?! "


def test_messages_are_put_into_the_template(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    [row] = encode(tokenizer, [messages])["input_ids"]
    assert tokenizer.decode(row) == "system: Be brief.user: Why?! "


def test_parts_of_a_message_are_joined_as_in_training(tokenizer):
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    [row] = encode(tokenizer, [[{"role": "user", "content": parts}]])["input_ids"]
    assert tokenizer.decode(row) == "user: Why?! "


def test_without_a_pad_token_the_end_token_pads(plain_tokenizer):
    plain_tokenizer.pad_token = None
    assert encode(plain_tokenizer, ["ab", "c"])["input_ids"][1, 0] == plain_tokenizer.eos_token_id
    plain_tokenizer.eos_token = None
    assert encode(plain_tokenizer, ["ab", "c"])["input_ids"][1, 0] == 0


def test_messages_without_a_template_are_refused(plain_tokenizer):
    with pytest.raises(ConfigError, match="the base model has no chat template: give plain text prompts"):
        encode(plain_tokenizer, [[{"role": "user", "content": "Why?"}]])


def test_a_plain_prompt_is_not_closed_by_a_tokenizer_that_closes_texts(plain_tokenizer):
    """It is the ids of training, from which the answer goes on."""
    end = (plain_tokenizer.eos_token, plain_tokenizer.eos_token_id)
    plain_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    [row] = encode(plain_tokenizer, ["Why?"])["input_ids"].tolist()
    assert row == PlainEncoder(plain_tokenizer).prompt_ids("Why?")
    assert plain_tokenizer.decode(row).endswith("Why?")


def test_a_conversation_that_the_template_refuses_is_one_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="the chat template refuses the conversation: no system role"):
        encode(tokenizer, ["Why?"])


def test_an_empty_prompt_is_refused(plain_tokenizer):
    with pytest.raises(ConfigError, match="the prompt is empty: give at least one token"):
        encode(plain_tokenizer, ["Why?", ""])


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"temperature": -0.1}, r"temperature = -0.1: must lie in \[0, 100\)"),
        ({"temperature": float("nan")}, r"temperature = nan: must lie in \[0, 100\)"),
        ({"top_p": 0.0}, r"top_p = 0.0: must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p = 1.5: must lie in \(0, 1\]"),
        ({"seed": 2**64}, r"seed = 18446744073709551616: must fit into 64 bits"),
    ],
)
def test_impossible_sampling_is_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        Sampling(**settings)


def test_end_tokens_are_the_models_and_the_tokenizers(policy, tokenizer, monkeypatch):
    for configured, expected in ((None, [1]), (7, [1, 7]), ([9, 7], [1, 7, 9])):
        monkeypatch.setattr(policy.generation_config, "eos_token_id", configured)
        assert end_tokens(policy, tokenizer) == expected


def test_the_end_of_a_turn_that_is_trained_ends_answers_too(policy, monkeypatch):
    """A base that never chatted ends texts by another token than its template ends turns."""
    tokenizer = tiny_tokenizer("{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    monkeypatch.setattr(policy.generation_config, "eos_token_id", 7)
    assert end_tokens(policy, tokenizer) == [1, 7, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for failing in ("{{ raise_exception('no') }}", "{{ 5 / 0 }}"):
        tokenizer.chat_template = failing
        assert end_tokens(policy, tokenizer) == [1, 7]


# -- generate_texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_answers_do_not_depend_on_batches(policy, tokenizer, batch_size):
    alone = [generate_texts(policy, tokenizer, [prompt], SHORT)[0] for prompt in PROMPTS]
    done = []
    assert generate_texts(policy, tokenizer, PROMPTS, SHORT, batch_size=batch_size, progress=done.append) == alone
    assert sum(done) == len(PROMPTS)
    assert max(done) <= batch_size


def test_an_answer_is_the_text_before_its_end_token(policy, tokenizer, monkeypatch):
    """The policy's own third token is made an end token."""
    prompt = encode(tokenizer, ["Why?"])
    ids = policy.generate(**prompt, max_new_tokens=9, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert ids.index(ids[2]) == 2
    monkeypatch.setattr(policy.generation_config, "eos_token_id", [ids[2]])
    answer = Answer(tokenizer.decode(ids[:2]).strip(), finished=True, end=ids[2])
    assert generate_texts(policy, tokenizer, ["Why?"], SHORT) == [answer]


def test_an_answer_cut_by_the_limit_is_not_finished(policy, tokenizer):
    [answer] = generate_texts(policy, tokenizer, ["Why?"], Sampling(max_new_tokens=2))
    assert not answer.finished


def test_strength_0_answers_as_the_base_and_none_as_the_models_own(tokenizer):
    base = tiny_base(max_position_embeddings=512, eos_token_id=1)
    policy = tiny_policy(base, QAdapterConfig())
    prompt = encode(tokenizer, ["Why?"])
    ids = base.generate(**prompt, max_new_tokens=9, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    at_zero, at_one, own = (
        generate_texts(policy, tokenizer, ["Why?"], SHORT, strength) for strength in (0.0, 1.0, None)
    )
    assert at_zero[0].text == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert own == at_one != at_zero


def test_a_seed_makes_sampling_repeat(policy, tokenizer):
    first, again, other = (
        generate_texts(policy, tokenizer, PROMPTS, Sampling(9, temperature=2.0, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_a_tiny_nucleus_is_the_greedy_answer(policy, tokenizer):
    nucleus = Sampling(9, temperature=1.0, top_p=1e-6, seed=0)
    assert generate_texts(policy, tokenizer, PROMPTS, nucleus) == generate_texts(policy, tokenizer, PROMPTS, SHORT)


def test_a_temperature_too_low_to_divide_by_is_the_greedy_answer(policy, tokenizer):
    cold = Sampling(9, temperature=1e-40, seed=0)
    assert generate_texts(policy, tokenizer, PROMPTS, cold) == generate_texts(policy, tokenizer, PROMPTS, SHORT)


@pytest.mark.parametrize(("length", "warns"), [(505, True), (504, False)])
def test_a_prompt_beyond_the_context_is_warned_of(policy, length, warns):
    """The context is 512, and 7 characters are the template's."""
    template = tiny_tokenizer("{{ 'prompt ' }}{{ messages[0]['content'] }}")
    prompt, sampling = "x" * length, Sampling(max_new_tokens=1)
    for answer in (
        lambda: generate_texts(policy, template, [prompt], sampling),
        lambda: list(stream_text(policy, template, prompt, sampling)),
    ):
        with pytest.warns(UserWarning, match="the prompt has 512 tokens, .* made for 512") if warns else nullcontext():
            answer()


def test_no_prompts_give_no_answers(policy, tokenizer):
    assert generate_texts(policy, tokenizer, [], SHORT) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_impossible_batch_size_is_refused(policy, tokenizer, batch_size):
    with pytest.raises(ConfigError, match=f"batch_size = {batch_size}: must be at least 1"):
        generate_texts(policy, tokenizer, PROMPTS, SHORT, batch_size=batch_size)


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.9}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}])
def test_the_bases_generation_config_does_not_change_what_is_drawn(policy, tokenizer, monkeypatch, settings):
    plain = generate_texts(policy, tokenizer, PROMPTS, SHORT, strength=0.5)
    streamed = list(stream_text(policy, tokenizer, "Why?", SHORT, strength=0.5))
    for name, value in settings.items():
        monkeypatch.setattr(policy.generation_config, name, value)
    prompt = encode(tokenizer, PROMPTS)
    by_config = policy.generate(**prompt, strength=0.5, max_new_tokens=9, do_sample=False)
    texts = tokenizer.batch_decode(by_config[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] != [answer.text for answer in plain]  # it is of weight here
    assert generate_texts(policy, tokenizer, PROMPTS, SHORT, strength=0.5) == plain
    assert list(stream_text(policy, tokenizer, "Why?", SHORT, strength=0.5)) == streamed


@pytest.mark.parametrize("settings", [{"min_p": 0.9}, {"typical_p": 0.1}, {"eta_cutoff": 0.9}, {"stop_strings": ["e"]}])
def test_nor_what_is_sampled(policy, tokenizer, monkeypatch, settings):
    sampling = Sampling(9, temperature=3.0, seed=3)
    plain = generate_texts(policy, tokenizer, PROMPTS, sampling)
    for name, value in settings.items():
        monkeypatch.setattr(policy.generation_config, name, value)
    assert generate_texts(policy, tokenizer, PROMPTS, sampling) == plain


# -- stream_text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(40), Sampling(40, temperature=1.5, top_p=0.9, seed=5)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_joins_to_the_answer(policy, tokenizer, prompt, sampling):
    [answer] = generate_texts(policy, tokenizer, [prompt], sampling, strength=0.5)
    assert "".join(stream_text(policy, tokenizer, prompt, sampling, strength=0.5)).strip() == answer.text


def test_a_stream_leaves_out_an_end_token_that_is_no_special_one(policy, tokenizer, monkeypatch):
    [whole] = generate_texts(policy, tokenizer, ["Why?"], SHORT)
    monkeypatch.setattr(policy.generation_config, "eos_token_id", tokenizer.convert_tokens_to_ids(whole.text[2]))
    [answer] = generate_texts(policy, tokenizer, ["Why?"], SHORT)
    assert answer.finished
    assert "".join(stream_text(policy, tokenizer, "Why?", SHORT)).strip() == answer.text == whole.text[:2]


def test_a_stream_comes_in_pieces(policy, tokenizer):
    """One a token: the policy is made to say nothing but "a b a b ..."."""
    a, b, space = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab ")
    follower = {a: space, b: space}
    order = iter([a, b] * 40)

    def forced(input_ids, **kwargs):
        streamer, ids = kwargs["streamer"], input_ids
        streamer.put(ids)
        for _ in range(10):
            token = next(order)
            streamer.put(torch.tensor([token]))
            streamer.put(torch.tensor([follower[token]]))
        streamer.end()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "generate", forced)
        pieces = [piece for piece in stream_text(policy, tokenizer, "Why?", SHORT) if piece]
    assert pieces == ["a", " ", "b", " "] * 5


def test_a_stream_keeps_the_indentation_of_each_line(policy, monkeypatch):
    """Decoders as Llama 2's and Mistral's take a space off the beginning of what they are given."""
    tokenizer = tiny_tokenizer(None, characters=["▁", "d", ":", "\n", "r"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    prompt = "dr"
    answer = "▁d:\n▁▁▁▁r\n▁▁▁▁r"

    def forced(input_ids, streamer=None, **kwargs):
        tokens = [tokenizer.convert_tokens_to_ids(character) for character in answer]
        for value in (input_ids, *(torch.tensor([token]) for token in tokens)) if streamer else ():
            streamer.put(value)
        if streamer:
            streamer.end()
        return torch.cat([input_ids, torch.tensor([tokens])], dim=1)

    monkeypatch.setattr(policy, "generate", forced)
    [whole] = generate_texts(policy, tokenizer, [prompt], SHORT)
    assert whole.text == "d:\n    r\n    r"
    assert "".join(stream_text(policy, tokenizer, prompt, SHORT)) == whole.text


@pytest.fixture
def before_each_pass(policy):
    """Have a function called with the number of each forward pass of the policy."""
    hooks = []

    def watch(act):
        passes = itertools.count(1)
        hooks.append(policy.register_forward_pre_hook(lambda *_: act(next(passes))))

    yield watch
    for hook in hooks:
        hook.remove()


def test_closing_a_stream_stops_the_generation(policy, tokenizer, before_each_pass, monkeypatch):
    """From the fourth pass on, the model waits for the reader to leave, so that it cannot be faster than that."""
    left, passes = threading.Event(), []

    class Cancelled(generation._Cancelled):
        def __init__(self):
            self.event = left

    def wait(number):
        passes.append(number)
        assert number < 4 or left.wait(60)

    monkeypatch.setattr(generation, "_Cancelled", Cancelled)
    before_each_pass(wait)
    before = threads()
    stream = stream_text(policy, tokenizer, "Why?", Sampling(400))
    next(stream)
    assert threads() - before
    stream.close()
    assert threads() <= before
    assert 1 <= len(passes) <= 4


def test_an_error_while_generating_reaches_the_reader(policy, tokenizer, before_each_pass):
    def fail(number):
        if number == 3:
            raise RuntimeError("out of memory")

    before_each_pass(fail)
    before = threads()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_text(policy, tokenizer, "Why?", SHORT))
    assert threads() <= before


def test_a_reader_who_leaves_hears_no_error(policy, tokenizer, before_each_pass):
    def fail(number):
        raise RuntimeError("out of memory")

    before_each_pass(fail)
    stream = stream_text(policy, tokenizer, "Why?", SHORT)
    next(stream)
    stream.close()


def test_a_bad_strength_reaches_the_reader_of_a_stream(policy, tokenizer):
    with pytest.raises(ConfigError, match="strength = nan: must be a finite number"):
        list(stream_text(policy, tokenizer, "Why?", SHORT, strength=float("nan")))
