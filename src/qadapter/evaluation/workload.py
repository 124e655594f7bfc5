"""What an evaluation runs on, and how much of it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qadapter.errors import ConfigError

BUILTIN = "builtin"
SEEDS = 2**32  # that lm-eval takes, at the end of all other work


@dataclass(frozen=True)
class Workload:
    """What an evaluation runs on, and how much of it.

    Args:
        dataset, split, data_columns: the held-out pairs, as in `texts.load_pairs`.
        max_pairs: pairs measured; None for all.
        neutral_text, instructions: files instead of the package's own texts.
        max_instructions: instructions whose answers are measured.
        judges: names of judges, as in `judges.make_judge`; without one no prompt of the pairs is answered.
        prompts: how many prompts of the pairs, drawn by `seed`, are answered and judged.
        max_new_tokens: longest answer; answers are greedy.
        tasks, limit: benchmarks of lm-eval, and items of each; None for all.
        tasks_from: a folder of further tasks, or of benchmark files.
        chat_template: put the benchmarks' questions as a user's messages.
        max_length: longest text in tokens.
        seed: of samples, bootstrap and tasks.
    """

    dataset: str = BUILTIN
    split: str | None = None
    data_columns: dict[str, str] = field(default_factory=dict)
    max_pairs: int | None = None
    neutral_text: Path | None = None
    instructions: Path | None = None
    max_instructions: int | None = None
    judges: tuple[str, ...] = ()
    prompts: int = 24
    max_new_tokens: int = 80
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    tasks_from: Path | None = None
    chat_template: bool = False
    max_length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pairs", "max_instructions", "prompts", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: must be at least 1.")
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed = {self.seed}: must be between 0 and {SEEDS - 1}.")
        if self.max_length < 2:
            raise ConfigError(f"max_length = {self.max_length}: must be at least 2 tokens.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


# How much is measured, by name; `standard` takes a few minutes for a 135M model on two CPU cores.
BUDGETS: dict[str, dict[str, Any]] = {
    "quick": {"max_pairs": 60, "max_instructions": 8, "prompts": 12, "max_new_tokens": 48, "limit": 100},
    "standard": {"max_pairs": 300, "max_instructions": 24, "prompts": 24, "max_new_tokens": 80, "limit": 500},
    "full": {"max_pairs": None, "max_instructions": None, "prompts": 200, "max_new_tokens": 256, "limit": None},
}
