"""DPO by TRL's trainer, put into our policy so that it is measured like every other."""

import time
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PrinterCallback, set_seed

from benchmarks.experiments.trainer import common_arguments, lora_of, training_figures
from qadapter.modeling.bases import load_base, resolve_base


def train_with_trl(context: Any, beta: float) -> tuple[Any, dict[str, float]]:
    """The policy and figures of its training; the LoRA starts from the same numbers as the other methods'.

    The reference is the base: TRL disables the adapter that it has made itself.
    """
    from trl import DPOConfig, DPOTrainer

    start = time.perf_counter()
    setting = context.setting
    policy = context.new_policy()
    base = load_base(resolve_base(context.base), dtype=getattr(torch, setting.dtype))
    set_seed(context.seed)
    arguments = common_arguments(setting.training, context.seed) | {"logging_steps": 1}
    trainer = DPOTrainer(
        model=base,
        peft_config=lora_of(context.base, setting.training),
        args=DPOConfig(
            output_dir=str(context.work), beta=beta, bf16=False, gradient_checkpointing=False,
            max_length=None, remove_unused_columns=False, **arguments,
        ),
        train_dataset=Dataset.from_list(context.pools.train),
        processing_class=context.tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    model = trainer.model
    set_peft_model_state_dict(model, get_peft_model_state_dict(policy.peft_model, save_embedding_layers=False))
    result = trainer.train()
    set_peft_model_state_dict(policy.peft_model, get_peft_model_state_dict(model, save_embedding_layers=False))
    return policy.eval(), training_figures(trainer, result, start)
