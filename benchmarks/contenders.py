"""The ways to train that `train.py` compares: ours in its variants, TRL's DPO, and the authors' loss."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from decode import TARGETS, copy_of
from experiments.authors import authors_loss
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.base_states import IN_MEMORY, BaseStatesCollator, keep_base_states
from qadapter.data import PackedCollator, PreferenceCollator
from qadapter.fused import TokenStatistics
from qadapter.modeling.compiled import compile_layers
from qadapter.modeling.packed import enable_packing
from qadapter.objective import pair_losses, response_mask

Pairs = Sequence[dict[str, Any]]
METHOD = QAdapterConfig()


@dataclass
class Contender:
    """A way to train; `step` runs one optimiser step on pairs. Ratios are to `rival`."""

    name: str
    step: Callable[[Pairs], Any]
    rival: str


def lora(options: argparse.Namespace, layers: Sequence[int] | None) -> LoraConfig:
    """Rank 8 on the linear layers that the options name, of the given decoder layers or of all."""
    chosen, targets = None if layers is None else list(layers), list(options.targets or TARGETS)
    return LoraConfig(r=8, lora_alpha=16, target_modules=targets, layers_to_transform=chosen, task_type="CAUSAL_LM")


def stepper(loss_of: Callable[[Pairs], torch.Tensor], model: torch.nn.Module) -> Callable[[Pairs], torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)

    def step(pairs: Pairs) -> torch.Tensor:
        loss = loss_of(pairs)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def autocast(options: argparse.Namespace) -> torch.autocast:
    """What the trainers of the others run a half-precision base in: it spares them float32 products of the adapter."""
    return torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == torch.bfloat16)


def on(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def our_step(
    base: PreTrainedModel,
    options: argparse.Namespace,
    layers: Any,
    packing: bool,
    trunk: bool,
    kept: Pairs | None = None,
    compiled: bool = False,
) -> Any:
    """The objective through `QAdapterForCausalLM`, as the trainer runs it.

    Args:
        kept: all pairs of the run, for the base's states of which to be kept: a step of a later epoch.
    """
    model = QAdapterForCausalLM.from_base(copy_of(base), METHOD, lora(options, layers)).train()
    checkpointed(model, options)
    if not trunk:
        model.shared_layers = 0
    if packing and not enable_packing(model.base):
        raise RuntimeError("the base cannot run packed rows: this would time padded ones")
    if compiled:
        compile_layers(model)
    collator = PackedCollator() if packing else PreferenceCollator(pad_token_id=0)

    states = None if kept is None else keep_base_states(model, Dataset.from_list(list(kept)), collator, IN_MEMORY, 1)
    places = {id(pair): place for place, pair in enumerate(kept or ())}
    with_states = BaseStatesCollator(collator)

    def loss_of(pairs: Pairs) -> torch.Tensor:
        rows = pairs if states is None else [states[places[id(pair)]] for pair in pairs]
        batch = on(options.device, with_states(rows))
        return pair_losses(TokenStatistics(*model(**batch)), response_mask(batch), METHOD)[0].mean()

    return stepper(loss_of, model)


def trl_step(
    base: PreTrainedModel, options: argparse.Namespace, layers: Any, compiled: bool = False, kept: bool = False
) -> Any:
    """TRL's DPOTrainer: its collator, its loss, the reference by disabling the adapter.

    Args:
        compiled: gives it what `compile_layers` gives ours.
        kept: with the reference's log-probabilities from before the training (`precompute_ref_log_probs`).
    """
    words = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=copy_of(base),
            peft_config=lora(options, layers),
            args=DPOConfig(
                output_dir=folder,
                use_cpu=options.device == "cpu",
                bf16=False,
                gradient_checkpointing=bool(options.checkpoint_every),
                max_length=None,
                precompute_ref_log_probs=kept,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(words),
            processing_class=tokenizer_of_words(),
        )
    model = trainer.model.train()
    if list(model.peft_config) != ["default"]:
        raise RuntimeError("TRL runs the reference through an adapter of its own: this would time a heavier rival")
    checkpointed(model, options)
    if compiled:
        for layer in model.get_base_model().get_decoder().layers:
            layer.compile(dynamic=True)

    # Any numbers will do: a step takes as long with them as with the right ones.
    reference = {"ref_chosen_logps": -100.0, "ref_rejected_logps": -100.0} if kept else {}

    def loss_of(pairs: Pairs) -> torch.Tensor:
        batch = trainer.data_collator([{**pair, **reference} for pair in pairs])
        with autocast(options):
            return trainer.compute_loss(model, on(options.device, batch))

    return stepper(loss_of, model)


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """The tokenizer that the trainer asks for: the pairs of the steps are tokens already."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<pad>", "a", "b", "c"])}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="c")


