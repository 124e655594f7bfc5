"""A step of training: when the host waits for the device, the optimiser, precisions, activation checkpointing."""

import traceback

import pytest
import torch
from models import lora, tiny_base, tiny_policy, tiny_trainer, token_pairs
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_examples import CONFIG
from transformers import TrainerCallback

from qadapter import QAdapterTrainer, QAdapterTrainingArguments


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device.

    Those by which transformers chooses a mask are its own affair.
    """

    # The last one selects by its mask, of which the dispatcher tells nothing.
    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "masked_scatter_backward")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function is torch.ops.aten.index.Tensor else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        waits = by_mask or function._schema.name.removeprefix("aten::") in self.WAITING
        if waits and not any("masking_utils" in frame.filename for frame in traceback.extract_stack()):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["gpt_neox", "phi"])
@pytest.mark.parametrize(("packing", "expected"), [(True, []), (False, ["aten.nonzero.default"])])
def test_a_step_does_not_read_the_device(architecture, packing, expected, tmp_path):
    """In padded rows the number of response tokens, which is a shape, must be read; packed batches bring it along."""
    trainer = tiny_trainer(tiny_policy(tiny_base(architecture)), tmp_path, packing=packing)
    batch = trainer.data_collator(token_pairs(5))
    trainer.model.train()
    with HostReads() as reads:
        trainer.compute_loss(trainer.model, batch).backward()
    assert reads.found == expected


class ReadsOfASecondStep(TrainerCallback):
    """Counts the host's reads in a whole step, from its forward pass to the optimiser's and the scheduler's step."""

    def __init__(self):
        self.reads = HostReads()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.reads.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.reads.__exit__(None, None, None)


@pytest.mark.parametrize("micro_batch_tokens", [None, 20])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_whole_step_with_the_optimiser_s_does_not_read_the_device(filtered, micro_batch_tokens, tmp_path):
    """But where transformers' filter of losses that are not finite was asked for."""
    counter = ReadsOfASecondStep()
    options = {"logging_nan_inf_filter": True} if filtered else {}
    tiny_trainer(
        tiny_policy(),
        tmp_path,
        callbacks=[counter],
        max_steps=3,
        logging_steps=3,
        per_device_train_batch_size=4,
        micro_batch_tokens=micro_batch_tokens,
        **options,
    ).train()
    assert counter.reads.found == (["aten._local_scalar_dense.default"] * 2 if filtered else [])


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cuda", False), ("mps", True)])
def test_pinned_batches_are_copied_to_a_gpu_without_waiting(device, pinned, tmp_path, monkeypatch):
    monkeypatch.setattr(QAdapterTrainingArguments, "device", property(lambda self: torch.device(device)))
    args = QAdapterTrainingArguments(output_dir=str(tmp_path), dataloader_pin_memory=pinned)
    assert args.accelerator_config.non_blocking == (device == "cuda" and pinned)


def test_one_process_trains_on_one_of_several_gpus(policy, tmp_path):
    args = QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.warns(UserWarning, match="one of 2 GPUs is used: .*torchrun --nproc-per-node 2"):
        trainer = QAdapterTrainer(model=policy, args=args)
    assert not isinstance(trainer._wrap_model(policy), torch.nn.DataParallel)
    assert args.train_batch_size == args.per_device_train_batch_size


def test_the_optimiser_is_fused_adamw(policy, tmp_path):
    trainer = tiny_trainer(policy, tmp_path)
    assert trainer.args.optim == "adamw_torch_fused"
    optimiser = trainer.create_optimizer()
    assert isinstance(optimiser, torch.optim.AdamW)
    assert optimiser.defaults["fused"] is True


@pytest.mark.parametrize("dora", [False, True])
def test_bfloat16_base_trains_a_float32_adapter(dora, tmp_path):
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = tiny_policy(tiny_base(dtype=dtype), CONFIG, lora(use_dora=dora, lora_dropout=0.1 * dora))
        trainer = tiny_trainer(policy, tmp_path / str(dtype), max_steps=1)
        trainer.train()
        losses[dtype] = trainer.state.log_history[0]["loss"]
        assert {parameter.dtype for parameter in policy.adapter_parameters().values()} == {torch.float32}
    # bfloat16 keeps 8 bits of each logit.
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.05)


def test_mixed_precision_training_stays_near_float32(tmp_path):
    losses = {}
    for bf16 in (False, True):
        policy = tiny_policy(tiny_base(), CONFIG)
        trainer = tiny_trainer(policy, tmp_path / str(bf16), max_steps=1, bf16=bf16)
        trainer.train()
        losses[bf16] = trainer.state.log_history[0]["loss"]
    # bfloat16 keeps 8 bits of each logit.
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    assert losses[True] != losses[False]


class GradientNorms(TrainerCallback):
    def __init__(self):
        self.norms = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.norms += [logs["grad_norm"]] if "grad_norm" in logs else []


def test_activation_checkpointing_trains_alike(tmp_path):
    norms = {}
    for checkpointing in (False, True):
        recorder = GradientNorms()
        policy = tiny_policy(tiny_base("gpt_neox", dtype=torch.float64), CONFIG)
        options = {"activation_checkpointing": checkpointing, "callbacks": [recorder]}
        tiny_trainer(policy, tmp_path / str(checkpointing), max_steps=2, **options).train()
        norms[checkpointing] = recorder.norms
    assert len(norms[True]) == 2
    assert norms[True] == pytest.approx(norms[False], rel=1e-9)
