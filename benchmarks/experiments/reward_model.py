"""A reward model: a LoRA and a linear head on the last token of an answer, trained on pairs by Bradley-Terry."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from benchmarks.experiments.settings import Training
from benchmarks.experiments.trainer import new_policy
from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.data import PreferenceCollator
from qadapter.generation import Answer, encode
from qadapter.modeling.passes import positions_of
from qadapter.new_folders import whole_file
from qadapter.training_batches import padding_token

SCORED_AT_ONCE = 8  # pairs


class RewardModel(nn.Module):
    """Scores of answers after their prompts, from the last token's hidden state of the adapter's stream."""

    def __init__(self, policy: QAdapterForCausalLM) -> None:
        super().__init__()
        self.policy = policy
        self.head = nn.Linear(policy.config.get_text_config(decoder=True).hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One score a row, (B,), in float32; padding on either side changes nothing."""
        hidden = adapter_hidden(self.policy, input_ids, attention_mask)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(attention_mask.bool(), places, -1).amax(-1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return self.head(hidden[rows, last].float()).squeeze(-1)

    def trainable(self) -> list[nn.Parameter]:
        """The head and the LoRA."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def score_answers(self, tokenizer: Any, prompts: Sequence[Any], answers: Sequence[Answer]) -> list[float]:
        """The score of each answer to its prompt."""
        scores = []
        for prompt, answer in zip(prompts, answers, strict=True):
            context = encode(tokenizer, [prompt])["input_ids"][0]
            ids = tokenizer(answer.text, add_special_tokens=False, return_tensors="pt")["input_ids"][0].long()
            end = torch.tensor([tokenizer.eos_token_id] * answer.finished, dtype=torch.long)
            row = torch.cat([context, ids, end]).unsqueeze(0).to(self.head.weight.device)
            scores.append(float(self(row, torch.ones_like(row))))
        return scores


def kept_reward_model(path: Path, base: str, training: Training, dtype: str, device: torch.device, train: Any) -> Any:
    """The reward model whose trained weights lie in the file, or what `train` gives, which is then kept there."""
    if path.exists():
        model = RewardModel(new_policy(base, QAdapterConfig(), training, dtype, 0)).to(device)
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True), strict=False)
        return model.eval()
    model = train()
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with whole_file(path) as scratch:
        torch.save(weights, scratch)
    return model


def adapter_hidden(model: QAdapterForCausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Final hidden states (B, T, H) of the adapter's stream alone."""
    with model.plan.running(model.adapters[0]):
        return model.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions_of(attention_mask),
            use_cache=False,
        ).last_hidden_state


def pair_batches(pairs: Dataset, size: int, collator: PreferenceCollator, seed: int) -> Iterator[dict[str, Tensor]]:
    """One shuffled pass over the pairs, `size` a batch, the last one perhaps smaller."""
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), size):
        yield collator([pairs[index] for index in order[start : start + size]])


def train_reward_model(
    base: str, pairs: Dataset, training: Training, dtype: str, seed: int, device: torch.device
) -> RewardModel:
    """A reward model trained for the setting's epochs (at least one) on tokenised pairs."""
    policy = new_policy(base, QAdapterConfig(), training, dtype, seed)
    model = RewardModel(policy).to(device)
    collator = PreferenceCollator(pad_token_id=padding_token(None, policy))
    epochs = max(1, round(training.epochs))
    size = training.micro_batch
    every = max(1, training.pairs_a_step // size)
    batches = [batch for epoch in range(epochs) for batch in pair_batches(pairs, size, collator, seed + epoch)]
    steps = -(-len(batches) // every)
    optimiser = torch.optim.AdamW(model.trainable(), lr=training.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    model.train()
    for number, batch in enumerate(batches, 1):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        chosen, rejected = model(batch["input_ids"], batch["attention_mask"]).chunk(2)
        (-F.logsigmoid(chosen - rejected).mean() / every).backward()
        if number % every == 0 or number == len(batches):
            torch.nn.utils.clip_grad_norm_(model.trainable(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return model.eval()


@torch.no_grad()
def pair_accuracy(model: RewardModel, pairs: Dataset) -> float:
    """Share of the pairs whose chosen answer scores higher; ties count half."""
    collator = PreferenceCollator(pad_token_id=padding_token(None, model.policy))
    wins = 0.0
    device = model.head.weight.device
    for start in range(0, len(pairs), SCORED_AT_ONCE):
        batch = collator([pairs[index] for index in range(start, min(start + SCORED_AT_ONCE, len(pairs)))])
        chosen, rejected = model(batch["input_ids"].to(device), batch["attention_mask"].to(device)).chunk(2)
        wins += float((chosen > rejected).double().sum() + (chosen == rejected).double().sum() / 2)
    return wins / len(pairs)
