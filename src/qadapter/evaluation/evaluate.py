"""Everything that is measured of the columns of one adapter, part by part, as JSON values."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qadapter.errors import ConfigError
from qadapter.evaluation.benchmarks import Benchmarks
from qadapter.evaluation.columns import BASE, Column
from qadapter.evaluation.differences import drift_items, pair_items
from qadapter.evaluation.drift import TextDrift, measure_texts
from qadapter.evaluation.drift_figures import breakdowns, drift_figures
from qadapter.evaluation.judges import Judge, Verdict, make_judge
from qadapter.evaluation.judges.models import ModelJudge
from qadapter.evaluation.judging import ask, judged
from qadapter.evaluation.part_store import PartStore, jsonable
from qadapter.evaluation.preferences import (
    PairDrift,
    Temperatures,
    by_category,
    calibration,
    paired,
    preference_figures,
    reward_margins,
)
from qadapter.evaluation.progress import Track, silent
from qadapter.evaluation.resampling import group_numbers
from qadapter.evaluation.subjects import Subject
from qadapter.evaluation.texts import (
    HeldOutPairs,
    Prompt,
    Text,
    digest,
    excerpt,
    instructions,
    load_pairs,
    neutral_texts,
    reference_texts,
    sample,
)
from qadapter.evaluation.traits import answer_traits, commonest_language, mean_words, trait_changes
from qadapter.evaluation.workload import Workload
from qadapter.generation import Answer, Sampling, generate_texts

WORST = 10
GENERATION_BATCH = 8


class Evaluation:
    """Measures columns of one adapter; each method is a part, stored when finished.

    Args:
        columns: without the base, which every part adds as the first.
        detailed: the columns that get breakdowns, worst cases, items and answers; None for all.
        limited_tasks: tasks that have a limit, run besides the workload's.
        swept: run benchmarks on all columns, whose likelihoods come from one pass, in place of the detailed ones.
    """

    def __init__(
        self,
        subject: Subject,
        columns: Sequence[Column],
        workload: Workload,
        store: PartStore,
        track: Track = silent,
        detailed: Sequence[str] | None = None,
        limited_tasks: Sequence[str] = (),
        swept: bool = False,
    ) -> None:
        names = [column.name for column in columns]
        if BASE in names or len(set(names)) < len(names):
            raise ConfigError(f"columns {names}: each name once, and {BASE!r} is taken.")
        for column in columns:
            column.direction(subject.model)  # refuses unknown adapters before any work
        self.subject, self.columns, self.workload, self.store, self.track = subject, columns, workload, store, track
        self.detailed = [column for column in columns if detailed is None or column.name in detailed]
        self.judges = {name: make_judge(name) for name in workload.judges}
        self.identity = subject.identity()
        # All texts are read before anything is measured: a file that is not there is a matter of the first second.
        longest = subject.longest_text(workload.max_length)
        self.held_out = load_pairs(
            workload.dataset,
            subject.tokenizer,
            workload.split,
            workload.data_columns,
            workload.max_pairs,
            longest,
            workload.seed,
        )
        self.neutral_texts = neutral_texts(subject.tokenizer, workload.neutral_text, longest)
        self.prompts = instructions(workload.instructions, workload.max_instructions, workload.seed)
        generating = [column for column in columns if column.alpha_0 is None]
        self.benchmarks = Benchmarks(
            subject,
            self.identity,
            generating if swept else self.detailed,
            workload.tasks,
            limited_tasks,
            workload.tasks_from,
            {**{name: getattr(workload, name) for name in ("limit", "seed", "chat_template")}, "shared": swept},
            store,
            track,
        )

    def pairs(self) -> dict[str, Any]:
        """Preference figures, calibration, and drift on the chosen answers."""
        inputs = [*self._inputs(), digest(self.held_out.texts), self.held_out.summary]
        return self.store.part("pairs", inputs, self._measured_pairs)

    def _measured_pairs(self) -> dict[str, Any]:
        held_out = self.held_out
        pairs = paired(self._measured("Held-out pairs", held_out.texts))
        temperatures, seed = self.temperatures(), self.workload.seed
        chosen, texts = [pair.chosen for pair in pairs], [pair.chosen for pair in held_out.pairs]
        categories = [text.category for text in texts]
        return {
            "n": len(pairs),
            "prompts": len(held_out.prompts),
            "rows": held_out.summary,
            "columns": preference_figures(pairs, temperatures, held_out.groups, seed),
            "calibration": {
                name: calibration(reward_margins(pairs, name, own), held_out.groups)
                for name, own in temperatures.items()
                if name != BASE
            },
            "chosen": {
                "columns": drift_figures(chosen, held_out.groups, seed),
                "breakdown": self._breakdowns(chosen, texts, held_out.groups),
            },
            "categories": {
                column.name: by_category(pairs, categories, column.name, held_out.groups)
                for column in self.detailed
                if any(category is not None for category in categories)
            },
            "worst": {column.name: _worst_pairs(pairs, held_out, column.name) for column in self.detailed},
            "items": {
                "groups": group_numbers(held_out.groups),
                "columns": {column.name: pair_items(pairs, column.name) for column in self.detailed},
            },
        }

    def temperatures(self) -> dict[str, Temperatures | None]:
        """Those of each column, and of the base those that all columns have in common."""
        columns = {column.name: self.subject.temperatures(column) for column in self.columns}
        common = set(columns.values())
        return {BASE: common.pop() if len(common) == 1 else None, **columns}

    def neutral(self) -> dict[str, Any]:
        """Drift on text that has nothing to do with the preference."""
        return self._drift_part("neutral", "Neutral text", self.neutral_texts)

    def instructions(self) -> dict[str, Any]:
        """Drift on what the base itself says to general instructions.

        Raises:
            ConfigError: it says nothing to any of them.
        """
        prompts = self.prompts
        answers = self.answers(BASE, prompts, "instructions")
        texts = [text for text in reference_texts(self.subject.tokenizer, prompts, answers) if text is not None]
        if not texts:
            raise ConfigError(
                f"all {len(prompts)} answers of the base to general instructions are empty: give others with "
                f"--instructions, or more than {self.workload.max_new_tokens} tokens with --max-new-tokens."
            )
        return self._drift_part("instructions", "Answers of the base", texts)

    def answers(self, column: str, prompts: Sequence[Prompt], kind: str) -> list[Answer]:
        """Greedy answers of a column (by name) to prompts.

        Args:
            kind: which prompts, for the progress bar: "instructions" or "prompts".
        """
        chosen = Column(BASE, 0.0) if column == BASE else next(own for own in self.columns if own.name == column)
        identity = self.identity["base"] if column == BASE else self.identity
        inputs = [identity, chosen.settings(), [prompt.content for prompt in prompts], self.workload.max_new_tokens]
        rows = self.store.part("answers", inputs, lambda: self._generated(chosen, prompts, kind))
        return [Answer(**row) for row in rows]

    def _generated(self, column: Column, prompts: Sequence[Prompt], kind: str) -> list[dict[str, Any]]:
        advance = self.track(f"{column.name} answers {kind}", len(prompts))
        with column.applied(self.subject.model):
            answers = generate_texts(
                self.subject.model,
                self.subject.tokenizer,
                [prompt.content for prompt in prompts],
                Sampling(max_new_tokens=self.workload.max_new_tokens),
                batch_size=GENERATION_BATCH,
                progress=advance,
            )
        return [asdict(answer) for answer in answers]

    def behaviour(self) -> dict[str, Any]:
        """Answers of the base and the detailed columns to the general instructions, and what kind of text they are."""
        prompts = self.prompts
        base = self.answers(BASE, prompts, "instructions")
        answers = {column.name: self.answers(column.name, prompts, "instructions") for column in self.detailed}
        result = {
            "n": len(prompts),
            "columns": {
                name: {
                    "traits": answer_traits(own, base),
                    "changes": trait_changes(own, base),
                    "language": commonest_language(own),
                    "words": mean_words(own),
                }
                for name, own in {BASE: base, **answers}.items()
            },
            "examples": [
                {
                    "prompt": prompt.text,
                    "category": prompt.category,
                    "answers": {name: _shown(own[index]) for name, own in {BASE: base, **answers}.items()},
                }
                for index, prompt in enumerate(prompts)
            ],
        }
        return jsonable(result)

    def judged(self) -> list[dict[str, Any]]:
        """For each judge and detailed column, how often its answers beat the base's."""
        if not self.workload.judges:
            return []
        prompts = self.held_out.prompts
        prompts = [prompts[index] for index in sample(len(prompts), self.workload.prompts, self.workload.seed)]
        base = self.answers(BASE, prompts, "prompts")
        results = []
        for name, judge in self.judges.items():
            for column in self.detailed:
                own = self.answers(column.name, prompts, "prompts")
                results.append({"judge": name, "column": column.name, **self._judged(name, judge, prompts, own, base)})
        return results

    def _judged(
        self, name: str, judge: Judge, prompts: Sequence[Prompt], own: Sequence[Answer], base: Sequence[Answer]
    ) -> dict[str, Any]:
        weights = judge.scorer.fingerprint() if isinstance(judge, ModelJudge) else None
        inputs = [
            name,
            weights,
            [prompt.content for prompt in prompts],
            list(map(asdict, own)),
            list(map(asdict, base)),
        ]

        def compute() -> dict[str, Any]:
            known = [Verdict(**row) for row in self.store.stored("verdicts", inputs) or ()]
            verdicts = ask(judge, prompts, own, base, known, self.track(f"Judge {name}", len(prompts)))
            if any(verdict.winner is None for verdict in verdicts):
                self.store.keep("verdicts", inputs, verdicts)
            return judged(verdicts, prompts, own, base)

        # A judge that could not be reached may be there next time, and is then asked for what is missing.
        return self.store.part("judged", inputs, compute, keep=lambda result: result["missing"] == 0)

    def tasks(self) -> dict[str, Any]:
        """Benchmarks through lm-eval, base against columns on the same items; {task: figures}."""
        return self.benchmarks.results()

    # -- what the parts share ----------------------------------------------------------------------------------

    def _inputs(self) -> list[Any]:
        columns = [asdict(column) for column in self.columns]
        return [self.identity, columns, [column.name for column in self.detailed], self.workload.seed]

    def _drift_part(self, name: str, title: str, texts: Sequence[Text]) -> dict[str, Any]:
        return self.store.part(name, [*self._inputs(), digest(texts)], lambda: self._drift(title, texts))

    def _drift(self, title: str, texts: Sequence[Text]) -> dict[str, Any]:
        drifts = self._measured(title, texts)
        return {
            "n": len(texts),
            "tokens": sum(len(text.answer) for text in texts),
            "columns": drift_figures(drifts, seed=self.workload.seed),
            "breakdown": self._breakdowns(drifts, texts),
            "worst": {column.name: _worst_texts(drifts, texts, column.name) for column in self.detailed},
            "items": {"columns": {column.name: drift_items(drifts, column.name) for column in self.detailed}},
        }

    def _measured(self, title: str, texts: Sequence[Text]) -> list[TextDrift]:
        advance = self.track(title, len(texts))
        return measure_texts(self.subject.model, texts, self.columns, advance=advance)

    def _breakdowns(
        self, drifts: Sequence[TextDrift], texts: Sequence[Text], groups: Sequence[str] | None = None
    ) -> dict[str, Any]:
        tokenizer, seed = self.subject.tokenizer, self.workload.seed
        return {
            column.name: breakdowns(drifts, texts, column.name, tokenizer, groups, seed) for column in self.detailed
        }


