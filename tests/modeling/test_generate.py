"""`generate` samples from the policy: token for token as by recomputing two whole passes at every step."""

import sys
import threading
from functools import cache, partial

import pytest
import torch
from models import (
    APART,
    VOCABULARY,
    byte_tokenizer,
    defined_logps,
    padded,
    plain_peft,
    tiny_base,
    tiny_policy,
    tiny_tokenizer,
    token_ids,
    two_passes,
)
from transformers import (
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StopStringCriteria,
    TextIteratorStreamer,
    WatermarkingConfig,
    pipeline,
    set_seed,
)
from transformers.cache_utils import StaticLayer
from transformers.generation import logits_process as processors
from transformers.generation.streamers import BaseStreamer

from qadapter import QAdapterConfig
from qadapter.errors import ConfigError
from qadapter.modeling.cache_name import NAMES, cache_of

STEPS = 7
PROMPTS = token_ids(6, 1, 3)
STRENGTHS = [0.0, 0.5, 1.0, 1.5, -0.5]


@cache
def models_of(architecture):
    """(policy, PEFT's own model with the same weights); nobody changes them."""
    base = tiny_base(architecture)
    policy = tiny_policy(base)
    return policy, plain_peft(base, policy)


@pytest.fixture
def policy():
    return models_of("llama")[0]


@pytest.fixture
def plain():
    return models_of("llama")[1]


def next_logps(plain, rows, config=APART, strength=1.0):
    """Log-probabilities (B, V) of the next token of rows of one length, from the definition."""
    z_theta, z_base = two_passes(plain, input_ids=torch.tensor(rows))
    return defined_logps(z_theta[:, -1:], z_base[:, -1:], config, strength)[:, 0]


def greedy(plain, prompt, config=APART, strength=1.0, steps=STEPS):
    """Greedy continuation of one prompt, two whole passes a step and no cache."""
    row = list(prompt)
    for _ in range(steps):
        row.append(int(next_logps(plain, [row], config, strength)[0].argmax()))
    return row[len(prompt) :]


def beams(plain, prompt, width, steps=STEPS):
    """The `width` continuations that beam search keeps, best first, two whole passes a step and no cache."""
    kept = [(0.0, list(prompt))]
    for _ in range(steps):
        logps = next_logps(plain, [row for _, row in kept])
        grown = [
            (score + float(logps[index, token]), [*row, token])
            for index, (score, row) in enumerate(kept)
            for token in range(VOCABULARY)
        ]
        kept = sorted(grown, reverse=True)[:width]
    return [row[len(prompt) :] for _, row in kept]


def generated(policy, prompts=PROMPTS, steps=STEPS, **options):
    """New token ids of `generate` on a left-padded batch, as lists."""
    batch = padded(prompts)
    options = {"do_sample": False, "max_new_tokens": steps} | options
    return policy.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()


# -- greedy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2", "phi"])
def test_greedy_equals_brute_force_for_mixed_prompt_lengths(architecture):
    policy, plain = models_of(architecture)
    expected = [greedy(plain, prompt) for prompt in PROMPTS]
    assert generated(policy) == expected
    assert expected != generated(plain), "the plain LoRA writes the same: the test shows nothing"


@pytest.mark.parametrize("strength", STRENGTHS)
def test_greedy_equals_brute_force_at_any_strength(policy, plain, strength):
    expected = [greedy(plain, prompt, strength=strength) for prompt in PROMPTS]
    assert generated(policy, strength=strength) == expected


def test_strengths_write_different_texts(policy):
    texts = {str(generated(policy, strength=strength)) for strength in STRENGTHS}
    assert len(texts) == len(STRENGTHS)


def test_own_strength_of_the_model_is_the_default():
    policy = tiny_policy()
    expected = generated(policy, strength=0.5)
    policy.strength = 0.5
    assert generated(policy) == expected


def test_equal_alphas_write_what_the_plain_lora_writes():
    base = tiny_base()
    policy = tiny_policy(base, QAdapterConfig())
    assert generated(policy) == generated(plain_peft(base, policy))


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("setting", [("residual", 0.5, 0.0), ("logits", 2.0, 0.0)])
def test_sampling_keeps_the_temperature_of_a_lone_stream(setting, strength):
    config = QAdapterConfig(*setting)
    base = tiny_base()
    policy = tiny_policy(base, config)
    output = policy.generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=1, output_logits=True, return_dict_in_generate=True, strength=strength
    )
    expected = next_logps(plain_peft(base, policy), PROMPTS[:1], config, strength)
    torch.testing.assert_close(output.logits[0].double().log_softmax(-1), expected, rtol=1e-5, atol=1e-4)


