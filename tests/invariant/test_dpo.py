"""Identity 3 of the method on whole models: the residual loss is the loss of TRL's DPOTrainer (the other's code)."""

import pytest
import torch
from datasets import Dataset
from models import plain_peft, tiny_base, tiny_policy, tiny_tokenizer
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from qadapter import QAdapterConfig
from qadapter.objective import pair_losses

trl = pytest.importorskip("trl")

KAPPA = 0.3
PAIRS = [
    {"prompt": "What is the capital of France?", "chosen": " Paris.", "rejected": " I do not know it."},
    {"prompt": "Cook rice?", "chosen": " Rinse it, then boil it.", "rejected": " No"},
    {"prompt": "One and one?", "chosen": " Two.", "rejected": " Three, I think."},
]


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "phi"])
def test_residual_loss_and_gradients_equal_those_of_trl(architecture, tmp_path):
    base = tiny_base(architecture, dtype=torch.float64)
    config = QAdapterConfig.preset("undiscounted", alpha_tilde=KAPPA, alpha_0=KAPPA, beta=0.0)
    policy = tiny_policy(base, config)
    # TRL takes the adapter as it comes for the reference: an untrained one is the base. Then it gets the policy's.
    trainer = trl.DPOTrainer(
        model=plain_peft(base, tiny_policy(base, config, trained=False)),
        args=trl.DPOConfig(
            output_dir=str(tmp_path),
            beta=KAPPA,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=None,
            per_device_train_batch_size=len(PAIRS),
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(template=None),
    )
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(policy.peft_model))
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    mask = batch["completion_mask"].bool()
    losses, _ = pair_losses(
        policy(batch["input_ids"], batch["attention_mask"], completion_mask=mask), mask[:, 1:], config
    )
    losses.mean().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}  # TRL adds up in float32
    torch.testing.assert_close(losses.mean(), expected, **tolerance)
    assert (losses - torch.tensor(2.0).log()).abs().min() > 0.01, "an adapter that does nothing shows nothing"
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    for name, parameter in policy.adapter_parameters().items():
        torch.testing.assert_close(parameter.grad, gradients[f"base_model.model.{name}"], **tolerance, msg=name)
