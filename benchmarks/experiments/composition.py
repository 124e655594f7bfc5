"""Does a composition have both preferences? Adapters trained apart and mixed by their logits, beside two rivals.

python -m benchmarks.experiments.composition   # an hour on two cores; needs no data but the package's own

Two preferences on the built-in pairs: "concise" as they are, and "opening", where the long answer opens with a sentence
or does not. (One that closes with a sentence would not do: to say it, the model ends its answers early.) Measured on
held-out prompts: the share of greedy answers that are short, that open with the sentence, and that do both; and KL from
the base on text that has nothing to do with either. The rivals are the usual ones: the LoRAs' weights added up (PEFT's
"cat"), which needs one pass where a composition runs each adapter, and one adapter trained on the pairs of both, which
cannot be mixed anew.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from rich.console import Console

from benchmarks.results_file import RESULTS, write
from qadapter import QAdapterForCausalLM, load_preference_dataset
from qadapter.builtin import QUICKSTART_STEPS
from qadapter.evaluation.columns import Column
from qadapter.evaluation.drift import measure_texts
from qadapter.evaluation.drift_figures import drift_figures
from qadapter.evaluation.intervals import wilson
from qadapter.evaluation.progress import progress_bar
from qadapter.evaluation.texts import neutral_texts
from qadapter.export import export_lora
from qadapter.generation import Answer, Sampling, generate_texts
from qadapter.modeling.bases import BaseSource, load_base, load_tokenizer, resolve_base
from qadapter.modeling.wrapping import wrap
from qadapter.plots import line_chart
from qadapter.quickstart import train_adapter

OPENING = "Good question."
CONCISE_WORDS = 40  # the longest short answer, the opening sentence not counted
PREFERENCES = ("concise", "opening")
ALONE, EVEN, UNEVEN = ((1.0, 0.0), (0.0, 1.0)), ((0.5, 0.5), (0.75, 0.75), (1.0, 1.0)), ((1.0, 0.5), (0.5, 1.0))
STRENGTHS = (0.5, 1.0)
Contender = tuple[str, tuple[float, ...], QAdapterForCausalLM]


def preference_pairs(name: str) -> Dataset:
    """The training pairs of "concise", of "opening", or of "both", one after the other."""
    rows = load_preference_dataset("builtin").select_columns(["prompt", "chosen", "rejected"])
    if name == "concise":
        return rows
    if name == "both":
        return concatenate_datasets([preference_pairs("concise"), preference_pairs("opening")])
    return rows.map(
        lambda row: {"chosen": f"{OPENING} {row['rejected']}"}, load_from_cache_file=False, keep_in_memory=True
    )


def judge(answer: Answer) -> dict[str, bool]:
    """Whether an answer ends by itself and is short, opens with the sentence, and both."""
    text = answer.text.strip()
    opens, words = text.startswith(OPENING), len(text.removeprefix(OPENING).split())
    concise = answer.finished and 0 < words <= CONCISE_WORDS
    return {"concise": concise, "opening": opens, "both": concise and opens}


def summed_loras(source: BaseSource, adapters: Mapping[str, Path], weights: Sequence[float], scratch: Path) -> Path:
    """The folder of one plain LoRA whose update is Σ_k w_k ΔW_k, added up by PEFT."""
    for name, adapter in adapters.items():
        if not (scratch / name).exists():
            export_lora(QAdapterForCausalLM.from_pretrained(adapter), scratch / name)
    first, *others = adapters
    base = load_base(source, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(scratch / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(scratch / name), adapter_name=name)
    model.add_weighted_adapter(list(adapters), list(weights), "summed", combination_type="cat")
    folder = scratch / "-".join(map(str, weights))
    model.save_pretrained(folder, selected_adapters=["summed"], save_embedding_layers=False)
    return folder / "summed"


def contenders(source: BaseSource, adapters: Mapping[str, Path], both: Path, scratch: Path) -> Iterator[Contender]:
    """(name, weights of the two or strength, policy with them set), one after the other."""
    composed = QAdapterForCausalLM.from_pretrained(
        source.path, adapters={name: str(path) for name, path in adapters.items()}, dtype=torch.float32
    )
    for weights in ((0.0, 0.0), *ALONE, *EVEN, *UNEVEN):
        composed.adapter_weights = dict(zip(adapters, weights, strict=True))
        yield ("base" if weights == (0.0, 0.0) else "composition"), weights, composed
    for weights in EVEN:
        yield "summed LoRAs", weights, wrap(summed_loras(source, adapters, weights, scratch), dtype=torch.float32)[0]
    joint = QAdapterForCausalLM.from_pretrained(both, dtype=torch.float32)
    for strength in STRENGTHS:
        joint.adapter_weights = {"default": strength}
        yield "one adapter on both", (strength,), joint


def figures(policy: QAdapterForCausalLM, tokenizer: Any, prompts: Sequence[str], longest: int) -> dict[str, Any]:
    """Shares of greedy answers that follow either preference and both, with intervals, and KL on neutral text."""
    answers = generate_texts(policy, tokenizer, prompts, Sampling(max_new_tokens=longest), batch_size=16)
    judged = [judge(answer) for answer in answers]
    shares = {name: wilson(sum(verdict[name] for verdict in judged), len(judged)) for name in judged[0]}
    measured = drift_figures(measure_texts(policy, neutral_texts(tokenizer), [Column("policy")]))["policy"]
    drift = {name: measured[name] for name in ("loss", "loss_change", "kl")}
    rounded = {name: [round(value, 4) for value in interval[:3]] for name, interval in {**shares, **drift}.items()}
    return {**rounded, "example": answers[0].text}


def plot(results: Sequence[Mapping[str, Any]]) -> str:
    """Answers that have both preferences against drift, as even weights (or the strength) rise from 0; an SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in results:
        if entry["contender"] != "base" and len(set(entry["weights"])) == 1:
            series.setdefault(entry["contender"], []).append((entry["kl"][0], entry["both"][0]))
    start = next((entry["kl"][0], entry["both"][0]) for entry in results if entry["contender"] == "base")
    lines = {name: [start, *points] for name, points in series.items()}
    return line_chart(
        lines, "Both preferences at once", "KL from the base on neutral text, nats a token", "answers with both"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=QUICKSTART_STEPS, help="of each adapter; the one on both has twice"
    )
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts that are answered")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    source = resolve_base("builtin")
    tokenizer = load_tokenizer(source)
    held_out = load_preference_dataset("builtin", split="test")
    prompts = list(dict.fromkeys(row["prompt"] for row in held_out))[: options.prompts]
    with tempfile.TemporaryDirectory() as temporary, progress_bar(Console(stderr=True)) as progress:
        scratch = Path(temporary)
        trained = {
            name: train_adapter(
                scratch / f"trained-{name}", source, tokenizer, preference_pairs(name), torch.float32,
                options.steps * (2 if name == "both" else 1), progress,
            )
            for name in (*PREFERENCES, "both")
        }  # fmt: skip
        adapters = {name: trained[name] for name in PREFERENCES}
        task = progress.add_task("Measuring", total=1 + len(ALONE) + 2 * len(EVEN) + len(UNEVEN) + len(STRENGTHS))
        results = []
        for name, setting, policy in contenders(source, adapters, trained["both"], scratch):
            found = figures(policy, tokenizer, prompts, options.max_new_tokens)
            results.append({"contender": name, "weights": list(setting), **found})
            print(results[-1], file=sys.stderr)
            progress.advance(task)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    output = options.output or RESULTS / "composition.json"
    write(output, "composition", "cpu", "float32", versions, preferences=list(PREFERENCES),
          prompts=len(prompts), max_new_tokens=options.max_new_tokens, results=results)  # fmt: skip
    output.with_suffix(".svg").write_text(plot(results))


if __name__ == "__main__":
    main()