# -- batches, caches, inputs ---------------------------------------------------------------------------------------


def test_batch_equals_single_runs(policy):
    assert generated(policy) == [generated(policy, [prompt])[0] for prompt in PROMPTS]


def test_strength_a_row_equals_single_runs(policy):
    prompts = token_ids(5, 2, 7, 1, 3)
    expected = [generated(policy, [p], strength=s)[0] for p, s in zip(prompts, STRENGTHS, strict=True)]
    assert generated(policy, prompts, strength=torch.tensor(STRENGTHS)) == expected


def test_threads_that_share_a_policy_get_their_own_strengths():
    policy, strengths, texts = tiny_policy(config=QAdapterConfig()), (0.0, 0.5, 1.0), {}
    prompt = torch.tensor([[5, 7, 11]])

    def write(strength, into):
        into[strength] = policy.generate(prompt, max_new_tokens=30, do_sample=False, strength=strength)

    for strength in strengths:
        write(strength, expected := texts.setdefault("alone", {}))
    threads = [threading.Thread(target=write, args=(s, texts.setdefault("together", {}))) for s in strengths]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(texts["together"][strength], expected[strength]) for strength in strengths)


def test_strength_as_a_tensor_without_dimensions_is_one_number(policy):
    expected = generated(policy, strength=0.5)
    assert generated(policy, strength=torch.tensor(0.5)) == expected
    assert generated(policy, strength=torch.tensor([0.5]), num_beams=2) == generated(policy, strength=0.5, num_beams=2)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_cached_equals_uncached(architecture):
    policy, _ = models_of(architecture)
    assert generated(policy, use_cache=True) == generated(policy, use_cache=False)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_static_cache_equals_dynamic(architecture, num_beams):
    policy, _ = models_of(architecture)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert generated(policy, num_beams=num_beams, **static) == generated(policy, num_beams=num_beams)


