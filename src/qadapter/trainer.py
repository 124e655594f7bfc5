"""The trainer: transformers.Trainer with the objective of `qadapter.functional`, its metrics, and adapter folders."""

import logging
import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, TrainOutput, has_length

from qadapter.base_states import IN_MEMORY, PairsWithStates, keep_base_states
from qadapter.config import QAdapterConfig
from qadapter.data.base_limits import RETAINED, require_fit
from qadapter.data.tokenisation import pairs_digest
from qadapter.errors import ConfigError, DataError, TrainingError
from qadapter.fused import TokenStatistics
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.checkpoint import copy_adapter
from qadapter.modeling.compiled import compile_layers
from qadapter.modeling.policy import DEFAULT_ADAPTER
from qadapter.modeling.probe import make_probe
from qadapter.modeling.quantised import check_trainable
from qadapter.modeling.resuming import load_adapter_weights
from qadapter.new_folders import write_json
from qadapter.objective import pair_losses, response_mask
from qadapter.retention import given_texts, with_retained_texts
from qadapter.run_folder import (
    ARGUMENTS_NAME,
    PAIRS,
    LastStep,
    NothingLeft,
    nothing_left_of_refusals,
    warn_of_other_pairs,
)
from qadapter.training_arguments import QAdapterTrainingArguments
from qadapter.training_batches import (
    collator_for,
    padding_token,
    require_packing,
    tokenised_pairs,
    with_options,
)
from qadapter.training_log import TrainingLogCallback
from qadapter.training_metrics import PairMetrics
from qadapter.training_sharded import fit_sharding

logger = logging.getLogger(__name__)


