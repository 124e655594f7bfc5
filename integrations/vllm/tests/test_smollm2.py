"""A real model: SmolLM2-135M-Instruct with an adapter in its upper half, on texts of mixed lengths."""

import pytest
from models import APART, lora, train_randomly
from served import STRENGTH, assert_same, engine, exported, greedy

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


def test_smollm2_equals_transformers(tmp_path):
    try:
        source = resolve_base("builtin")
    except ConfigError as error:
        pytest.skip(f"no SmolLM2 here: {error}")
    policy = QAdapterForCausalLM.from_base(source.path, APART, lora(target_modules=UPPER_HALF))
    train_randomly(policy, scale=0.03).eval()
    tokenizer = load_tokenizer(source)
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in QUESTIONS
    ]
    with engine(exported(policy, tmp_path / "out"), kv_cache_memory_bytes=256 * 2**20) as llm:
        assert_same(policy, rows, greedy(llm, rows, tokens=32), strength=STRENGTH)
