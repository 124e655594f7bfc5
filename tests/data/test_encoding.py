import pytest
from data_examples import CHATML, LAST_TURN, LLAMA, PHI, STRICT, THINKING, UNCLOSED, chat_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qadapter.data.encoding import ChatEncoder, PlainEncoder, shared_prefix, shared_words
from qadapter.data.rows import RowError
from qadapter.errors import DataError

PLAIN = {"prompt": "The capital of France", "chosen": " is Paris.", "rejected": " is Rome."}
UNPROMPTED = {"prompt": "", "chosen": "Paris is big.", "rejected": "Rome is old."}
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "Of what?"},
    {"role": "user", "content": "France"},
]
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "phi": PHI, "thinking": THINKING, "unclosed": UNCLOSED}


@pytest.fixture
def tokenizers(make_tokenizer):
    return {name: make_tokenizer(template) for name, template in TEMPLATES.items()}


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "prompt", "chosen"),
    [
        (CHATML, "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "So.<|im_end|>"),
        (
            LLAMA,
            "<s><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "So.<|eot_id|>",
        ),
        (PHI, "<|user|>\nWhy?<|end|>\n<|assistant|>\n", "So.<|end|>"),
        (UNCLOSED, "user: Why?\nassistant:", " So.\n</s>"),
    ],
)
def test_the_trained_part_is_the_answer_and_its_end_of_turn_token(make_tokenizer, template, prompt, chosen):
    tokenizer = make_tokenizer(template)
    encoded = ChatEncoder(tokenizer).encode(chat_pair("Why?", "So.", "No."))
    assert text_of(tokenizer, encoded.prompt_ids) == prompt
    assert text_of(tokenizer, encoded.chosen_ids) == chosen
    assert text_of(tokenizer, encoded.rejected_ids) == chosen.replace("So", "No")
    assert encoded.stable


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("prompt", [HISTORY, HISTORY[1:2]])
def test_prompt_and_answer_are_the_rendered_conversation(make_tokenizer, template, prompt):
    """The slow way: render the whole conversation once and look where our ids end in it."""
    tokenizer = make_tokenizer(template)
    pair = chat_pair() | {"prompt": prompt}
    encoded = ChatEncoder(tokenizer).encode(pair)
    for side, answer in (("chosen", encoded.chosen_ids), ("rejected", encoded.rejected_ids)):
        whole = tokenizer.apply_chat_template(prompt + pair[side], tokenize=True)["input_ids"]
        ours = encoded.prompt_ids + answer
        end = [] if template != UNCLOSED else [tokenizer.eos_token_id]
        assert ours == whole[: len(ours) - len(end)] + end
        rest = whole[len(ours) - len(end) :]
        assert text_of(tokenizer, rest).removesuffix("</s>").strip() == ""