@pytest.mark.parametrize("name", NAMES)
def test_cache_of_a_finished_call_can_be_continued_by_either_name(policy, name):
    prompt = torch.tensor(PROMPTS[:1])
    first = policy.generate(prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, strength=0.5)
    longer = torch.cat([first.sequences, torch.tensor([[11, 5]])], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "strength": 0.5}
    expected = policy.generate(longer, **options)
    assert torch.equal(policy.generate(longer, **{name: cache_of(first)}, **options), expected)
    cache = cache_of(policy(expected[:, :-1], strength=0.5, use_cache=True))
    last = policy(expected[:, -1:], strength=0.5, **{name: cache}).logits
    torch.testing.assert_close(last, policy(expected, strength=0.5).logits[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_cache_by_both_names_is_refused(policy, call):
    with pytest.raises(ConfigError, match="two names of one argument"):
        getattr(policy, call)(torch.tensor(PROMPTS[:1]), cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize(("first", "second"), [(0.0, 1.0), (1.0, 0.5), (0.5, 0.0)])
def test_a_cache_of_other_streams_is_refused(first, second):
    policy = tiny_policy(config=QAdapterConfig())  # at strength 1 its own stream is enough
    prompt = torch.tensor(PROMPTS[:1])
    options = {"max_new_tokens": 3, "do_sample": False}
    before = policy.generate(prompt, return_dict_in_generate=True, strength=first, **options)
    with pytest.raises(ConfigError, match=r"the cache holds the streams \['.*'\], and this call runs \["):
        policy.generate(before.sequences, past_key_values=before.past_key_values, strength=second, **options)
    own = DynamicCache()
    policy.generate(prompt, past_key_values=own, strength=first, **options)
    with pytest.raises(ConfigError, match="the cache holds the streams"):
        policy.generate(before.sequences, past_key_values=own, strength=second, **options)


def test_a_single_row_may_change_its_strength_between_calls_as_a_tensor():
    policy = tiny_policy(config=QAdapterConfig())  # as numbers, 0 and 1 would need one stream alone
    ids, cache, options = torch.tensor(PROMPTS[:1]), DynamicCache(), {"max_new_tokens": 3, "do_sample": False}
    for strength in (0.0, 0.5, 1.0):
        expected = policy.generate(ids, strength=strength, **options)
        ids = policy.generate(ids, past_key_values=cache, strength=torch.tensor(strength), **options)
        assert torch.equal(ids, expected)


@pytest.mark.parametrize("generating", [False, True])
def test_a_cache_that_forward_has_filled_with_other_streams_is_refused(generating):
    policy = tiny_policy(config=QAdapterConfig())
    ids = torch.tensor(PROMPTS[:1])
    cache = policy(ids[:, :3], use_cache=True, strength=1.0).past_key_values
    if generating:
        run, inputs = partial(policy.generate, max_new_tokens=2), ids
    else:
        run, inputs = policy.forward, ids[:, 3:]
    with pytest.raises(ConfigError, match=r"the cache holds the streams \['default'\], and this call runs \['base'"):
        run(inputs, past_key_values=cache, strength=0.0)


def test_a_cache_that_the_plain_base_has_filled_is_the_bases():
    policy = tiny_policy(config=QAdapterConfig())
    ids = torch.tensor(PROMPTS[:1])

    def filled():
        with policy.plan.running(None), torch.no_grad():
            return policy.base(ids[:, :3], use_cache=True).past_key_values

    continued = policy(ids[:, 3:], past_key_values=filled(), strength=0.0).logits
    torch.testing.assert_close(continued, policy(ids, strength=0.0).logits[:, 3:], rtol=1e-4, atol=1e-4)
    for strength in (0.5, 1.0):
        with pytest.raises(ConfigError, match=r"the cache holds the streams \['base'\], and this call runs"):
            policy(ids[:, 3:], past_key_values=filled(), strength=strength)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_static_cache_that_is_allocated_and_empty_belongs_to_nobody(strength):
    policy = tiny_policy(config=QAdapterConfig())
    ids, cache = torch.tensor(PROMPTS[:1]), StaticCache(config=policy.config, max_cache_len=16)
    rows = 1 if strength == 1.0 else 2
    cache.early_initialization(rows, num_heads=2, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))
    actual = policy(ids, past_key_values=cache, use_cache=True, strength=strength).logits
    torch.testing.assert_close(actual, policy(ids, strength=strength).logits, rtol=1e-4, atol=1e-4)


def test_decay_and_callables_count_the_token_that_a_text_without_prompt_begins_with(policy):
    options = {"max_new_tokens": 3, "do_sample": False, "strength": 0.8, "decay": 0.5, "output_strengths": True}
    expected = policy.generate(torch.tensor([[3]]), **options)
    actual = policy.generate(bos_token_id=3, **options)
    assert torch.equal(actual.strengths, expected.strengths)
    assert torch.equal(actual.sequences, expected.sequences)


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ({"strength": lambda state: 0.5}, "a callable strength"),
        ({"decay": 0.5}, "a decay"),
        ({"output_strengths": True}, "output_strengths"),
    ],
)
def test_a_prefill_in_pieces_is_refused_where_the_whole_prompt_must_be_seen(policy, setting, what):
    with pytest.raises(ConfigError, match=f"{what} cannot be used with prefill_chunk_size"):
        policy.generate(torch.tensor(PROMPTS[:1]), prefill_chunk_size=2, max_new_tokens=2, **setting)


def test_a_prefill_in_pieces_writes_the_same(policy):
    assert generated(policy, strength=0.5, prefill_chunk_size=2) == generated(policy, strength=0.5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("strength", [0.0, 0.5, torch.tensor([0.0, 0.5, 1.5])], ids=["base", "half", "one a row"])
def test_a_prefill_in_pieces_into_a_static_cache_writes_the_same(architecture, strength):
    """transformers would allocate such a cache before the first piece, for the rows of one stream."""
    policy, _ = models_of(architecture)
    options = {"strength": strength, "cache_implementation": "static", "disable_compile": True}
    assert generated(policy, prefill_chunk_size=4, **options) == generated(policy, strength=strength)


def test_embeddings_instead_of_ids_give_the_same_text(policy):
    batch = padded(PROMPTS)
    with torch.no_grad():
        embeddings = policy.get_input_embeddings()(batch["input_ids"])
    output = policy.generate(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], max_new_tokens=STEPS, do_sample=False
    )
    assert output.tolist() == generated(policy)


