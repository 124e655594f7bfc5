"""What is customised to what, on how many pairs, and how the result is measured: one `Setting`, hashed into the key."""

from dataclasses import dataclass, field

OWN_PAIRS = ("terse", "capitals")  # made of the base's own answers by own_pairs.py


@dataclass(frozen=True)
class Training:
    """The same for every method: LoRA, optimiser, data order (by seed) and number of pairs.

    Args:
        pairs_a_step: pairs an optimiser step, `micro_batch` at a time.
        lora_layers: "all", "upper" for the upper half of the layers, or another share of them from the top, as "1/4".
        label_noise: share of the training pairs whose answers are swapped.
        packed: packed rows, and the base's states kept over the epochs, where a method runs both answers of each pair
            and nothing else: the same losses, sooner.
    """

    epochs: float = 1.0
    pairs_a_step: int = 16
    micro_batch: int = 8
    learning_rate: float = 3e-4
    lora_r: int = 8
    lora_layers: str = "all"
    label_noise: float = 0.0
    packed: bool = False


@dataclass(frozen=True)
class Measuring:
    """How a policy is measured, at which settings of its dial.

    Args:
        strengths: of the dial z_b + λ (z̃ − z_b) (on a DPO LoRA: DeRa), for log-probabilities; all from one pass.
        scales: of the LoRA's weights (for a LoRA, WiSE-FT's weight averaging).
        sampled_strengths, sampled_scales: those of them at which answers are sampled and judged.
        threshold: `min_kl` in nats with which the strengths, and the sampled ones, are measured once more; 0: not.
        tasks: benchmarks of lm-eval over local files, at the sampled strengths; `task_limit` items of each.
    """

    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.5)
    sampled_strengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    sampled_scales: tuple[float, ...] = (0.5,)
    threshold: float = 0.0
    sampled_prompts: int = 96
    max_new_tokens: int = 128
    temperature: float = 0.7
    generation_batch: int = 48
    batch_tokens: int = 16384
    texts: tuple[str, ...] = ("prose",)
    max_text_tokens: int = 256
    retained_pairs: int = 200
    tasks: tuple[str, ...] = ()
    task_limit: int = 200


@dataclass(frozen=True)
class Setting:
    """One customisation.

    Args:
        pairs: the preference data (pools.py): "dsp/entertainment", "hh-rlhf/harmless", "builtin", one of OWN_PAIRS, ...
        base: id or folder of the base model, "builtin" or "tiny".
        prepared: preference data to which the base is tuned first, by DPO, and merged; "" for none.
        prepared_by: the training of that, where it is not `training`: variants in training have one base.
        retained: preference data whose held-out pairs the policy should not forget.
        judge: "style" (a classifier fitted on prompts of its own), "reward" (a reward model trained on them), or a
            rule such as "rule:max-words=5", or "right:5", which wants the right answer in at most five words.
        train_pairs, eval_pairs: at most so many, after leaving out pairs above `max_length` tokens; None for all.
    """

    name: str
    pairs: str
    base: str = "builtin"
    dtype: str = "auto"
    prepared: str = ""
    prepared_by: Training | None = None
    retained: tuple[str, ...] = ()
    judge: str = "style"
    max_length: int = 512
    train_pairs: int | None = None
    eval_pairs: int | None = None
    training: Training = field(default_factory=Training)
    measuring: Measuring = field(default_factory=Measuring)
    drift_limit: float = 0.25  # nats a token; the right end of the trade-off curve
