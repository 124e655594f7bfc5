"""A real model: SmolLM2-135M-Instruct with an adapter in its upper half, on texts of mixed lengths."""

import pytest
import torch
from models import APART, lora, train_randomly
from served import STRENGTH, assert_same, engine, exported, greedy, metric

from qadapter import QAdapterForCausalLM
from qadapter.errors import ConfigError
from qadapter.modeling.bases import load_tokenizer, resolve_base

QUESTIONS = (
    "Hi!",
    "What is the capital of France?",
    "Explain in three sentences why the sky is blue, and why sunsets are red.",
    "Write a polite letter to my landlord. The heating has been broken for two weeks, it is winter, and nobody calls "
    "back. I want it repaired by Friday, and I want to pay less rent until then. Do not threaten anybody.",
)
UPPER_HALF = r"model\.layers\.(1[5-9]|2\d)\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@pytest.fixture(scope="module")
def smollm2():
    """A random policy on SmolLM2, and its tokenizer."""
    try:
        source = resolve_base("builtin")
    except ConfigError as error:
        pytest.skip(f"no SmolLM2 here: {error}")
    policy = QAdapterForCausalLM.from_base(source.path, APART, lora(target_modules=UPPER_HALF))
    return train_randomly(policy, scale=0.03).eval(), load_tokenizer(source)


def rows_of(tokenizer, texts):
    """The questions as ids."""
    chats = ([{"role": "user", "content": text}] for text in texts)
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]


def test_smollm2_equals_transformers(tmp_path, smollm2):
    policy, tokenizer = smollm2
    rows = rows_of(tokenizer, QUESTIONS)
    with engine(exported(policy, tmp_path / "out"), kv_cache_memory_bytes=256 * 2**20) as llm:
        assert_same(policy, rows, greedy(llm, rows, tokens=32), strength=STRENGTH)


@pytest.mark.slow
def test_the_adapter_folder_itself_compiled_with_a_cache_that_is_too_small(tmp_path, smollm2):
    """As `vllm serve my-adapter` runs it; prompts share a prefix, are read in chunks, and lose their cache midway."""
    policy, tokenizer = smollm2
    policy.save_pretrained(tmp_path / "adapter", tokenizer=tokenizer)
    rows = rows_of(tokenizer, [f"{QUESTIONS[-1]} {text}" for text in (*QUESTIONS[:3], *"ABCDE")])
    block_bytes = (30 + 15) * 2 * 3 * 64 * 4 * 32  # layers and their second streams, keys and values, heads of 64
    pressed = {"max_num_batched_tokens": 48, "kv_cache_memory_bytes": 14 * block_bytes}
    settings = {"hf_overrides": {"qadapter": {"strength": STRENGTH}}}
    torch._dynamo.utils.counters.clear()
    with (
        torch._dynamo.config.patch(disable=False),
        engine(tmp_path / "adapter", enforce_eager=False, **pressed, **settings) as llm,
    ):
        greedy(llm, rows[:1], tokens=1)
        assert_same(policy, rows, greedy(llm, rows, tokens=48), strength=STRENGTH)
        assert metric(llm, "vllm:prefix_cache_hits") > 0
        assert metric(llm, "vllm:num_preemptions") > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