def test_a_decay_begins_after_embeddings_too(policy):
    ids = torch.tensor(token_ids(5, 5))
    options = {"max_new_tokens": 3, "do_sample": False, "strength": 0.8, "decay": 0.5, "output_strengths": True}
    actual = policy.generate(inputs_embeds=policy.get_input_embeddings()(ids).detach(), **options)
    assert torch.equal(actual.strengths, policy.generate(ids, **options).strengths)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_prompt_lookup_decoding_equals_greedy(policy, implementation):
    if implementation == "static" and not StaticLayer.is_croppable:
        pytest.skip("static caches go back from transformers 5.24 on")
    prompt, cache = [3, 5, 7] * 4, {"cache_implementation": implementation, "disable_compile": True}
    assert generated(policy, [prompt], prompt_lookup_num_tokens=3, **cache) == generated(policy, [prompt])


# -- beams ---------------------------------------------------------------------------------------------------------


def test_beam_search_equals_brute_force(policy, plain):
    expected = [row for prompt in PROMPTS for row in beams(plain, prompt, width=3)]
    assert generated(policy, num_beams=3, num_return_sequences=3) == expected


@pytest.mark.parametrize("strength", [0.0, 0.5, torch.tensor([0.0, 0.5, 1.5])], ids=["base", "half", "one a row"])
def test_cached_beam_search_equals_uncached(policy, strength):
    cached = generated(policy, num_beams=3, strength=strength)
    assert cached == generated(policy, num_beams=3, strength=strength, use_cache=False)


def test_beams_of_threads_that_share_a_policy_keep_their_own_streams():
    policy = tiny_policy()
    expected, meddled = generated(policy, strength=0.5, num_beams=3), []
    reorder = policy._reorder_cache

    def meddle(cache, beam_idx):  # as another thread's call between two steps
        if not meddled:
            meddled.append(True)
            policy.generate(torch.tensor(PROMPTS[:1]), strength=0.0, num_beams=2, max_new_tokens=2)
        return reorder(cache, beam_idx)

    policy._reorder_cache = meddle
    assert generated(policy, strength=0.5, num_beams=3) == expected
    assert meddled


def test_beams_may_come_from_a_generation_config(policy):
    config = GenerationConfig(num_beams=3, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    batch = padded(PROMPTS)
    output = policy.generate(**batch, generation_config=config)
    assert output[:, batch["input_ids"].shape[1] :].tolist() == generated(policy, num_beams=3)


# -- sampling ------------------------------------------------------------------------------------------------------


def test_sampling_is_reproducible_with_a_seed(policy):
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 1.3}
    runs = []
    for seed in (7, 7, 8):
        set_seed(seed)
        runs.append(generated(policy, **options))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(runs[0]) == 3 * len(PROMPTS)


