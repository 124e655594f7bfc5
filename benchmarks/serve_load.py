"""Load on the server: requests/s and latency for base and policy, and whether every answer is its own prompt's.

    python benchmarks/serve_load.py --model builtin [--requests 16] [--concurrency 8] [--max-tokens 16]

Starts `qadapter serve` on a free port of this machine, with a random adapter on the model, and again with its weights
interpolated. For each case it asks every
prompt alone and then all prompts at once, greedily, over streams. An answer that differs from its single run counts as
mixed up, unless the two likeliest tokens were within --tie nats where they part: batches of another size add floats in
another order. Ends with exit code 1 if an answer is lost or mixed up.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import openai
import torch

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.modeling.bases import load_tokenizer

RESULT = Path(__file__).parent / "results" / "serve_load.json"
COMMAND = "import sys; from qadapter.cli.serve import run; sys.exit(run(sys.argv[1:]))"
PACKAGES = ("torch", "transformers", "peft", "fastapi", "uvicorn", "openai")
TOPICS = ("rain", "bread", "chess", "tides", "violins", "maps", "ants", "glass", "trains", "salt", "clocks")
ALL = [("base", None), ("random", 1.0), ("random", 0.7), ("random", -0.5)]
# By what a server interpolates, its cases: (model, strength) of each request in turn. Between strength 0 and 1 logits
# need two streams.
SERVERS = {
    "logits": {
        "base": ALL[:1],
        "policy, strength 1": ALL[1:2],
        "policy, strength 0.7": ALL[2:3],
        "all mixed": ALL,
    },
    "weights": {
        "weights, strength 0.7": ALL[2:3],
        "weights, all mixed": ALL,
    },
}
CASES = [name for cases in SERVERS.values() for name in cases]


@dataclass
class Reply:
    """An answer: its tokens, the gap between the two likeliest ones at each, and seconds to the first and the last."""

    tokens: list[str]
    gaps: list[float]
    first: float
    last: float


def make_adapter(model: str, folder: Path, seed: int) -> None:
    """Write an adapter with small random weights on `model`."""
    policy = QAdapterForCausalLM.from_base(model, QAdapterConfig())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    policy.save_pretrained(folder, tokenizer=load_tokenizer(policy.base_source))


def ask(client: openai.OpenAI, number: int, case: list[tuple[str, float | None]], max_tokens: int) -> Reply:
    """The answer to prompt `number`; prompts differ in topic, number and length."""
    model, strength = case[number % len(case)]
    filler = "very " * (number * 5 % 17)
    text = f"Write {filler}short note number {number} about {TOPICS[number % len(TOPICS)]}."
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=max_tokens,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        extra_body={} if strength is None else {"qadapter": {"strength": strength}},
    )
    reply = Reply([], [], 0.0, 0.0)
    for chunk in stream:
        choice = chunk.choices[0]
        for entry in choice.logprobs.content if choice.logprobs else []:
            reply.first = reply.first or time.perf_counter() - started
            reply.tokens.append(entry.token)
            reply.gaps.append(entry.top_logprobs[0].logprob - entry.top_logprobs[1].logprob)
    reply.last = time.perf_counter() - started
    return reply


def verdict(alone: Reply, together: Reply, tie: float) -> str:
    """How an answer compares with its single run: "equal", "near tie" or "mixed up"."""
    if alone.tokens == together.tokens:
        return "equal"
    pairs = list(zip(alone.tokens, together.tokens, strict=False))
    place = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return "near tie" if place < len(alone.gaps) and alone.gaps[place] < tie else "mixed up"


def measure(client: openai.OpenAI, case: list[tuple[str, float | None]], options: argparse.Namespace) -> dict:
    """The figures of one case."""
    numbers = range(options.requests)
    ask(client, 0, case, 2)  # the first request of a kind warms up

    def timed(concurrency: int) -> tuple[list[Reply | None], float]:
        def guarded(number: int) -> Reply | None:
            try:
                return ask(client, number, case, options.max_tokens)
            except openai.APIError as error:
                print(f"request {number}: {error}", file=sys.stderr)
                return None

        started = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(guarded, numbers)), time.perf_counter() - started

    alone, alone_seconds = timed(1)
    together, seconds = timed(options.concurrency)
    verdicts = [
        "lost" if one is None or other is None else verdict(one, other, options.tie)
        for one, other in zip(alone, together, strict=True)
    ]
    replies = [reply for reply in together if reply is not None]
    return {
        "requests_per_second": len(replies) / seconds,
        "requests_per_second_alone": sum(reply is not None for reply in alone) / alone_seconds,
        "tokens_per_second": sum(len(reply.tokens) for reply in replies) / seconds,
        "latency_seconds": percentiles([reply.last for reply in replies]),
        "first_token_seconds": percentiles([reply.first for reply in replies]),
        "answers": {kind: verdicts.count(kind) for kind in ("equal", "near tie", "mixed up", "lost")},
        "machine_load": os.getloadavg()[0],  # above the number of threads: others were at work, too
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99."""
    ordered = sorted(values) or [float("nan")]
    last = len(ordered) - 1
    return {f"p{percent}": ordered[round(last * percent / 100)] for percent in (50, 90, 99)}


def environment() -> dict:
    """What the figures depend on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}, {os.cpu_count()} cores",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def measure_server(
    adapter: Path, interpolation: str, cases: dict[str, list[tuple[str, float | None]]], options: argparse.Namespace
) -> dict[str, dict]:
    """The figures of the cases, by a server of their own."""
    server = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(adapter), "--port", "0", "--dtype", options.dtype,
         "--interpolation", interpolation, "--max-batch", str(max(options.concurrency, 8))],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        ready = re.search(r"http://\S+", server.stdout.readline() if server.stdout else "")
        if ready is None:
            raise SystemExit("the server did not start.")
        with openai.OpenAI(base_url=ready.group(), api_key="none", max_retries=0, timeout=300) as client:
            return {name: report(name, measure(client, case, options)) for name, case in cases.items()}
    finally:
        server.terminate()
        server.wait(60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tie", type=float, default=1e-3, help="nats; 0.1 for bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    cases = {}
    with tempfile.TemporaryDirectory() as scratch:
        make_adapter(options.model, Path(scratch) / "random", options.seed)
        for interpolation, own in SERVERS.items():
            wanted = {name: case for name, case in own.items() if name in options.cases}
            if wanted:
                cases.update(measure_server(Path(scratch) / "random", interpolation, wanted, options))
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**environment(), "settings": settings, "cases": cases}, indent=2) + "\n")
    return int(any(case["answers"]["mixed up"] + case["answers"]["lost"] for case in cases.values()))


def report(name: str, figures: dict) -> dict:
    """Print the figures of a case, and return them."""
    latency = " ".join(f"{key} {value:.2f}" for key, value in figures["latency_seconds"].items())
    answers = ", ".join(f"{count} {kind}" for kind, count in figures["answers"].items() if count)
    rate, alone, tokens = (
        figures[key] for key in ("requests_per_second", "requests_per_second_alone", "tokens_per_second")
    )
    print(f"{name:<22} {rate:6.2f} requests/s ({alone:.2f} one by one), {tokens:.1f} tokens/s", flush=True)
    print(f"{'':<22} latency in s: {latency}; {answers}; machine's load {figures['machine_load']:.1f}", flush=True)
    return figures


if __name__ == "__main__":
    sys.exit(main())