def test_generation_starts_from_the_very_prompt_that_was_trained(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA)
    at_generation = tokenizer.apply_chat_template(HISTORY, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert ChatEncoder(tokenizer).encode(chat_pair() | {"prompt": HISTORY}).prompt_ids == at_generation


@pytest.mark.parametrize("adds", ["", "<s> $A", "<s> $A </s>"])
def test_a_chat_has_one_bos_also_if_the_tokenizer_adds_one_to_text(make_tokenizer, adds):
    """Rendering to text and tokenising it would give two: the template's and the tokenizer's."""
    tokenizer = make_tokenizer(LLAMA, adds=adds)
    encoded = ChatEncoder(tokenizer).encode(chat_pair())
    assert encoded.prompt_ids[0] == tokenizer.bos_token_id
    for answer in (encoded.chosen_ids, encoded.rejected_ids):
        assert (encoded.prompt_ids + answer).count(tokenizer.bos_token_id) == 1


def test_a_template_that_opens_finished_answers_differently_splits_both_sides_at_the_same_token(
    make_tokenizer,
):
    tokenizer = make_tokenizer(THINKING)
    encoded = ChatEncoder(tokenizer).encode(chat_pair("Why?", "So.", "So what."))
    assert not encoded.stable
    assert text_of(tokenizer, encoded.prompt_ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tokenizer, encoded.chosen_ids) == "So.<|im_end|>"
    assert text_of(tokenizer, encoded.rejected_ids) == "So what.<|im_end|>"


def test_a_template_without_a_generation_prompt_splits_where_the_answer_begins(make_tokenizer):
    tokenizer = make_tokenizer(LAST_TURN)
    encoded = ChatEncoder(tokenizer).encode(chat_pair("Why?", "So.", "So what."))
    assert encoded.stable
    assert text_of(tokenizer, encoded.prompt_ids) == "<s><|user|>Why?<|assistant|>"


def test_a_prompt_that_its_answer_changes_is_refused(make_tokenizer):
    """The system message would be lost, and the question trained as an answer."""
    pair = chat_pair("Why?", "So.", "So what.")
    pair["prompt"] = HISTORY[:1] + pair["prompt"]
    with pytest.raises(RowError, match="otherwise where an answer follows") as caught:
        ChatEncoder(make_tokenizer(LAST_TURN)).encode(pair)
    assert "('Be brief. Why?<|assistant|>')" in str(caught.value)


CONTENT = st.text(st.sampled_from("ab é\n.?<|"), min_size=1, max_size=9).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    template=st.sampled_from(sorted(TEMPLATES)),
    prompt=CONTENT,
    answers=st.tuples(CONTENT, CONTENT),
    system=st.booleans(),
)
def test_any_text_splits_at_one_token_and_nothing_of_it_is_lost(tokenizers, template, prompt, answers, system):
    tokenizer = tokenizers[template]
    pair = chat_pair(prompt, *answers)
    pair["prompt"] = HISTORY[:1] * system + pair["prompt"]
    encoded = ChatEncoder(tokenizer).encode(pair)
    for side, ids in (("chosen", encoded.chosen_ids), ("rejected", encoded.rejected_ids)):
        rendered = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
        text = text_of(tokenizer, encoded.prompt_ids + ids)
        assert text.rstrip("\n") in (rendered.removesuffix("</s>").rstrip("\n"), f"{rendered}</s>")


def test_answers_that_start_alike_keep_their_common_words(chatml):
    encoded = ChatEncoder(chatml).encode(chat_pair("Why?", "Paris is big.", "Paris is old."))
    assert encoded.chosen_ids[:3] == encoded.rejected_ids[:3]
    assert text_of(chatml, encoded.chosen_ids) == "Paris is big.<|im_end|>"


def test_the_end_of_turn_token_is_found_although_all_words_are_unknown(word_level):
    word_level.chat_template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {{ eos_token }} "
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    encoder = ChatEncoder(word_level)
    assert encoder.ending == (word_level.eos_token_id,)
    assert encoder.encode(chat_pair("a b", "c d", "e")).chosen_ids == word_level.convert_tokens_to_ids(
        ["c", "d", "</s>"]
    )


def test_an_added_token_of_blanks_is_no_end_of_turn(make_tokenizer):
    """Gemma has added tokens for line breaks."""
    tokenizer = make_tokenizer(UNCLOSED)
    tokenizer.add_tokens(["\n"])
    assert ChatEncoder(tokenizer).ending == ()


def test_an_end_of_turn_token_inside_an_answer_is_refused(chatml):
    with pytest.raises(RowError, match="contains the end-of-turn token, .*: if it is already rendered, give messages"):
        ChatEncoder(chatml).encode(chat_pair(chosen="Paris.<|im_end|>\nAnd more"))