def chi_square(counts, probabilities):
    """(statistic, degrees of freedom) with all tokens of fewer than five expected counts as one class."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum(0, keepdim=True)])
    expected = torch.cat([expected[common], expected[~common].sum(0, keepdim=True)])
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def test_samples_follow_the_policy_and_not_the_plain_lora(policy, plain):
    prompt = PROMPTS[:1]
    set_seed(11)
    tokens = generated(policy, prompt, steps=1, do_sample=True, top_k=0, num_return_sequences=3000, strength=0.6)
    counts = torch.bincount(torch.tensor(tokens).flatten(), minlength=VOCABULARY).double()
    statistic, freedom = chi_square(counts, next_logps(plain, prompt, strength=0.6)[0].exp())
    assert freedom > 5
    # The statistic's mean is `freedom` and its variance twice that: five standard deviations.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    z_theta, _ = two_passes(plain, input_ids=torch.tensor(prompt))
    statistic, freedom = chi_square(counts, z_theta[0, -1].softmax(-1))
    assert statistic > freedom + 50 * (2 * freedom) ** 0.5


MANY = list(range(40, 80))
# Every second token ends a text, so that one would end early: but for what forbids it.
EVEN = list(range(0, VOCABULARY, 2))
ENDS = torch.tensor(EVEN)
START = torch.tensor([PROMPTS[0]])
SCORES = {(7,): 6.0, (8,): 6.0}
WATERMARK = WatermarkingConfig(bias=6.0, seeding_scheme="lefthash", context_width=1)


def odd_after_odd(row, ids):
    """Which tokens a text may go on with, for `prefix_allowed_tokens_fn`."""
    return range(int(ids[-1]) % 2, VOCABULARY, 2)


# Option of `generate`, its value, and what transformers makes of it.
PROCESSORS = {
    "temperature": (1.7, processors.TemperatureLogitsWarper(1.7)),
    "top_k": (4, processors.TopKLogitsWarper(4)),
    "top_p": (0.6, processors.TopPLogitsWarper(0.6)),
    "min_p": (0.2, processors.MinPLogitsWarper(0.2)),
    "top_h": (0.4, processors.TopHLogitsWarper(0.4)),
    "typical_p": (0.6, processors.TypicalLogitsWarper(0.6)),
    "epsilon_cutoff": (0.05, processors.EpsilonLogitsWarper(0.05)),
    "eta_cutoff": (0.05, processors.EtaLogitsWarper(0.05)),
    "repetition_penalty": (1.8, processors.RepetitionPenaltyLogitsProcessor(1.8)),
    "encoder_repetition_penalty": (1.8, processors.EncoderRepetitionPenaltyLogitsProcessor(1.8, START)),
    "no_repeat_ngram_size": (1, processors.NoRepeatNGramLogitsProcessor(1)),
    "encoder_no_repeat_ngram_size": (1, processors.EncoderNoRepeatNGramLogitsProcessor(1, START)),
    "bad_words_ids": ([[t] for t in MANY], processors.NoBadWordsLogitsProcessor([[t] for t in MANY], ENDS[:1])),
    "suppress_tokens": (MANY, processors.SuppressTokensLogitsProcessor(MANY)),
    "begin_suppress_tokens": (MANY, processors.SuppressTokensAtBeginLogitsProcessor(MANY, len(PROMPTS[0]))),
    "sequence_bias": (SCORES, processors.SequenceBiasLogitsProcessor(SCORES)),
    "prefix_allowed_tokens_fn": (odd_after_odd, processors.PrefixConstrainedLogitsProcessor(odd_after_odd, 1)),
    "forced_bos_token_id": (9, processors.ForcedBOSTokenLogitsProcessor(9)),
    "forced_eos_token_id": (9, processors.ForcedEOSTokenLogitsProcessor(len(PROMPTS[0]) + STEPS, 9)),
    "min_length": (11, processors.MinLengthLogitsProcessor(11, ENDS)),
    "min_new_tokens": (5, processors.MinNewTokensLengthLogitsProcessor(len(PROMPTS[0]), 5, ENDS)),
    "exponential_decay_length_penalty": (
        (2, 1.4), processors.ExponentialDecayLengthPenalty((2, 1.4), ENDS, len(PROMPTS[0])),
    ),
    "watermarking_config": (WATERMARK, WATERMARK.construct_processor(VOCABULARY, "cpu")),
    "remove_invalid_values": (True, processors.InfNanRemoveLogitsProcessor()),
    "renormalize_logits": (True, processors.LogitNormalization()),
}  # fmt: skip
# What else a text needs for the option to matter.
ENDING = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
PROMPT_OF = {"forced_bos_token_id": PROMPTS[1]}  # forced where the text so far is a single token


def next_logits(plain, row, strength):
    """Logits (1, V) of the next token, mixed from two whole passes of PEFT's model."""
    z_theta, z_base = (z[:, -1] for z in two_passes(plain, input_ids=torch.tensor([row])))
    return ((1 - strength) * z_base + strength * (z_theta + (APART.alpha_0 / APART.alpha_tilde - 1) * z_base)).float()


def sampled(plain, prompt, strength, processor, ends):
    """(text, scores) of a sample, two whole passes of PEFT's model a step."""
    row, all_scores = list(prompt), []
    for _ in range(STEPS):
        all_scores.append(processor(torch.tensor([row]), next_logits(plain, row, strength)))
        row.append(int(torch.multinomial(all_scores[-1].softmax(-1), 1)))
        if row[-1] in ends:
            break
    return row[len(prompt) :], all_scores


def assert_processed(policy, plain, name):
    """Texts and scores of `generate` with a processor are those of the definition at two strengths, which differ."""
    value, processor = PROCESSORS[name]
    prompt, ends, texts = PROMPT_OF.get(name, PROMPTS[0]), EVEN if name in ENDING else [], {}
    for strength in (0.6, 1.0):
        set_seed(3)
        text, scores = sampled(plain, prompt, strength, processor, ends)
        set_seed(3)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": STEPS, "eos_token_id": ends or None, name: value}
        output = policy.generate(
            torch.tensor([prompt]), strength=strength, output_scores=True, return_dict_in_generate=True, **options
        )
        texts[strength] = output.sequences[0, len(prompt) :].tolist()
        assert texts[strength] == text
        torch.testing.assert_close(torch.cat(output.scores), torch.cat(scores), rtol=1e-4, atol=1e-4)
    assert texts[0.6] != texts[1.0]


