"""What several files of tests of the model need."""

import copy

import models
import pytest
import torch

from qadapter import QAdapterConfig, QAdapterForCausalLM


@pytest.fixture(scope="module")
def composed():
    """Two adapters of different rank and targets, and each of them alone on the same base."""
    base = models.tiny_base()
    kinds = {
        "concise": (models.APART, models.lora(r=2, target_modules=["q_proj", "v_proj"]), 1),
        "polite": (QAdapterConfig(parametrisation="logits", alpha_tilde=1.3, alpha_0=0.4), models.lora(), 2),
    }
    alone = {
        name: models.train_randomly(models.tiny_policy(base, config, lora, trained=False), seed)
        for name, (config, lora, seed) in kinds.items()
    }
    both = QAdapterForCausalLM(
        copy.deepcopy(base),
        {name: config for name, (config, _, _) in kinds.items()},
        {name: copy.deepcopy(lora) for name, (_, lora, _) in kinds.items()},
    ).eval()
    with torch.no_grad():
        for name, single in alone.items():
            target = both.adapter_parameters(name)
            for key, value in single.adapter_parameters().items():
                target[key.replace(".default.", f".{name}.")].copy_(value)
    return both, alone
