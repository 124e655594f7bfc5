"""The texts and prompts that a setting's policies are measured on, and the judge of its samples."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.answers import kept_answers
from benchmarks.experiments.judges import Judge, RewardJudge, RightAnswerJudge, RuleJudge, StyleJudge
from benchmarks.experiments.likelihood import load_items, own_tasks
from benchmarks.experiments.measure import Material, pair_texts, prompt_groups
from benchmarks.experiments.methods import Context
from benchmarks.experiments.pools import fitting, load_pairs, load_pools, read_lines
from benchmarks.experiments.reward_model import kept_reward_model, train_reward_model
from qadapter.devices import default_device
from qadapter.errors import ConfigError, DataError
from qadapter.evaluation.texts import Text, neutral_texts
from qadapter.generation import Answer, encode

TEXTS = ("prose", "wikitext", "lambada", "gsm8k")
TEXTS_A_SOURCE = 60
JUDGE_TRAINING = {"epochs": 2.0, "learning_rate": 3e-4}


def load_material(context: Context, data: Path) -> Material:
    """What the policies of a setting are measured on, but for the base's answers, which depend on the seed."""
    setting, measuring = context.setting, context.setting.measuring
    prompts = context.pools.prompts[: measuring.sampled_prompts]
    retained = {}
    for source in setting.retained:
        other = replace(setting, pairs=source, eval_pairs=measuring.retained_pairs)
        retained[source] = pair_texts(list(load_pools(other, context.tokenizer, data, context.cache).held_out_ids))
    return Material(
        pairs=pair_texts(list(context.pools.held_out_ids)),
        groups=prompt_groups(context.pools),
        texts={name: load_texts(name, context.tokenizer, data, measuring.max_text_tokens) for name in measuring.texts},
        retained=retained,
        prompts=prompts,
        items={name: load_items(name, context.tokenizer, data, measuring.task_limit) for name in own_tasks(measuring)},
        base_answers=[],
    )


def base_answers(context: Context, prompts: Sequence[Any]) -> list[Answer]:
    """The base's sampled answers with the context's seed: drawn once and kept."""
    measuring = context.setting.measuring
    return kept_answers(
        context.cache / f"base_answers_{context.seed}.json", context.new_policy, context.tokenizer, prompts,
        context.seed, measuring.max_new_tokens, measuring.temperature, measuring.generation_batch,
    )  # fmt: skip


def load_texts(name: str, tokenizer: Any, data: Path, max_tokens: int) -> list[Text]:
    """Texts whose loss should not rise: the package's prose, WikiText-2, LAMBADA's last words, GSM8K's solutions.

    Raises:
        ConfigError: an unknown name.
        DataError: the files are not there.
    """
    if name == "prose":
        return neutral_texts(tokenizer, max_length=max_tokens)
    if name not in TEXTS:
        raise ConfigError(f"texts {name!r}: choose among {', '.join(TEXTS)}.")
    files = {"wikitext": "wikitext2_valid.txt.gz", "lambada": "lambada_test.jsonl.gz", "gsm8k": "gsm8k_test.jsonl.gz"}
    path = data / "bench" / files[name]
    if not path.exists():
        raise DataError(f"{path} is not there: texts {name!r} cannot be measured. Pass --data, or leave them out.")
    if name == "wikitext":
        return _paragraphs(path, tokenizer, max_tokens)
    rows = read_lines(path)[:TEXTS_A_SOURCE]
    texts = []
    for row in rows:
        if name == "lambada":
            context = tokenizer(row["query"])["input_ids"]
            answer = tokenizer(" " + row["choices"][0].strip(), add_special_tokens=False)["input_ids"]
        else:
            context = encode(tokenizer, [row["question"]])["input_ids"][0].tolist()
            answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        texts.append(Text(context, answer))
    return texts


def _paragraphs(path: Path, tokenizer: Any, max_tokens: int) -> list[Text]:
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file if len(line.split()) > 60]
    texts = [tokenizer(line)["input_ids"][:max_tokens] for line in lines[:TEXTS_A_SOURCE]]
    return [Text(ids[:1], ids[1:]) for ids in texts]


def make_judge(context: Context) -> Judge:
    """The judge that a setting names, fitted on the judge's own pairs.

    Raises:
        ConfigError: another kind.
    """
    setting, pairs = context.setting, context.pools.judge
    if setting.judge == "style":
        return StyleJudge(pairs, words=max(8, round(0.75 * setting.measuring.max_new_tokens)))
    if setting.judge.startswith("rule:"):
        return RuleJudge(setting.judge.removeprefix("rule:"))
    if setting.judge.startswith("right:"):
        everything = load_pairs(setting.pairs, Path(), context.cache)
        return RightAnswerJudge(everything, int(setting.judge.removeprefix("right:")))
    if setting.judge == "reward":
        _, ids = fitting(pairs, context.tokenizer, setting.max_length, None)
        training = replace(setting.training, **JUDGE_TRAINING)
        device = torch.device(default_device())
        fixed = context.base, training, setting.dtype, device
        digest = hashlib.sha256(repr(training).encode()).hexdigest()[:12]
        model = kept_reward_model(
            context.cache / f"reward_judge_{digest}.pt", *fixed,
            lambda: train_reward_model(context.base, ids, training, setting.dtype, 0, device),
        )  # fmt: skip
        return RewardJudge(model, context.tokenizer, len(ids))
    raise ConfigError(f"judge {setting.judge!r}: choose style, reward, right:WORDS or rule:NAME.")


def sample_rows(prompts: Sequence[Any], samples: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the samples file: one a prompt and point."""
    return [
        {"point": point, "prompt": prompt, "text": answer.text, "finished": answer.finished}
        for point, answers in samples.items()
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