@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_processors_see_the_policys_logits(policy, plain, name):
    assert_processed(policy, plain, name)


def test_values_that_are_no_numbers_are_removed_from_the_policys_logits():
    base = tiny_base()
    with torch.no_grad():
        base.lm_head.weight[5] = float("nan")
    policy = tiny_policy(base)
    assert_processed(policy, plain_peft(base, policy), "remove_invalid_values")


@pytest.mark.parametrize("dial", [{"strength": 0.6}, {"strength": torch.tensor([0.6, -0.3, 1.0])}, {"max_kl": 0.05}])
def test_guidance_compares_the_policy_with_itself_without_the_prompt(policy, dial):
    """Its second pass is the policy at the same dial, not at the model's own."""
    rows = torch.tensor(token_ids(5, 5, 5))
    expected = rows
    for _ in range(STEPS):
        with torch.no_grad():
            conditional = policy(expected, **dial).logits[:, -1].log_softmax(-1)
            free = policy(expected[:, rows.shape[1] - 1 :], **dial).logits[:, -1].log_softmax(-1)
        token = (1.5 * (conditional - free) + free).argmax(-1, keepdim=True)
        expected = torch.cat([expected, token], dim=1)
    text = policy.generate(rows, guidance_scale=1.5, do_sample=False, max_new_tokens=STEPS, **dial)
    assert torch.equal(text, expected)
    assert policy.strength == 1.0
    assert policy.max_kl is None


@pytest.mark.parametrize(
    ("dial", "what"),
    [
        ({"strength": lambda state: 0.5}, "a callable strength"),
        ({"adapter_weights": torch.ones(1, 1)}, "weights a row"),
    ],
)
def test_guidance_with_what_its_second_pass_cannot_follow_is_refused(policy, dial, what):
    with pytest.raises(ConfigError, match=f"{what} cannot be used with guidance_scale"):
        generated(policy, PROMPTS[:1], guidance_scale=1.5, **dial)


@pytest.mark.parametrize("dial", [{"strength": torch.tensor([0.6, -0.3, 1.0])}, {"max_kl": 0.05}])
def test_guidance_keeps_the_dial_of_a_row_in_all_its_texts(policy, dial):
    rows, options = torch.tensor(token_ids(5, 5, 5)), {"guidance_scale": 1.5, "max_new_tokens": 3, "do_sample": True}
    texts = policy.generate(rows, num_return_sequences=2, top_k=1, **options, **dial)
    assert torch.equal(texts, policy.generate(rows, top_k=1, **options, **dial).repeat_interleave(2, dim=0))


def test_drafts_by_the_lower_layers_are_refused(policy):
    with pytest.raises(ConfigError, match="assistant_early_exit is not supported"):
        generated(policy, PROMPTS[:1], assistant_early_exit=1)


# -- when to stop, and streaming -----------------------------------------------------------------------------------


def test_end_token_ends_a_row_and_pads_it(policy):
    free = generated(policy)
    end = free[0][2]
    expected = []
    for row in free:
        length = row.index(end) + 1 if end in row else STEPS
        expected.append(row[:length] + [0] * (STEPS - length))
    longest = max(len(row) - row[::-1].index(next(t for t in row[::-1] if t)) for row in expected)
    assert generated(policy, eos_token_id=end) == [row[:longest] for row in expected]


def test_stop_string_ends_the_text(policy):
    tokenizer = tiny_tokenizer()
    free = generated(policy, PROMPTS[:1])[0]
    stop = tokenizer.decode(free[2:4])
    assert stop not in tokenizer.decode(free[:3])
    criteria = [StopStringCriteria(tokenizer, [stop])]
    assert generated(policy, PROMPTS[:1], stopping_criteria=criteria)[0] == free[:4]


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer_sees_prompt_and_every_token_once(policy):
    recorder = Recorder()
    prompt = PROMPTS[:1]
    new = generated(policy, prompt, streamer=recorder, strength=0.5)
    assert recorder.tokens == prompt[0] + new[0]
    assert recorder.ended