def _shown(answer: Answer) -> dict[str, Any]:
    return {name: value for name, value in asdict(answer).items() if name != "ids"}


def _worst_pairs(pairs: Sequence[PairDrift], held_out: HeldOutPairs, column: str) -> list[dict[str, Any]]:
    """The pairs that the policy ranks wrongly with the largest margins, worst first."""
    margins = [pair.log_ratio_margin(column) for pair in pairs]
    worst = sorted((index for index, margin in enumerate(margins) if margin < 0), key=lambda index: margins[index])
    return [
        {
            "prompt": excerpt(held_out.pairs[index].prompt.text),
            "category": held_out.pairs[index].prompt.category,
            "chosen": excerpt(held_out.pairs[index].chosen.excerpt),
            "rejected": excerpt(held_out.pairs[index].rejected.excerpt),
            "log_ratio_margin": margins[index],
        }
        for index in worst[:WORST]
    ]


def _worst_texts(drifts: Sequence[TextDrift], texts: Sequence[Text], column: str) -> list[dict[str, Any]]:
    """The texts whose loss rose most, worst first."""
    rises = [(drift.base.logps - drift.columns[column].logps).double().mean().item() for drift in drifts]
    worst = sorted((index for index, rise in enumerate(rises) if rise > 0), key=lambda index: -rises[index])
    return [
        {
            "text": texts[index].excerpt,
            "category": texts[index].category,
            "loss_change": rises[index],
            "kl": drifts[index].mean_kl(column),
        }
        for index in worst[:WORST]
    ]
