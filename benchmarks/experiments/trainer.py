"""Training a LoRA by any method's objective, through the package's model and trainer."""

import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, Trainer, set_seed

from benchmarks.experiments.objectives import Objective
from benchmarks.experiments.settings import Training
from qadapter import QAdapterConfig, QAdapterForCausalLM, QAdapterTrainer, QAdapterTrainingArguments
from qadapter.base_states import IN_MEMORY

LAYERS = {"all": Fraction(1), "upper": Fraction(1, 2)}


class MethodTrainer(QAdapterTrainer):
    """The package's trainer with a method's objective in place of its own."""

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the objective's losses."""
        losses = self.objective(model, self.accelerator.unwrap_model(model), inputs)
        return (losses.mean(), losses) if return_outputs else losses.mean()


def new_policy(base: str, config: QAdapterConfig, training: Training, dtype: str, seed: int) -> QAdapterForCausalLM:
    """The base with a fresh LoRA, drawn by the seed."""
    set_seed(seed)
    return QAdapterForCausalLM.from_base(base, config, lora_of(base, training), dtype=getattr(torch, dtype))


def lora_of(base: str, training: Training) -> LoraConfig:
    """The LoRA that every method trains."""
    share = LAYERS.get(training.lora_layers) or Fraction(training.lora_layers)
    layers: list[int] | None = None
    targets: Any = "all-linear"
    if share < 1:
        from transformers import AutoConfig

        from qadapter.modeling.bases import resolve_base

        count = AutoConfig.from_pretrained(resolve_base(base).path).num_hidden_layers
        layers = list(range(count - round(count * share), count))
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(
        r=training.lora_r,
        lora_alpha=2 * training.lora_r,
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )


def train_pairs(
    policy: QAdapterForCausalLM,
    pairs: Dataset,
    objective: Objective,
    training: Training,
    seed: int,
    folder: Path,
    packed: bool = False,
    tokenizer: Any = None,
) -> dict[str, float]:
    """Train the policy's adapter on tokenised pairs; steps, the last loss, and seconds.

    Args:
        tokenizer: needed where the policy's settings have a retention.
        packed: the objective runs both answers of each pair as they are, so they may come as `Training.packed` says.
    """
    start = time.perf_counter()
    trainer = MethodTrainer(
        model=policy,
        args=training_arguments(training, seed, folder, packed and training.packed),
        train_dataset=pairs,
        objective=objective,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    policy.eval()
    return training_figures(trainer, result, start)


def training_figures(trainer: Trainer, result: Any, start: float) -> dict[str, float]:
    """Steps, the first and the last loss that were logged, and the seconds since `start`."""
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] or [result.training_loss]
    return {
        "steps": result.global_step,
        "first_loss": logs[0],
        "last_loss": logs[-1],
        "seconds": time.perf_counter() - start,
    }


def training_arguments(training: Training, seed: int, folder: Path, packed: bool) -> QAdapterTrainingArguments:
    """The optimiser's settings, the same for every method."""
    fast: dict[str, Any] = {"packing": packed, "cache_base_states": IN_MEMORY if packed else None}
    return QAdapterTrainingArguments(output_dir=str(folder), **fast, **common_arguments(training, seed))


def common_arguments(training: Training, seed: int) -> dict[str, Any]:
    """What transformers' (and so TRL's) training arguments take."""
    on_gpu = torch.cuda.is_available()
    return {
        "seed": seed,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.micro_batch,
        "gradient_accumulation_steps": max(1, training.pairs_a_step // training.micro_batch),
        "learning_rate": training.learning_rate,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "linear",
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "dataloader_drop_last": True,  # every step has the same number of pairs; KTO needs two a batch
    }