def test_text_can_be_streamed_from_another_thread(policy):
    tokenizer = tiny_tokenizer()
    expected = tokenizer.decode(generated(policy, PROMPTS[:1])[0])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generated, args=(policy, PROMPTS[:1]), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == expected


# -- the dial is checked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), True, "1.0"])
def test_strength_that_is_no_finite_number_is_refused(policy, strength):
    with pytest.raises(ConfigError, match="strength = .*: must be a finite number"):
        generated(policy, strength=strength)
    with pytest.raises(ConfigError, match="strength = .*: must be a finite number"):
        policy(input_ids=torch.tensor(PROMPTS[:1]), strength=strength)


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_strength_a_row_that_is_nan_or_overflows_is_refused(policy, value):
    with pytest.raises(ConfigError, match="strength .*must be a finite number within ±10000"):
        generated(policy, strength=torch.tensor([1.0, value, 0.0]))


@pytest.mark.parametrize("shape", [(2,), (3, 1)])
def test_strength_of_another_shape_than_the_rows_is_refused(policy, shape):
    with pytest.raises(ConfigError, match=r"strength has the shape .*: give one number, or one a row, \(3,\)"):
        generated(policy, strength=torch.ones(shape))


@pytest.mark.parametrize("cap", [float("nan"), -1.0])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_cap_that_is_negative_or_no_number_is_refused(policy, cap, kind):
    with pytest.raises(ConfigError, match="max_kl = .*: must be 0 or above"):
        generated(policy, max_kl=kind(cap))


@pytest.mark.parametrize("value", [float("nan"), -3e38])
def test_weights_as_a_tensor_with_nan_or_what_overflows_are_refused(policy, value):
    with pytest.raises(ConfigError, match="adapter_weights = .*: every entry must be a finite number within ±10000"):
        generated(policy, adapter_weights=torch.full((3, 1), value))


def test_strengths_of_beams_are_refused_wherever_the_beams_come_from(policy):
    config = GenerationConfig(num_beams=3, max_new_tokens=2)
    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(ConfigError, match="output_strengths cannot be used with num_beams > 1"):
        policy.generate(ids, config, output_strengths=True)
    policy = tiny_policy()
    policy.generation_config = config
    with pytest.raises(ConfigError, match="output_strengths cannot be used with num_beams > 1"):
        policy.generate(ids, output_strengths=True)


@pytest.mark.parametrize(
    ("name", "value", "off", "setting", "what"),
    [
        ("num_beams", 3, 1, {"output_strengths": True}, "output_strengths"),
        ("prompt_lookup_num_tokens", 2, None, {"decay": 0.5}, "a decay"),
        ("guidance_scale", 1.5, None, {"strength": lambda state: 0.5}, "a callable strength"),
    ],
)
def test_the_models_own_generation_settings_count_where_the_call_brings_others(name, value, off, setting, what):
    policy = tiny_policy()
    policy.generation_config = GenerationConfig(**{name: value})
    ids, config = torch.tensor(PROMPTS[:1]), GenerationConfig(max_new_tokens=2)
    with pytest.raises(ConfigError, match=f"{what} cannot be used with {name}"):
        policy.generate(ids, config, **setting)
    policy.generate(ids, config, **setting, **{name: off})  # the call itself has the last word


def test_the_models_own_number_of_texts_counts_where_guidance_keeps_the_dial_of_a_row():
    policy, strengths = tiny_policy(), torch.tensor([0.6, -0.3, 1.0])
    rows = torch.tensor(token_ids(5, 5, 5))
    policy.generation_config = GenerationConfig(num_return_sequences=2, do_sample=True)
    config = GenerationConfig(guidance_scale=1.5, max_new_tokens=3, do_sample=True, top_k=1)
    texts = policy.generate(rows, config, strength=strengths)
    one = policy.generate(rows, config, strength=strengths, num_return_sequences=1)
    assert torch.equal(texts, one.repeat_interleave(2, dim=0))