class QAdapterTrainer(Trainer):
    """Trains the adapter of a `QAdapterForCausalLM` on preference pairs.

    Datasets are preference pairs as `load_preference_dataset` gives them, or already tokenised (prompt_ids, chosen_ids,
    rejected_ids); `processing_class` is the tokenizer. Metrics, averaged over the logging interval without a host
    synchronisation a step, are rewards/{chosen, rejected, accuracies, margins} and logps/{chosen, rejected} of the
    answers, entropy, and qadapter/{kl, value, penalty}; docs/method.md has the objective.

    Raises:
        ConfigError: the model is not a `QAdapterForCausalLM`, its adapter is in float16, its base is quantised in a way
            that cannot be trained on, a tokenizer is missing, or a function is given that would never be called.
        DataError: the training data are several splits, no dataset, or no pairs.
    """

    # The Trainer divides what compute_loss returns by the accumulation steps.
    loss_is_scaled_for_ga = False
    train_dataset: Any

    def __init__(self, model: QAdapterForCausalLM, args: QAdapterTrainingArguments, **kwargs: Any) -> None:
        _check_arguments(model, args, kwargs)
        if args.n_gpu > 1:  # the Trainer would hand each some rows of a batch, and a packed one has a single row
            warnings.warn(
                f"one of {args.n_gpu} GPUs is used: for all of them start a process each, as "
                f"`torchrun --nproc-per-node {args.n_gpu} -m qadapter train` does.",
                stacklevel=2,
            )
            args._n_gpu = 1
        tokenizer = kwargs.get("processing_class")
        if not args.share_trunk:
            model.shared_layers = 0
        model.head = replace(model.head, fused=args.fused_head)
        if args.torch_compile:
            compile_layers(model)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = collator_for(model, padding_token(tokenizer, model), args.packing)
        self._pair_collator = require_packing(kwargs["data_collator"], model)
        kwargs["data_collator"] = with_options(self._pair_collator, args)
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = self._tokenised(name, kwargs.get(name), tokenizer, args, model.config)
        self._given_pairs = kwargs["train_dataset"]  # retention puts texts among them, kept states are read beside them
        weight = model.configs[model.adapters[0]].retention
        self._retained_texts = given_texts(weight, args.retention_texts, tokenizer, model.config)
        if tokenizer is not None:
            model.remember_tokenizer(tokenizer)
        with nothing_left_of_refusals(Path(str(args.output_dir))):
            super().__init__(model=model, args=args, **kwargs)
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                state = self.accelerator.state
                fit_sharding(args, getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None))
        self.model_accepts_loss_kwargs = False
        self._metrics = {"train": PairMetrics(), "eval": PairMetrics()}
        self._probe: dict[str, Any] | None = None  # of a sharded model, for the folder to be saved
        self.add_callback(LastStep())
        self.add_callback(TrainingLogCallback())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's, which would take one more step of a run that is resumed from its last one.

        Such a run's result has no loss (NaN) and no metrics; the model is the checkpoint's, or the best one's.
        """
        try:
            return super().train(*args, **kwargs)
        except NothingLeft as stop:
            logger.warning("%s", stop)
            self.is_in_train = False
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
                self._load_best_model()
            return TrainOutput(self.state.global_step, math.nan, {})

    def _check_trainable(self) -> None:
        """Refuse a model without weights to train."""
        model = self.accelerator.unwrap_model(self.model)
        first, *others = model.adapters
        if not any(parameter.requires_grad for parameter in model.parameters()):
            given = "" if first == DEFAULT_ADAPTER else repr(first)
            raise ConfigError(
                "no weight of the model can be trained: from_pretrained loads an adapter for use, and "
                "LoraConfig.inference_mode freezes a new one. Make a new one with from_base, or go on with the loaded "
                f"one after `for weight in model.adapter_parameters({given}).values(): weight.requires_grad_(True)`."
            )
        for name in others:
            if any(parameter.requires_grad for parameter in model.adapter_parameters(name).values()):
                raise ConfigError(
                    f"the adapter {name!r} is set to be trained, but of several only the first, {first!r}, can be: "
                    "train it in a policy of its own, and compose the folders afterwards."
                )

    def _check_batch(self) -> None:
        """Refuse pairs, with the texts among them, that fill no batch where the last one is dropped."""
        pairs, batch = self.train_dataset, self.args.train_batch_size * self.args.world_size
        if pairs is not None and self.args.dataloader_drop_last and has_length(pairs) and len(pairs) < batch:
            raise ConfigError(
                f"dataloader_drop_last = True: {len(pairs)} pairs do not fill a batch of {batch}, so none would be "
                "trained on. Leave it out, or lower per_device_train_batch_size."
            )

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; with `cache_base_states`, the base's states are computed first, by each process a share.

        Raises:
            ConfigError: there is nothing to train, no batch to train on, no folder that all processes see, or no way to
                write the texts that `retention` needs.
        """
        self._check_trainable()
        self._add_retained_texts()
        self._check_batch()
        where = self.args.cache_base_states
        if where and not isinstance(self.train_dataset, PairsWithStates):
            if where == IN_MEMORY and self.args.world_size > 1:
                raise ConfigError("cache_base_states = 'memory' with several processes: give a folder that all see.")
            self.train_dataset = keep_base_states(
                self.model, self.train_dataset, self._pair_collator, where, self.args.per_device_train_batch_size,
                precision=self.accelerator.autocast,
                show_progress=self.is_world_process_zero() and not self.args.disable_tqdm,
                share=(self.args.process_index, self.args.world_size),
                in_turn=partial(self.args.main_process_first, local=False),
            )  # fmt: skip
            self.accelerator.wait_for_everyone()
        return super().get_train_dataloader()

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """As the Trainer's, which would drop the last batch of held-out pairs, too."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops

    @property
    def _settings(self) -> QAdapterConfig:
        model = self.accelerator.unwrap_model(self.model)
        return model.configs[model.adapters[0]]

    def _add_retained_texts(self) -> None:
        """Put the texts of `retention` among the pairs, once."""
        pairs = self.train_dataset
        with_texts = isinstance(pairs, PairsWithStates) or RETAINED in (getattr(pairs, "column_names", None) or ())
        if pairs is None or not self._settings.retention or with_texts:
            return
        if self._retained_texts is None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError("a sharded base cannot write texts before training: give retention_texts a file.")
        show = self.is_world_process_zero() and not self.args.disable_tqdm
        both = with_retained_texts(pairs, self._retained_texts, self.model, self.processing_class, show)
        self.train_dataset = require_fit(both, self.model.config)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the Trainer's; pairs that are given only now may be text, too."""
        if not isinstance(eval_dataset, str):  # one of several given at the start
            eval_dataset = self._tokenised(
                "eval_dataset", eval_dataset, self.processing_class, self.args, self.model.config
            )
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Likewise."""
        return super().get_test_dataloader(
            self._tokenised("test_dataset", test_dataset, self.processing_class, self.args, self.model.config)
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], int]:
        """As the Trainer's, with their number of pairs: an epoch's last micro-batch may be smaller than the others."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [part for batch in batches for part in batch.get("micro_batches") or [batch]]
        return batches, sum(len(part["completion_mask"]) // 2 for part in parts)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; with `micro_batch_tokens`, part by part."""
        *parts, last = inputs.get("micro_batches") or [inputs]
        losses = []
        with self.accelerator.no_sync(model):  # gradients of several processes meet once, after the last part
            for part in parts:
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """As the Trainer's, which looks for the tokens at the batch's top (`include_num_input_tokens_seen`)."""
        for part in inputs.get("micro_batches") or [inputs]:
            super()._track_num_input_tokens(part)

    def _tokenised(self, name: str, dataset: Any, tokenizer: Any, args: QAdapterTrainingArguments, config: Any) -> Any:
        if isinstance(dataset, dict):
            return {
                key: self._tokenised(f"{name}/{key}", part, tokenizer, args, config) for key, part in dataset.items()
            }
        if dataset is None or (
            isinstance(dataset, Dataset | IterableDataset)
            and "prompt_ids" in (dataset.column_names or next(iter(dataset), ()))  # a stream may not know its columns
        ):
            if isinstance(dataset, Dataset) and not len(dataset):
                raise DataError(f"{name} holds no pairs: at least one is needed.")
            return require_fit(dataset, config)
        if tokenizer is None:
            raise ConfigError(f"{name} holds text but processing_class is missing: pass the base model's tokenizer.")
        return require_fit(tokenised_pairs(name, dataset, tokenizer, args), config)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of the batch's pairs (times their share of it); collects metrics of train or eval on the device.

        With `num_items_in_batch`, the pairs of a whole step, it is what the Trainer, which divides by the number of
        micro-batches, adds up to the mean of that step.
        """
        share, places = inputs.pop("share", 1.0), inputs.pop("places", None)
        retained = inputs.pop(RETAINED, None)
        statistics = TokenStatistics(*model(**inputs))
        mask = response_mask(inputs)
        config = self._settings
        losses, quantities = pair_losses(statistics, mask, config, retained)
        if model.training:
            # Every process adds the same metrics, also where none of its rows is a text.
            texts = (retained or [False] * len(losses)) if config.retention else None
            self._metrics["train"].add(quantities, mask, retained=texts)
        else:
            counted = self._read_first(places or range(len(losses)))
            if retained:  # pairs that were trained on, with texts among them
                counted = [first and not is_text for first, is_text in zip(counted, retained, strict=True)]
            self._metrics["eval"].add(quantities, mask, counted)
        if num_items_in_batch is None:
            loss = losses.mean() * share
        else:
            loss = losses.sum() * self.current_gradient_accumulation_steps / num_items_in_batch
        return (loss, statistics) if return_outputs else loss

    def _read_first(self, places: Iterable[int]) -> list[bool]:
        """Which pairs of an evaluation's batch, by their places in it, come for the first time.

        Several processes need batches of one size, so accelerate fills up the last ones with pairs from the start.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return [True for _ in places]
        before = self.args.process_index * self.args.eval_batch_size
        return [before + place < state.remainder for place in places]

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: logits of an evaluation would not fit in memory."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self.compute_loss(model, part) for part in inputs.get("micro_batches") or [inputs]]
        return torch.stack(losses).sum(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of training to its log entries; those of an evaluation are in its own already.

        Raises:
            TrainingError: the mean loss of the steps since the last entry, or of an evaluation, is not finite.
        """
        if "loss" in logs or "train_loss" in logs:
            averages = self._metrics["train"].averages(self._summed)
            logs |= {name: value for name, value in averages.items() if name != "loss"}
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
        """As the Trainer's, with our metrics under the same prefix.

        They count each pair once; the Trainer's loss weighs the batches alike where the last one is smaller than the
        others (of a stream), or filled up (with several processes).
        """
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        averages = self._metrics["eval"].averages(self._summed)
        if self.args.logging_nan_inf_filter:
            averages.pop("loss", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in averages.items()})
        return output

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values, reduction="sum")

    # -- saving and resuming -----------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter folder."""
        # Each process holds a part of a sharded model, so all of them run it; `_save` may run in one of them alone.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._probe = make_probe(self.accelerator.unwrap_model(self.model)) if sharded else None
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if not self.args.should_save:
            return
        model.save_pretrained(folder, state_dict=state_dict, tokenizer=self.processing_class, probe=self._probe)
        write_json(folder / ARGUMENTS_NAME, {**self.args.to_sanitized_dict(), PAIRS: self._pairs_digest})

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's, which copies only files that it knows from the checkpoint into the folder it uploads."""
        push = getattr(self, "push_in_progress", None)
        under_way = push is not None and not push.is_done() and not self.args.hub_always_push  # reads the folder
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and not under_way:
            copy_adapter(Path(checkpoint_folder), Path(str(self.args.output_dir)))
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the Trainer's would replace the user's README.md and call the folder a model of transformers."""

    @cached_property
    def _pairs_digest(self) -> str | None:
        """Of the pairs that were given; None of a stream."""
        return pairs_digest(self._given_pairs) if isinstance(self._given_pairs, Dataset) else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_world_process_zero():
            warn_of_other_pairs(Path(resume_from_checkpoint), self._pairs_digest)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter_weights(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_adapter_weights(self.accelerator.unwrap_model(self.model), str(self.state.best_model_checkpoint))


def _check_arguments(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what this trainer cannot train, and functions that it would never call."""
    if kwargs.get("model_init") is not None:
        raise ConfigError("model_init is not supported: give the model, and for each trial of a search a new trainer.")
    if not isinstance(model, QAdapterForCausalLM):
        raise ConfigError(
            f"model is a {type(model).__name__}: make it one with QAdapterForCausalLM.from_base(model, ...)."
        )
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ConfigError("the model is in float16, in which this objective diverges: load it with dtype=bfloat16.")
    check_trainable(model.base, model.base_source.name)
    if not isinstance(args, QAdapterTrainingArguments):
        raise ConfigError(f"args is a {type(args).__name__}: give QAdapterTrainingArguments.")
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"{name} would never be called: there are no logits and no labels. Leave it out, or override "
                "compute_loss."
            )
    if isinstance(kwargs.get("train_dataset"), dict):
        splits = ", ".join(map(repr, kwargs["train_dataset"]))
        raise DataError(f"train_dataset has the splits {splits}: give one of them, as dataset['train'].")