def authors_step(base: PreTrainedModel, options: argparse.Namespace, layers: Any) -> Any:
    """The authors' loss as their code computes it: full logits of padded rows, two passes."""
    model = get_peft_model(copy_of(base), lora(options, layers)).train()
    checkpointed(model, options)
    collator = PreferenceCollator(pad_token_id=0)

    def loss_of(pairs: Pairs) -> torch.Tensor:
        batch = on(options.device, collator(pairs))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with autocast(options):
            with torch.no_grad(), model.disable_adapter():
                base_logits = model(**inputs, use_cache=False).logits
            logits = model(**inputs, use_cache=False).logits
        return authors_loss(
            logits.float(), base_logits.float(), batch["input_ids"], batch["completion_mask"], 1.0, 0.01, 1.0, 0.1
        )

    return stepper(loss_of, model)


def checkpointed(model: Any, options: argparse.Namespace) -> None:
    base = model.base if isinstance(model, QAdapterForCausalLM) else model.get_base_model()
    if options.checkpoint_every:
        base.activation_checkpointing_enable(every_n_layers=options.checkpoint_every)
        base.enable_input_require_grads()
    else:
        base.activation_checkpointing_disable()


def contenders(base: PreTrainedModel, options: argparse.Namespace, pairs: Pairs) -> dict[str, Callable[[], Contender]]:
    """Each made when it is first needed."""
    depth = base.config.num_hidden_layers
    upper = list(range(depth // 2, depth))
    whole, half = "TRL DPO", "TRL DPO, upper half"
    whole_kept, half_kept = f"{whole}, reference kept", f"{half}, reference kept"
    made: dict[str, tuple[str, Callable[[], Any]]] = {
        "authors": (whole, lambda: authors_step(base, options, None)),
        whole: (whole, lambda: trl_step(base, options, None)),
        "ours, padded": (whole, lambda: our_step(base, options, None, packing=False, trunk=False)),
        "ours": (whole, lambda: our_step(base, options, None, packing=True, trunk=True)),
        half: (half, lambda: trl_step(base, options, upper)),
        "ours, upper half, padded": (half, lambda: our_step(base, options, upper, packing=False, trunk=False)),
        "ours, upper half, padded, shared trunk": (half, lambda: our_step(base, options, upper, False, trunk=True)),
        "ours, upper half": (half, lambda: our_step(base, options, upper, packing=True, trunk=True)),
        "TRL DPO, compiled": (whole, lambda: trl_step(base, options, None, compiled=True)),
        "ours, compiled": (whole, lambda: our_step(base, options, None, True, True, compiled=True)),
        "TRL DPO, upper half, compiled": (half, lambda: trl_step(base, options, upper, compiled=True)),
        "ours, upper half, compiled": (half, lambda: our_step(base, options, upper, True, True, compiled=True)),
        whole_kept: (whole_kept, lambda: trl_step(base, options, None, kept=True)),
        "ours, base kept": (whole_kept, lambda: our_step(base, options, None, packing=True, trunk=True, kept=pairs)),
        half_kept: (half_kept, lambda: trl_step(base, options, upper, kept=True)),
        "ours, upper half, base kept": (
            half_kept,
            lambda: our_step(base, options, upper, packing=True, trunk=True, kept=pairs),
        ),
    }
    return {
        name: (lambda name=name, rival=rival, make=make: Contender(name, make(), rival))  # type: ignore[misc]
        for name, (rival, make) in made.items()
        if name in options.only or (not options.only and (options.compile or "compiled" not in name))
    }
