"""Time of one decoding step: base, base with a plain LoRA, policy with one and two adapters, and two naive passes.

    python benchmarks/decode.py                                    # SmolLM2-135M-Instruct on the CPU
    python benchmarks/decode.py --device cuda --shape llama-8b     # random weights of an 8B Llama, bfloat16
    python benchmarks/decode.py --compile                          # static cache and torch.compile as well
    python benchmarks/decode.py --one-thread                       # by processor time: for a machine with other work

The variants take turns within each round, and with --processes compile side by side before; figures are medians over
rounds, ratios are to the base of the same round. The results file is written anew after each batch size.
"""

import argparse
import copy
import functools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from results_file import installed, write
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.modeling.bases import load_base, resolve_base
from qadapter.modeling.cache_name import CACHE
from qadapter.modeling.streams import narrow_adapters

PROMPT_TOKENS = 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}

# The base's own first; "LoRA by matmuls" differs where it is compiled only.
VARIANTS = (
    "base", "policy, strength 0", "base + plain LoRA", "policy, strength 1, alpha_0 = alpha_tilde",
    "policy, strength 1, merged", "policy", "policy, LoRA by matmuls", "policy, upper half", "policy, two adapters",
    "policy, threshold", "weights interpolated", "weights interpolated, two adapters", "two naive passes",
)  # fmt: skip

HELD = ExitStack()  # contexts that last as long as the benchmark: one that nothing holds ends at once

Step = Callable[[torch.Tensor], torch.Tensor]
Maker = Callable[[], Step]
# By batch size and variant: runs a round, gives milliseconds a token.
Rounds = dict[tuple[int, str], Callable[[], float]]


def base_model(options: argparse.Namespace) -> PreTrainedModel:
    """The model to decode with, in eval mode."""
    if options.shape == "llama-8b":
        model = random_llama(LLAMA_8B, options)
    else:
        model = load_base(resolve_base("builtin"), dtype=options.dtype)
    return model.to(options.device).eval()


