"""The trainer: transformers.Trainer with the objective of `qadapter.functional`, its metrics, and adapter folders."""

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from qadapter.base_states import IN_MEMORY, BaseStatesCollator, PairsWithStates, keep_base_states
from qadapter.data import PackedCollator, PreferenceCollator, TokenisationReport, tokenise_preferences
from qadapter.data.micro_batches import MicroBatchCollator
from qadapter.data.token_cache import cacheable, tokenise_cached
from qadapter.errors import ConfigError, TrainingError
from qadapter.fused import TokenStatistics
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.bases import tokenizer_fingerprint
from qadapter.modeling.checkpoint import write_json
from qadapter.modeling.compiled import compile_layers
from qadapter.modeling.loading import load_adapter_weights
from qadapter.modeling.packed import enable_packing
from qadapter.modeling.quantised import check_trainable
from qadapter.objective import pair_losses
from qadapter.training_log import TrainingLogCallback

logger = logging.getLogger(__name__)


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
        cache_base_states: "memory" or a folder: keep the base's hidden states of the training pairs, so that from the
            second epoch on the base does not run (`qadapter.base_states`); None does not.
        micro_batch_tokens: split a batch into parts of at most so many tokens, pairs of similar length together, run
            one after the other; the loss is the same. None runs a batch at once.
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
    cache_base_states: str | None = field(
        default=None, metadata={"help": "Keep the base's hidden states over the epochs: memory, or a folder."}
    )
    micro_batch_tokens: int | None = field(
        default=None, metadata={"help": "Run a batch in parts of at most so many tokens, sorted by length."}
    )

    def __post_init__(self) -> None:
        if self.fp16:
            raise ConfigError("fp16 = true: float16 training of this objective diverges. Use bf16 = true, or neither.")
        for name in ("torch_compile_backend", "torch_compile_mode"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: use torch_compile = true alone; leave it out.")
        # The Trainer would compile the whole model; ours compiles layer by layer (`modeling.compiled`).
        layer_by_layer = self.torch_compile
        self.torch_compile = False
        super().__post_init__()
        self.torch_compile = layer_by_layer
        # One process collating for all would cut a batch row by row, which the two sides of a pair do not survive.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        self.label_names: list[str] = self.label_names or []


class QAdapterTrainer(Trainer):
    """Trains the adapter of a `QAdapterForCausalLM` on preference pairs.

    Datasets are preference pairs as `load_preference_dataset` gives them, or already tokenised; `processing_class`
    is the tokenizer. Metrics carry the field's names, plus qadapter/{kl, value, penalty}, averaged over the logging
    interval without a host synchronisation a step.

    Raises:
        ConfigError: the model is not a `QAdapterForCausalLM`, its adapter is in float16, its base is quantised in a way
            that cannot be trained on, or a tokenizer is missing.
    """

    # compute_loss returns a mean over the micro-batch's pairs: the Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga = False
    train_dataset: Any

    def __init__(self, model: QAdapterForCausalLM, args: QAdapterTrainingArguments, **kwargs: Any) -> None:
        if not isinstance(model, QAdapterForCausalLM):
            raise ConfigError(
                f"model is a {type(model).__name__}: make it one with QAdapterForCausalLM.from_base(model, ...)."
            )
        if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
            raise ConfigError("the model is in float16, in which this objective diverges: load it with dtype=bfloat16.")
        check_trainable(model.base, model.base_source.name)
        if not isinstance(args, QAdapterTrainingArguments):
            raise ConfigError(f"args is a {type(args).__name__}: give QAdapterTrainingArguments.")
        tokenizer = kwargs.get("processing_class")
        if not args.share_trunk:
            model.shared_layers = 0
        if args.torch_compile:
            compile_layers(model)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = collator_for(model, padding_token(tokenizer, model), args.packing)
        self._pair_collator = kwargs["data_collator"]
        kwargs["data_collator"] = self._with_options(self._pair_collator, args)
        self.tokenisation_reports: dict[str, Any] = {}
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = self._tokenised(name, kwargs.get(name), tokenizer, args)
        if tokenizer is not None:
            model.remember_tokenizer(tokenizer)
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            for name in ("cache_base_states", "micro_batch_tokens"):
                if getattr(args, name):
                    raise ConfigError(f"{name} = {getattr(args, name)!r}: not with FSDP or DeepSpeed. Leave it out.")
        self._sums: dict[str, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)
        self.add_callback(TrainingLogCallback())

    @staticmethod
    def _with_options(collator: Any, args: QAdapterTrainingArguments) -> Any:
        packed = isinstance(collator, PackedCollator)
        if args.cache_base_states:
            collator = BaseStatesCollator(collator)
        if args.micro_batch_tokens is not None:
            collator = MicroBatchCollator(collator, args.micro_batch_tokens, packed)
        return collator

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; with `cache_base_states`, the base's states are computed first, by one process for all."""
        where = self.args.cache_base_states
        if where and not isinstance(self.train_dataset, PairsWithStates):
            if where == IN_MEMORY and self.args.world_size > 1:
                raise ConfigError("cache_base_states = 'memory' with several processes: give a folder that all see.")
            with self.args.main_process_first(local=False, desc="the base's states"):
                self.train_dataset = keep_base_states(
                    self.model, self.train_dataset, self._pair_collator, where, self.args.per_device_train_batch_size,
                    precision=self.compute_loss_context_manager,
                )  # fmt: skip
        return super().get_train_dataloader()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; with `micro_batch_tokens`, part by part, each weighted by its share of the pairs."""
        *parts, last = inputs.get("micro_batches") or [inputs]
        losses = []
        with self.accelerator.no_sync(model):  # gradients of several processes meet once, after the last part
            for part in parts:
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def _tokenised(self, name: str, dataset: Any, tokenizer: Any, args: QAdapterTrainingArguments) -> Any:
        if isinstance(dataset, dict):
            return {key: self._tokenised(f"{name}/{key}", part, tokenizer, args) for key, part in dataset.items()}
        if dataset is None or (
            isinstance(dataset, Dataset | IterableDataset) and "prompt_ids" in (dataset.column_names or ())
        ):
            return dataset
        if tokenizer is None:
            raise ConfigError(f"{name} holds text but processing_class is missing: pass the base model's tokenizer.")
        dataset, self.tokenisation_reports[name] = tokenised_pairs(dataset, tokenizer, args)
        return dataset

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of the batch's pairs (times their share of it); collects metrics of train or eval on the device."""
        share = inputs.pop("share", 1.0)
        statistics = TokenStatistics(*model(**inputs))
        mask = inputs["completion_mask"] if "gather_indices" in inputs else inputs["completion_mask"][:, 1:].bool()
        config = self.accelerator.unwrap_model(self.model).configs[self.model.adapters[0]]
        losses, quantities = pair_losses(statistics, mask, config)
        self._collect("train" if model.training else "eval", quantities, mask)
        loss = losses.mean() * share
        return (loss, statistics) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: logits of an evaluation would not fit in memory."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self.compute_loss(model, part) for part in inputs.get("micro_batches") or [inputs]]
        return torch.stack(losses).sum(), None, None

    def _collect(self, mode: str, quantities: dict[str, Tensor], mask: Tensor) -> None:
        chosen, rejected = quantities["returns"].chunk(2)
        logps_chosen, logps_rejected = quantities["logps"].chunk(2)
        per_pair = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps_chosen,
            "logps/rejected": logps_rejected,
            "qadapter/penalty": quantities["penalty"],
        }
        for name, values in per_pair.items():
            self._add(mode, name, values.sum(), values.new_full((), len(values)))
        tokens = mask.sum()
        for name, key in {"entropy": "entropy", "qadapter/kl": "kl", "qadapter/value": "values"}.items():
            self._add(mode, name, (quantities[key] * mask).sum(), tokens)

    def _add(self, mode: str, name: str, total: Tensor, weight: Tensor) -> None:
        sums = self._sums[mode]
        old_total, old_weight = sums.get(name, (0, 0))
        sums[name] = (old_total + total, old_weight + weight)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of training to its log entries; those of an evaluation are in its own already.

        Raises:
            TrainingError: the mean loss of the steps since the last entry, or of an evaluation, is not finite.
        """
        if "loss" in logs or "train_loss" in logs:
            logs |= self._averages("train")
        super().log(logs, start_time)
        for name, value in logs.items():
            if (name == "loss" or name.endswith("_loss")) and not math.isfinite(value):
                raise self._divergence(name, value)

    def _divergence(self, name: str, value: float) -> TrainingError:
        """An evaluation's loss ends the run as well: the policy cannot answer pairs like those it is trained for.

        Going on could only save it, and no choice of the best checkpoint can compare with NaN. It comes before the
        step's checkpoint, so that the last one is of a policy that could.
        """
        step = self.state.global_step
        if name not in ("loss", "train_loss") and step == 0:
            return TrainingError(
                f"{name} is {value} before any training: load the base in float32, or check its files."
            )
        which = f"mean loss up to step {step}" if name in ("loss", "train_loss") else f"{name} after step {step}"
        return TrainingError(
            f"the {which} is {value}: training has diverged. Lower learning_rate ({self.args.learning_rate:g}) "
            f"or set a smaller max_grad_norm ({self.args.max_grad_norm:g})."
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the Trainer's, with our metrics under the same prefix."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output.metrics.update(self._averages("eval", f"{metric_key_prefix}_"))
        return output

    def _averages(self, mode: str, prefix: str = "") -> dict[str, float]:
        """What was collected since the last call, averaged over all processes."""
        sums = self._sums.pop(mode, {})
        if not sums:
            return {}
        pairs = torch.stack([torch.stack([total.double(), weight.double()]) for total, weight in sums.values()])
        means = self.accelerator.reduce(pairs, reduction="sum")
        ratios = (means[:, 0] / means[:, 1]).tolist()
        return {prefix + name: ratio for name, ratio in zip(sums, ratios, strict=True)}

    # -- saving and resuming -----------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, state_dict=state_dict, tokenizer=self.processing_class)
        write_json(folder / "training_arguments.json", self.args.to_sanitized_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter_weights(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_adapter_weights(self.accelerator.unwrap_model(self.model), str(self.state.best_model_checkpoint))


def tokenised_pairs(dataset: Any, tokenizer: Any, args: QAdapterTrainingArguments) -> tuple[Any, TokenisationReport]:
    """(tokenised pairs, report), as the arguments say; large datasets through the cache of tokens."""
    tokenise: Callable[..., Any] = tokenise_preferences
    if args.cache_tokens and cacheable(dataset, tokenizer):
        tokenise = functools.partial(tokenise_cached, fingerprint=tokenizer_fingerprint(tokenizer))
    return tokenise(dataset, tokenizer, max_length=args.max_length, max_prompt_length=args.max_prompt_length)


def collator_for(model: QAdapterForCausalLM, pad_token_id: int, packing: bool) -> PackedCollator | PreferenceCollator:
    """The collator of the cheapest batches that the model can run: packed rows, else padded ones."""
    if packing and enable_packing(model.base):
        return PackedCollator()
    if packing:
        logger.info("%s with this attention cannot run packed rows: batches are padded.", type(model.base).__name__)
    return PreferenceCollator(pad_token_id=pad_token_id)


def padding_token(tokenizer: Any, model: QAdapterForCausalLM) -> int:
    """The id to pad with; padding is masked everywhere, so any id will do where no pad token is defined."""
    for owner in (tokenizer, model.config.get_text_config(decoder=True)):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return 0
