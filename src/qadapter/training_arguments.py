"""The trainer's arguments: transformers', with our defaults, and what our batches and passes need."""

import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from qadapter.errors import ConfigError
from qadapter.training_metrics import SMALLER_IS_BETTER

OWN_TEXTS = "own"
# Arguments of transformers that do not fit pairs or passes: the values that leave them off, and what to do instead.
UNFIT: dict[str, tuple[tuple[Any, ...], str]] = {
    "torch_compile_backend": ((None,), "use torch_compile = true alone; leave it out."),
    "torch_compile_mode": ((None,), "use torch_compile = true alone; leave it out."),
    "label_smoothing_factor": ((0,), "it is of tokens; that of pairs is label_smoothing (QAdapterConfig)."),
    "neftune_noise_alpha": ((None,), "the noise would reach the frozen base too. Leave it out."),
    "train_sampling_strategy": (("random", "sequential"), "use micro_batch_tokens, which runs alike lengths together."),
    "remove_unused_columns": ((False,), "batches are made of columns that the model does not name. Leave it out."),
}
# Likewise of `accelerator_config`.
UNFIT_OF_ACCELERATE = {
    "dispatch_batches": "one process would cut all batches row by row, which a pair's two sides do not survive.",
    "split_batches": "held-out pairs would be miscounted, as if each process had a whole batch.",
}


@dataclass
class QAdapterTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults for a LoRA on preference pairs, and how to tokenise them.

    Args:
        torch_compile: compile each decoder layer by itself, and the head (`qadapter.modeling.compiled`).
        max_length: tokens of prompt and answer together; prompts are cut from the left to fit, answers never.
        max_prompt_length: tokens of the prompt alone; None leaves it to max_length.
        cache_tokens: keep the tokens of 1,000 rows or more for later runs, 5 GiB at most (`qadapter.data.token_cache`).
        packing: run each pair's prompt once and put pairs side by side in a row instead of padding them, where the
            architecture and its attention allow; the loss is the same.
        share_trunk: run the layers below the first adapted one once for both streams; the loss is the same.
        fused_head: take what the loss needs of the logits chunk by chunk, without ever holding those of all tokens; the
            loss is the same.
        cache_base_states: "memory" or a folder: keep the base's hidden states of the training pairs, so that from the
            second epoch on the base does not run (`qadapter.base_states`); None does not.
        micro_batch_tokens: split a batch into parts of at most so many tokens, pairs of similar length together, run
            one after the other; the loss is the same. None runs a batch at once.
        retention_texts: where `retention` (QAdapterConfig) is above 0: "own", texts that the base writes, or a file of
            texts, paragraphs or JSONL with `text` (`qadapter.retention`).

    Raises:
        ConfigError: a setting with which the objective cannot be trained; `retention_texts` that is no file.
    """

    torch_compile: bool = field(default=False, metadata={"help": "Compile each decoder layer, and the head."})
    learning_rate: float = 3e-4
    logging_steps: float = 10
    # It reads the loss at every step, for which the host would wait; the trainer stops at one that is not finite.
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    max_length: int | None = field(default=1024, metadata={"help": "Longest prompt and answer together, in tokens."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longest prompt, in tokens."})
    cache_tokens: bool = field(
        default=True, metadata={"help": "Keep tokens of 1,000 rows or more for later runs, 5 GiB at most."}
    )
    packing: bool = field(default=True, metadata={"help": "Shared prompts and packed rows instead of padding."})
    share_trunk: bool = field(default=True, metadata={"help": "Layers below the first adapted one run once."})
    fused_head: bool = field(default=True, metadata={"help": "The head chunk by chunk, without all tokens' logits."})
    cache_base_states: str | None = field(
        default=None, metadata={"help": "Keep the base's hidden states over the epochs: memory, or a folder."}
    )
    micro_batch_tokens: int | None = field(
        default=None, metadata={"help": "Run a batch in parts of at most so many tokens, sorted by length."}
    )

    retention_texts: str = field(
        default=OWN_TEXTS, metadata={"help": "Texts for --retention: own (the base writes them), or a file of texts."}
    )

    def __post_init__(self) -> None:
        if self.fp16:
            raise ConfigError("fp16 = true: float16 training of this objective diverges. Use bf16 = true, or neither.")
        for name, (fitting, instead) in UNFIT.items():
            if (value := getattr(self, name)) not in fitting:
                raise ConfigError(f"{name} = {value!r}: {instead}")
        texts = self.retention_texts
        if not isinstance(texts, str) or not (texts == OWN_TEXTS or os.path.isfile(texts)):
            raise ConfigError(f'retention_texts = {texts!r}: must be "{OWN_TEXTS}" or a file of texts.')
        best = str(self.metric_for_best_model).removeprefix("eval_")
        # transformers' own default takes more of anything but a loss for better.
        # Of several evaluation sets a metric has its set's name before its own.
        smaller = any(best == name or best.endswith(f"_{name}") for name in SMALLER_IS_BETTER)
        if self.greater_is_better is None and smaller:
            self.greater_is_better: bool | None = False
        # The Trainer would compile the whole model; ours compiles layer by layer (`modeling.compiled`).
        layer_by_layer = self.torch_compile
        self.torch_compile = False
        super().__post_init__()
        self.torch_compile = layer_by_layer
        for name, reason in UNFIT_OF_ACCELERATE.items():
            if getattr(self.accelerator_config, name):
                raise ConfigError(f"accelerator_config: {name} = True: {reason} Leave it out.")
        self.accelerator_config.dispatch_batches = False  # left at None it would be true for streams
        # Else the host waits, at each batch's copy to the device, for the step before, and collates only then.
        if self.dataloader_pin_memory and self.device.type == "cuda":
            self.accelerator_config.non_blocking = True
        self.label_names: list[str] = self.label_names or []