def random_llama(shape: dict[str, int], options: argparse.Namespace) -> PreTrainedModel:
    """A Llama of that shape, its weights made in the options' dtype on their device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(options.dtype)
    with torch.device(options.device):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(default)
    return model


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)


def cache_for(model: PreTrainedModel, length: int, static: bool) -> object:
    config = model.config
    return StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)


def decoder(model, batch: int, options: argparse.Namespace, static: bool, **settings) -> Step:  # type: ignore[no-untyped-def]
    """A function of the last tokens (B, 1) that gives the next logits, after a prompt."""
    total = PROMPT_TOKENS + options.steps * (options.rounds + 2) + 1
    cache = cache_for(model, total, static)
    prompt = torch.randint(5, model.config.vocab_size - 5, (batch, PROMPT_TOKENS), device=options.device)
    model(prompt, **{CACHE: cache}, use_cache=True, logits_to_keep=1, **settings)
    forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False) if static else model.forward
    position = torch.full((batch, 1), PROMPT_TOKENS, device=options.device)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        output = forward(
            input_ids=tokens, position_ids=position, **{CACHE: cache}, use_cache=True, logits_to_keep=1, **settings
        )
        position.add_(1)
        return output.logits[:, -1]

    return step


def makers(model: PreTrainedModel, batch: int, options: argparse.Namespace, static: bool) -> dict[str, Maker]:
    """How to make each decoding step to compare, by name; the base's own first."""
    apart = QAdapterConfig(alpha_0=0.3)  # far from alpha_tilde: both streams are needed

    def of(made: QAdapterForCausalLM, strength: float | torch.Tensor, **settings: float) -> Step:
        narrow_adapters(made.eval().base)  # as loading does
        return decoder(made, batch, options, static, strength=strength, **settings)

    def policy(
        config: QAdapterConfig, strength: float, first_layer: int = 0, sums: bool = True, **settings: float
    ) -> Step:
        made = QAdapterForCausalLM.from_base(copy_of(model), config, lora(), first_adapted_layer=first_layer)
        made.plan.sums_products = sums
        return of(made, strength, **settings)

    def pair(config: QAdapterConfig) -> QAdapterForCausalLM:
        return QAdapterForCausalLM(copy_of(model), {"one": config, "two": config}, {"one": lora(), "two": lora()})

    def weights(made: QAdapterForCausalLM) -> Step:
        """A strength a row, as a server has them, of the weights."""
        made.interpolation = "weights"
        return of(made, torch.linspace(0.1, 0.9, batch, device=options.device))

    def folded() -> Step:
        made = QAdapterForCausalLM.from_base(copy.deepcopy(model), QAdapterConfig(), lora())
        HELD.enter_context(made.merged())
        return of(made, 1.0)

    def plain() -> Step:
        # In the base's dtype, as transformers' users set it for decoding.
        adapted = get_peft_model(copy_of(model), lora(), autocast_adapter_dtype=False).eval()
        return decoder(adapted, batch, options, static)

    def two_passes() -> Step:
        first, second = decoder(model, batch, options, static), plain()
        return lambda tokens: 0.3 * first(tokens) + 0.7 * second(tokens)

    return {
        "base": lambda: decoder(model, batch, options, static),
        "policy, strength 0": lambda: policy(apart, 0.0),
        "base + plain LoRA": plain,
        "policy, strength 1, alpha_0 = alpha_tilde": lambda: policy(QAdapterConfig(), 1.0),
        "policy, strength 1, merged": folded,
        "policy": lambda: policy(apart, 0.7),
        "policy, LoRA by matmuls": lambda: policy(apart, 0.7, sums=False),
        "policy, upper half": lambda: policy(apart, 0.7, model.config.num_hidden_layers // 2),
        "policy, threshold": lambda: policy(QAdapterConfig(), 1.0, min_kl=0.1),
        "policy, two adapters": lambda: of(pair(apart), 0.7),
        "weights interpolated": lambda: weights(
            QAdapterForCausalLM.from_base(copy_of(model), QAdapterConfig(), lora())
        ),
        "weights interpolated, two adapters": lambda: weights(pair(QAdapterConfig())),
        "two naive passes": two_passes,
    }


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in another module tree, without copying them."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def timed(step: Step, batch: int, options: argparse.Namespace) -> float:
    """Milliseconds a token of one round."""
    tokens = torch.full((batch, 1), 7, device=options.device)
    synchronise(options.device)
    clock = time.process_time if options.one_thread else time.perf_counter
    start = clock()
    for _ in range(options.steps):
        step(tokens)
    synchronise(options.device)
    return (clock() - start) / options.steps * 1000


@contextmanager
def here(model: PreTrainedModel, batches: list[int], options: argparse.Namespace, static: bool) -> Iterator[Rounds]:
    """A function for each batch size and variant that runs a round of it, in this process."""
    yield {
        (batch, name): functools.partial(timed, make(), batch, options)
        for batch in batches
        for name, make in makers(model, batch, options, static).items()
        if name in options.only
    }


@contextmanager
def in_processes(batches: list[int], options: argparse.Namespace, static: bool) -> Iterator[Rounds]:
    """The same, each in a process with a model of its own: they compile side by side, and run in turn."""
    context = multiprocessing.get_context("spawn")
    processes, ends = [], {}
    for batch in batches:
        for name in options.only:
            ends[batch, name], theirs = context.Pipe()
            processes.append(context.Process(target=_serve, args=(theirs, name, batch, options, static), daemon=True))
            processes[-1].start()

    def run(end: Any) -> float:
        end.send(True)
        return end.recv()

    rounds = {}
    for key, end in ends.items():
        problem = end.recv() if end.poll(options.patience) else f"not ready after {options.patience} s"
        if problem:
            print(f"{key}: {problem}", file=sys.stderr)
        else:
            rounds[key] = functools.partial(run, end)
    yield rounds
    for process in processes:
        process.terminate()
        process.join()


@torch.no_grad()
def _serve(end: Any, name: str, batch: int, options: argparse.Namespace, static: bool) -> None:
    torch.manual_seed(0)
    try:
        step = makers(base_model(options), batch, options, static)[name]()
        timed(step, batch, options)
    except Exception as error:  # out of memory, or whatever the compiler raises: the other variants are measured
        end.send(f"{type(error).__name__}: {error}")
        return
    end.send(None)
    while end.recv():
        end.send(timed(step, batch, options))


@torch.no_grad()
def measure(rounds: Rounds, options: argparse.Namespace) -> dict[int, dict[str, dict[str, float]]]:
    """By batch size and variant: median milliseconds a token, and median ratio to the base."""
    times: dict[tuple[int, str], list[float]] = {key: [] for key in rounds}
    for (batch, name), run in rounds.items():  # compiles, or warms up
        start = time.monotonic()
        run()
        print(f"ready: batch {batch}, {name}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"timing {options.rounds} rounds", file=sys.stderr, flush=True)
    for _ in range(options.rounds):
        for key, run in rounds.items():
            times[key].append(run())
    figures: dict[int, dict[str, dict[str, float]]] = {}
    for (batch, name), values in times.items():
        base = times.get((batch, "base"), [math.nan] * len(values))
        figures.setdefault(batch, {})[name] = {
            "milliseconds": round(statistics.median(values), 3),
            "ratio": round(statistics.median(v / b for v, b in zip(values, base, strict=True)), 3),
        }
    return figures


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="builtin", choices=["builtin", "llama-8b"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=8, help="tokens a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also compiled, with a static cache")
    parser.add_argument("--no-eager", action="store_true", help="not uncompiled")
    parser.add_argument("--one-thread", action="store_true", help="on a CPU: processor time of one thread")
    parser.add_argument("--processes", action="store_true", help="each variant in a process of its own")
    parser.add_argument("--patience", type=int, default=300, help="seconds a process may take to get ready")
    parser.add_argument("--only", nargs="+", default=VARIANTS, choices=VARIANTS, help="beside the base")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.one_thread:
        torch.set_num_threads(1)
    # All variants share one forward's code: past eight of them the compiler would run the rest eagerly and not say so.
    torch._dynamo.config.recompile_limit = 4 * len(VARIANTS)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    options.only = [variant for variant in VARIANTS if variant in ("base", *options.only)]
    options.kinds = [kind for kind, wanted in ((False, not options.no_eager), (True, options.compile)) if wanted]
    name = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.dtype = getattr(torch, name)
    torch.manual_seed(0)
    model = None if options.processes else base_model(options)
    results: list[dict[str, Any]] = []
    save = functools.partial(
        write,
        options.output,
        f"decode_{options.shape}_{options.device}",
        options.device,
        name,
        installed("torch", "transformers", "peft"),
        shape=options.shape,
        results=results,
    )
    for static in options.kinds:
        # All batch sizes at once only where they compile side by side: caches and copies take memory.
        for batches in [options.batches] if model is None else [[batch] for batch in options.batches]:
            torch.compiler.reset()
            kind = "compiled, static cache" if static else "eager"
            place = in_processes(batches, options, static) if model is None else here(model, batches, options, static)
            with place as rounds:
                measured = measure(rounds, options)
            for batch, figures in measured.items():
                results.append({"kind": kind, "batch": batch, "figures": figures})
                print(f"{kind}, batch {batch}")
                for variant, values in figures.items():
                    print(f"  {variant:<44} {values['milliseconds']:>9.2f} ms  {values['ratio']:>6.2f}x")
            save()


if __name__ == "__main__":
    main()
