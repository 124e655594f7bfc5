"""The engine computes the policy: same greedy tokens and log-probabilities as the transformers path in float32."""

import pytest
import torch
from models import APART, lora
from safetensors.torch import save_file
from served import FAMILIES, MIXED, STRENGTH, UPPER, assert_same, engine, exported, greedy, metric, prompts, tiny_folder
from transformers import AutoModelForCausalLM

from qadapter import QAdapterConfig, QAdapterForCausalLM

ALIKE = QAdapterConfig(alpha_tilde=0.3, alpha_0=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers(tmp_path, family):
    policy, _ = tiny_folder(tmp_path, family)
    rows = prompts(*MIXED)
    with engine(exported(policy, tmp_path / "out")) as llm:
        assert_same(policy, rows, greedy(llm, rows))


def test_mistral_s_own_files_beside_those_trained_on_are_left_alone(tmp_path):
    policy, base = tiny_folder(tmp_path, "mistral")
    policy.save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    save_file({"layers.0.attention.wq.weight": torch.zeros(3, 3)}, base / "consolidated.safetensors")
    (base / "params.json").write_text('{"dim": 3}')
    (base / "tokenizer.model.v3").touch()
    rows = prompts(*MIXED)
    with engine(tmp_path / "adapter", hf_overrides={"qadapter": {"strength": STRENGTH}}) as llm:
        assert_same(policy, rows, greedy(llm, rows))
    assert not list(exported(policy, tmp_path / "out").glob("consolidated*"))


@pytest.mark.parametrize("parametrisation", ["residual", "logits"])
def test_streams_that_part_in_the_upper_layers(tmp_path, parametrisation):
    config = QAdapterConfig(parametrisation=parametrisation, alpha_tilde=0.5, alpha_0=0.2)
    policy, _ = tiny_folder(tmp_path, config=config, peft_config=lora(target_modules=UPPER, use_rslora=True))
    rows = prompts(*MIXED)
    with engine(exported(policy, tmp_path / "out", strength=1.3)) as llm:
        assert_same(policy, rows, greedy(llm, rows), strength=1.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_hits_chunked_prefill_and_preemption_change_nothing(tmp_path, family):
    policy, _ = tiny_folder(tmp_path, family)
    shared = prompts(64)[0]
    rows = [shared + tail for tail in prompts(*range(20, 36), seed=4)]
    pressed = {"max_num_batched_tokens": 48, "kv_cache_memory_bytes": 2 * 4 * 2 * 32 * 4 * 32 * 14}
    with engine(exported(policy, tmp_path / "out"), **pressed) as llm:
        greedy(llm, [shared], tokens=1)
        answers = greedy(llm, rows, tokens=40)
        assert_same(policy, rows, answers)
        assert metric(llm, "vllm:prefix_cache_hits") > 0
        assert metric(llm, "vllm:num_preemptions") > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(tmp_path, family):
    """Two layers, of which the upper one is doubled: compiling takes its time a layer."""
    changes = {"num_hidden_layers": 2}
    if family == "gemma3":
        changes["layer_types"] = FAMILIES[family]["layer_types"][:2]
    upper = lora(target_modules=r"model\.layers\.1\..*(q_proj|v_proj|down_proj)")
    policy, _ = tiny_folder(tmp_path, family, peft_config=upper, **changes)
    rows = prompts(*MIXED)
    torch._dynamo.utils.counters.clear()
    with (
        torch._dynamo.config.patch(disable=False),
        engine(exported(policy, tmp_path / "out"), enforce_eager=False) as llm,
    ):
        assert_same(policy, rows, greedy(llm, rows))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_two_adapters_with_weights(tmp_path):
    first, base = tiny_folder(tmp_path)
    second, _ = tiny_folder(tmp_path, config=ALIKE, seed=2)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    folders = {name: str(tmp_path / name) for name in ("first", "second")}
    weights = {"first": 0.8, "second": -0.4}
    both = QAdapterForCausalLM.from_pretrained(str(base), adapters=folders, adapter_weights=weights)
    rows = prompts(*MIXED)
    entry = {"adapters": folders, "weights": weights, "strength": 0.9}
    overrides = {"architectures": ["QAdapterLlamaForCausalLM"], "qadapter": entry}
    with engine(base, hf_overrides=overrides) as llm:
        assert_same(both, rows, greedy(llm, rows), strength=0.9)
    with engine(exported(both, tmp_path / "out", strength=0.9)) as llm:
        assert_same(both, rows, greedy(llm, rows), strength=0.9)


@pytest.mark.parametrize(("config", "strength"), [(ALIKE, 1.0), (APART, 0.0)])
def test_one_stream_is_enough_at_the_ends_of_the_dial(tmp_path, config, strength):
    policy, _ = tiny_folder(tmp_path, config=config)
    rows = prompts(*MIXED)
    with engine(exported(policy, tmp_path / "out", strength=strength)) as llm:
        assert_same(policy, rows, greedy(llm, rows), strength=strength)
        # No layer is doubled, no linear layer carries an update.
        assert llm.apply_model(_layers_and_buffers) == [(4, 0)]


def _layers_and_buffers(model):
    attention = sum(len(layer.self_attn.attn.layers) for layer in model.model.layers)
    return attention, sum("lora" in name for name, _ in model.named_buffers())


def test_bfloat16_is_as_close_as_the_transformers_path(tmp_path):
    policy, _ = tiny_folder(tmp_path)
    rows = prompts(*MIXED)
    with engine(exported(policy, tmp_path / "out"), dtype="bfloat16") as llm:
        answers = greedy(llm, rows, tokens=1)
    exact = [last_logps(policy, row) for row in rows]
    policy.to(torch.bfloat16)
    ours = max((last_logps(policy, row) - logps).abs().max().item() for row, logps in zip(rows, exact, strict=True))
    for logps, answer in zip(exact, answers, strict=True):
        assert max(abs(logps[token].item() - entry.logprob) for token, entry in answer.logprobs[0].items()) < 2 * ours


@torch.no_grad()
def last_logps(policy, row, strength=STRENGTH):
    return policy(torch.tensor([row]), strength=strength).logits[0, -1].float().log_softmax(-1)