def test_transformers_pipeline_takes_the_policy_and_the_dial(policy):
    tokenizer, texts = tiny_tokenizer(), ["tell me", "hi"]
    pipe = pipeline("text-generation", model=policy, tokenizer=tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False, "strength": 0.5}
    answers = pipe(texts, batch_size=2, return_full_text=False, **options)
    for text, (answer,) in zip(texts, answers, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        expected = policy.generate(**ids, pad_token_id=0, **options)[0, ids["input_ids"].shape[1] :]
        assert answer["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_callable_strength_needs_ids_in_forward(policy):
    embeddings = policy.get_input_embeddings()(torch.tensor(PROMPTS[:1]))
    with pytest.raises(ConfigError, match="a callable strength reads the text so far: give input_ids"):
        policy(inputs_embeds=embeddings, strength=lambda state: 0.5)


def test_continuous_batching_of_transformers_is_refused_not_answered_with_nothing(policy):
    with pytest.raises(ConfigError, match="cannot run a policy of several streams: use generate"):
        policy.generate_batch(PROMPTS)


@pytest.mark.parametrize("strength", [1e300, -2e4])
def test_a_strength_that_no_logits_survive_is_refused(policy, strength):
    with pytest.raises(ConfigError, match="strength = .*: must lie within ±10000"):
        generated(policy, strength=strength)


@pytest.mark.parametrize("given", [{"input_ids": None}, {"input_ids": None, "inputs_embeds": None}])
def test_ids_that_are_none_are_as_not_given(policy, given):
    rows = torch.tensor(token_ids(6, 6))
    dial = {"strength": torch.tensor([0.8, 0.6]), "decay": 0.5, "output_strengths": True}
    options = {"max_new_tokens": 4, "do_sample": False, **dial}
    expected, actual = policy.generate(rows, **options), policy.generate(rows, **given, **options)
    assert torch.equal(actual.strengths, expected.strengths)
    assert torch.equal(actual.sequences, expected.sequences)
    assert expected.strengths[0].tolist() == pytest.approx([0.8, 0.4, 0.2, 0.1])


# -- token healing -------------------------------------------------------------------------------------------------


@cache
def healing():
    """(base, policy, tokenizer) where the last token of a prompt begins longer ones."""
    tokenizer = byte_tokenizer(("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("in", "g"))
    tokenizer.bos_token = tokenizer.pad_token = "</s>"
    base = tiny_base(vocab_size=len(tokenizer))
    return base, tiny_policy(base), tokenizer


def healed(model, rows, **options):
    tokenizer = healing()[2]
    options = {"token_healing": True, "tokenizer": tokenizer, "max_new_tokens": 4, "do_sample": False} | options
    return model.generate(torch.tensor([tokenizer.encode(row) for row in rows]), **options)


PROMPTS_TO_HEAL = ["go t", "we a"]


@pytest.mark.parametrize(
    "zero", [{"strength": 0.0}, {"strength": torch.tensor([0.0, 0.0])}, {"max_kl": 0.0}, {"adapter_weights": {}}]
)
def test_token_healing_at_strength_0_is_the_bases(zero):
    """Its own pass, too, is at the dial of the call, and the model's stays as it was."""
    base, policy, _ = healing()
    expected = healed(base, PROMPTS_TO_HEAL)
    assert not torch.equal(expected, healed(policy, PROMPTS_TO_HEAL)), "the same prompts at 1: the test shows nothing"
    assert torch.equal(healed(policy, PROMPTS_TO_HEAL, **zero), expected)
    texts = healed(policy, PROMPTS_TO_HEAL, num_return_sequences=2, num_beams=2, **zero)
    assert torch.equal(texts[::2], healed(base, PROMPTS_TO_HEAL, num_beams=2))
    assert (policy.strength, policy.max_kl, policy.adapter_weights) == (1.0, None, {"default": 1.0})


@pytest.mark.parametrize(
    ("dial", "said"),
    [
        ({"strength": lambda state: 0.5}, "a callable strength cannot be used with token_healing, which may change"),
        ({"decay": 0.5}, "a decay cannot be used with token_healing"),
        ({"strength": torch.tensor([0.0, 0.5])}, "strength of one value a row cannot be used with token_healing"),
        ({"max_kl": torch.tensor([0.1, 0.5])}, "max_kl of one value a row cannot be used with token_healing"),
        ({"adapter_weights": torch.tensor([[0.1], [1.0]])}, "adapter_weights of one value a row cannot be used with"),
    ],
)
def test_token_healing_with_what_its_own_pass_cannot_follow_is_refused(dial, said):
    with pytest.raises(ConfigError, match=said):
        healed(healing()[1], PROMPTS_TO_HEAL, **dial)