MISTRAL = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}<|assistant|>"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"  # <|user|> as its [INST], before and after
)


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA, PHI, THINKING, MISTRAL], ids=["chatml", "llama", "phi", "thinking", "mistral"]
)
def test_a_prompt_that_was_rendered_before_is_refused(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    rendered = tokenizer.apply_chat_template(HISTORY[1:2], add_generation_prompt=True, tokenize=False)
    with pytest.raises(RowError, match=r"contains <.*: if it is already rendered, give messages, or") as caught:
        ChatEncoder(tokenizer).encode(chat_pair(rendered))
    assert caught.value.reason == "already rendered"


def test_special_tokens_that_the_template_does_not_write_may_be_text(make_tokenizer):
    """A thought that opens with <think> is part of an earlier answer, though generation prompts open one, too."""
    history = [HISTORY[1], {"role": "assistant", "content": "<think>Hm."}, HISTORY[3]]
    assert ChatEncoder(make_tokenizer(THINKING)).encode(chat_pair() | {"prompt": history})


def test_a_template_that_refuses_a_conversation_is_named(make_tokenizer):
    twice = chat_pair() | {"prompt": HISTORY[1:2] * 2}
    with pytest.raises(RowError, match="chat template refuses the conversation: roles have to alternate"):
        ChatEncoder(make_tokenizer(STRICT)).encode(twice)


@pytest.mark.parametrize("adds", ["", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("prompt", ["The capital", "<s>The capital", "a"])
def test_plain_prompts_have_at_most_one_bos_and_no_eos(make_tokenizer, adds, prompt):
    tokenizer = make_tokenizer(adds=adds)
    encoded = PlainEncoder(tokenizer).encode(PLAIN | {"prompt": prompt})
    has_bos = "<s>" in adds or "<s>" in prompt
    assert encoded.prompt_ids.count(tokenizer.bos_token_id) == has_bos
    assert text_of(tokenizer, encoded.prompt_ids).removeprefix("<s>") == prompt.removeprefix("<s>")


def test_plain_answers_end_with_one_eos(make_tokenizer):
    tokenizer = make_tokenizer(adds="<s> $A </s>")
    encoded = PlainEncoder(tokenizer).encode(PLAIN | {"rejected": " is Rome.</s>"})
    assert text_of(tokenizer, encoded.chosen_ids) == " is Paris.</s>"
    assert text_of(tokenizer, encoded.rejected_ids) == " is Rome.</s>"


def test_a_bos_that_is_also_the_eos_stays_at_the_start_of_an_empty_prompt(make_tokenizer):
    """GPT-2 has one token for both."""
    tokenizer = make_tokenizer(adds="<s> $A", eos_token="<s>")
    assert PlainEncoder(tokenizer).encode(UNPROMPTED).prompt_ids == [tokenizer.bos_token_id]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Hi yes", "Hi no", "Hi"),
        ("Hi  yes", "Hi  no", "Hi"),
        ("Q: a\nA: five", "Q: a\nA: four", "Q: a\nA:"),
        ("Paris is nice", "Paris is", "Paris"),
        ("Paris is nice", "Paris is ", "Paris"),
        ("Paris", "Parting", ""),
        ("yes", "no", ""),
        (" yes", " no", ""),
    ],
)
def test_the_words_that_plain_answers_begin_with_are_their_prompt(chosen, rejected, prompt):
    """As TRL's extract_prompt, but never in a word."""
    for one, other in ((chosen, rejected), (rejected, chosen)):
        assert shared_words(one, other) == prompt


WORDS = st.text(st.sampled_from("ab \n"), min_size=1, max_size=12).filter(str.strip)


@given(WORDS, WORDS)
def test_an_implicit_prompt_is_whole_words_that_both_go_on_from(one, other):
    prompt = shared_words(one, other)
    assert one.startswith(prompt)
    assert other.startswith(prompt)
    for text in (one, other):
        assert text[len(prompt) :].strip()
        assert not prompt or text[len(prompt)].isspace()


def test_an_empty_plain_prompt_needs_a_bos(make_tokenizer):
    with pytest.raises(RowError, match="adds no token at the beginning"):
        PlainEncoder(make_tokenizer()).encode(UNPROMPTED)


@pytest.mark.parametrize(
    "encoder", [lambda t: PlainEncoder(t).encode(PLAIN), lambda t: ChatEncoder(t).encode(chat_pair())]
)
def test_a_tokenizer_without_any_end_token_is_refused(make_tokenizer, encoder):
    with pytest.raises(DataError, match=r"set tokenizer\.eos_token"):
        encoder(make_tokenizer(UNCLOSED, eos_token=None))


def test_shared_prefix_is_the_common_start_of_all():
    assert shared_prefix([1, 2, 3], [1, 2, 3, 4], [1, 2, 5]) == 2
    assert shared_prefix([1, 2], [1, 2, 3], [1, 2]) == 2
    assert shared_prefix([1], [2]) == 0
