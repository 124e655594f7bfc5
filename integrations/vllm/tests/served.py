"""Policies on tiny bases, written as folders for vLLM, and engines that serve them."""

import contextlib
import gc

import torch
from models import APART, lora, tiny_base, tiny_tokenizer, train_randomly

from qadapter import QAdapterForCausalLM
from qadapter.export import export_vllm
from qadapter.modeling.bases import load_tokenizer

SIZES = {
    "hidden_size": 64,
    "head_dim": 32,  # the smallest that the engine's attention on the CPU takes
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True},
    "gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
STRENGTH = 0.7
UPPER = r"model\.layers\.[23]\..*(q_proj|v_proj|down_proj)"


def tiny_folder(root, family="llama", config=APART, peft_config=None, seed=1, **changes):
    """A base of the family and an untrained policy's folder with random adapter: (policy, base folder)."""
    base = root / f"{family}-base"
    if not base.exists():
        architecture = "llama" if family == "gemma" else family
        sizes = {"tie_word_embeddings": False, **SIZES, **FAMILIES[family], **changes}
        tiny_base(architecture, **sizes).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
    policy = QAdapterForCausalLM.from_base(base, config, peft_config or lora())
    return train_randomly(policy, seed=seed).eval(), base


def exported(policy, folder, strength=STRENGTH):
    """The policy as a folder for vLLM."""
    export_vllm(policy, folder, load_tokenizer(policy.base_source), strength)
    return folder


@contextlib.contextmanager
def engine(folder, **options):
    """vLLM's `LLM` on a folder, taken down afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "block_size": 32,
        "kv_cache_memory_bytes": 32 * 2**20,
        "generation_config": "vllm",
        "disable_log_stats": False,
    }
    llm = LLM(str(folder), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts(*lengths, seed=3, vocabulary=97):
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths]


MIXED = (1, 5, 17, 33, 3, 60)


def greedy(llm, rows, tokens=16, **extra):
    """Greedy answers with the five likeliest tokens' log-probabilities."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, **extra)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], parameters, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


@torch.no_grad()
def assert_same(policy, rows, answers, strength=STRENGTH, tolerance=5e-4, **settings):
    """The answers are greedy under the policy, and their log-probabilities the policy's, token by token."""
    worst = 0.0
    for row, answer in zip(rows, answers, strict=True):
        ids = [*row, *answer.token_ids]
        logits = policy(torch.tensor([ids]), strength=strength, use_cache=False, **settings).logits
        logps = logits[0, len(row) - 1 : -1].float().log_softmax(-1)  # (tokens, V)
        assert logps.argmax(-1).tolist() == list(answer.token_ids)
        for expected, actual in zip(logps, answer.logprobs, strict=True):
            assert len(actual) >= 5
            worst = max(worst, *(abs(expected[token].item() - entry.logprob) for token, entry in actual.items()))
    assert worst <= tolerance, f"log-probabilities are off by {worst:.2e}"
    return worst


def metric(llm, name):
    """The engine's counter of that name."""
    (value,) = [entry.value for entry in llm.get_metrics() if entry.name == name]
    return value


def cache_tokens(llm):
    """How many tokens the engine's key-value cache holds."""
    config = llm.llm_engine.vllm_config.cache_config
    return config.num_gpu_blocks * config.block_size


def answers_at(llm, rows, strengths, tokens=16):
    """Greedy answers of one batch with a strength for each row."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, extra_args=extra)
        for extra in ({} if strength is None else {"qadapter_strength": strength} for strength in strengths)
    ]
    inputs = [{"prompt_token_ids": row} for row in rows]
    return [output.outputs[0] for output in llm.generate(inputs, parameters, use_tqdm=False)]
