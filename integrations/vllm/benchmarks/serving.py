"""Time per token and to the first token on vLLM: base, base with vLLM's own LoRA, and policies.

    OMP_NUM_THREADS=1 python integrations/vllm/benchmarks/serving.py                       # SmolLM2-135M, eager
    OMP_NUM_THREADS=1 python integrations/vllm/benchmarks/serving.py --compile --batches 1

Each engine has a process of its own; all stay up and take the rounds in turn, so that what else the machine does meets
all alike. A figure is the median over the rounds, a ratio the median of the rounds' ratios to the base. `wall` is the
clock, `processor` the engine's own seconds, which other work on the machine disturbs less (one thread, no GPU).
A run's results stand beside those of runs with other settings in one file.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
if "--tensor-parallel" not in sys.argv:  # one process an engine, whose processor time is then the whole
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from peft import LoraConfig

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.export import export_vllm
from qadapter.modeling.bases import load_tokenizer, resolve_base
from qadapter.modeling.checkpoint import write_adapter

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "vllm_serving.json"
PROJECTIONS = "(self_attn.[qkvo]_proj|mlp.(gate|up|down)_proj)"
BASE = "base"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def policy_of(base: str, layers: range, alpha_0: float) -> QAdapterForCausalLM:
    """A policy with random updates of rank 8 in these layers."""
    torch.manual_seed(0)
    numbers = "|".join(map(str, layers))
    config = LoraConfig(
        r=8, lora_alpha=16, init_lora_weights=False, target_modules=rf"model\.layers\.({numbers})\.{PROJECTIONS}"
    )
    policy = QAdapterForCausalLM.from_base(base, QAdapterConfig(alpha_0=alpha_0), config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # as small as trained ones: larger ones make bfloat16's rounding visible in the probe
                parameter.mul_(0.1)
    return policy


def write_variants(base: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The engines to compare: name -> arguments of `LLM`, and the LoRA folder of its requests."""
    source = resolve_base(base)
    layers, tokenizer = QAdapterForCausalLM.from_base(base).config.num_hidden_layers, load_tokenizer(source)
    apart, alike = 0.05, QAdapterConfig().alpha_tilde  # both streams are needed, or the adapter's alone
    export_vllm(policy_of(base, range(layers), apart), folder / "all", tokenizer)
    export_vllm(policy_of(base, range(layers // 2, layers), apart), folder / "upper", tokenizer)
    merged = policy_of(base, range(layers), alike)
    export_vllm(merged, folder / "merged", tokenizer)
    (folder / "lora").mkdir()
    write_adapter(merged, "default", folder / "lora")
    return {
        BASE: {"model": source.path},
        "base + vLLM's LoRA": {"model": source.path, "enable_lora": True, "lora": str(folder / "lora")},
        "policy, all layers": {"model": str(folder / "all")},
        "policy, upper half": {"model": str(folder / "upper")},
        "policy, one merged stream": {"model": str(folder / "merged")},
    }


class Engine:
    """One variant's engine in a process of its own, which works when it is asked to."""

    def __init__(self, options: argparse.Namespace, variant: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, options, variant))
        self.process.start()
        other.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join()

    def __call__(self, *question: Any) -> dict[str, Any]:
        """The answer of the engine's process."""
        self.connection.send(question)
        return self.connection.recv()


def work(connection: Any, options: argparse.Namespace, variant: dict[str, Any]) -> None:
    """An engine's process: build it, then answer questions until nobody asks."""
    from vllm import LLM

    lora = variant.pop("lora", None)
    llm = LLM(
        dtype=options.dtype,
        enforce_eager=not options.compile,
        max_model_len=max(1536, options.prompt + options.tokens + 1, options.long_prompt + 1),
        max_num_seqs=max(options.batches),
        # All prompts of a question in one step: what comes after it are single tokens.
        max_num_batched_tokens=max(2048, max(options.batches) * options.prompt, options.long_prompt),
        kv_cache_memory_bytes=options.cache_mib * 2**20,
        gpu_memory_utilization=0.01,  # the cache's size is given; a GPU must have this share free, with all engines up
        enable_prefix_caching=False,
        generation_config="vllm",
        tensor_parallel_size=options.tensor_parallel,
        **variant,
    )
    while True:
        try:
            batch, prompt, tokens = connection.recv()
        except EOFError:
            break
        connection.send(steps(llm, batch, prompt, tokens, lora) if batch else about(llm))
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # vLLM's CPU build may abort when the interpreter ends


def about(llm: Any) -> dict[str, Any]:
    """What the engine is: bytes of key-value cache a token, threads."""
    block = llm.llm_engine.vllm_config.cache_config.block_size
    (layers, *_) = llm.collective_rpc("get_kv_cache_spec")
    cache = sum(layer.page_size_bytes for layer in layers.values()) / block
    return {"cache_bytes_per_token": int(cache), "threads": torch.get_num_threads()}


def steps(llm: Any, batch: int, prompt: int, tokens: int, lora: str | None) -> dict[str, Any]:
    """Milliseconds by each clock of the prompts' step, and of each further token's: {clock: (first, per token)}."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, generator = llm.llm_engine, torch.Generator().manual_seed(batch + prompt)
    request = LoRARequest("adapter", 1, lora) if lora else None
    parameters = SamplingParams(temperature=0, max_tokens=tokens + 1, ignore_eos=True)
    starts = {clock: read() for clock, read in CLOCKS.items()}
    vocabulary = min(40_000, engine.model_config.get_vocab_size())
    for row in torch.randint(5, vocabulary, (batch, prompt), generator=generator).tolist():
        engine.add_request(f"{time.monotonic_ns()}", {"prompt_token_ids": row}, parameters, lora_request=request)
    while not engine.step():  # where it schedules ahead (on a GPU), the first steps give nothing yet
        pass
    firsts = {clock: read() for clock, read in CLOCKS.items()}
    while engine.has_unfinished_requests():
        engine.step()
    ends = {clock: read() for clock, read in CLOCKS.items()}
    return {
        clock: (1000 * (firsts[clock] - starts[clock]), 1000 * (ends[clock] - firsts[clock]) / max(tokens, 1))
        for clock in CLOCKS
    }


def measure(engines: dict[str, Engine], options: argparse.Namespace) -> Iterator[dict[str, dict[str, Any]]]:
    """Rounds in turn: for each engine and clock, milliseconds and ratios to the base; what there is after each kind."""
    questions = {str(batch): (batch, options.prompt, options.tokens) for batch in options.batches}
    questions |= {"first": (1, options.long_prompt, 0)}
    results: dict[str, dict[str, Any]] = {
        name: engine(0, 0, 0) | {clock: {} for clock in CLOCKS} for name, engine in engines.items()
    }
    base = results[BASE]["cache_bytes_per_token"]
    for values in results.values():
        values["cache_ratio"] = round(values["cache_bytes_per_token"] / base, 3)
    for kind, question in questions.items():
        for engine in engines.values():  # warms up
            engine(*question)
        rounds = [{name: engine(*question) for name, engine in engines.items()} for _ in range(options.rounds)]
        for name in engines:
            for clock in CLOCKS:
                part = 0 if kind == "first" else 1
                key = "to_first_token" if kind == "first" else f"per_token_at_{kind}"
                results[name][clock][key] = {
                    "ms": round(statistics.median(row[name][clock][part] for row in rounds), 2),
                    "ratio": round(
                        statistics.median(row[name][clock][part] / row[BASE][clock][part] for row in rounds), 3
                    ),
                }
                print(f"{name:<26} {clock:<10} {key:<16} {results[name][clock][key]}", flush=True)
        yield results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="builtin")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens when decoding is timed")
    parser.add_argument("--long-prompt", type=int, default=1024, help="prompt tokens when the first token is timed")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache-mib", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    run: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "dtype": options.dtype,
        "compiled": options.compile,  # but for vLLM's own LoRA on the CPU, which it never compiles
        "versions": {
            "torch": torch.__version__,
            **{name: version(name) for name in ("vllm" if cuda else "vllm-cpu", "transformers")},
        },
        "load": [round(os.getloadavg()[0], 1)],  # of the machine: before, and after each kind of question
    }
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        engines = {}
        for name, variant in write_variants(options.base, Path(scratch)).items():
            start = time.monotonic()
            engines[name] = stack.enter_context(Engine(options, variant))
            engines[name](0, 0, 0)  # one after the other: compiling takes memory
            print(f"{name:<26} is up after {time.monotonic() - start:.0f} s", flush=True)
        for results in measure(engines, options):
            run["load"].append(round(os.getloadavg()[0], 1))
            save(run | {"results": results}, options)


def save(run: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the run into the file of results; it takes the place of one with the same settings."""
    runs = json.loads(options.output.read_text()) if options.output.exists() else {}
    options.output.write_text(json.dumps(runs | {setting(run, options): run}, indent=2) + "\n")


def setting(run: dict[str, Any], options: argparse.Namespace) -> str:
    """The run's key in the file of results."""
    how = "compiled" if options.compile else "eager"
    batches = " ".join(map(str, options.batches))
    ranks = f", tensor parallel {options.tensor_parallel}" if options.tensor_parallel > 1 else ""
    return f"{run['device']}, {options.base}, {options.dtype}, {how}, batches {batches}{ranks}"


if __name__ == "__main__":
    main()
