"""What training runs of the policy: the base's pass, the adapter's pass, and the statistics of the loss from both."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qadapter.data.packing import PackedSequences
from qadapter.errors import ConfigError
from qadapter.fused import TokenStatistics
from qadapter.modeling.packed import packed_batch
from qadapter.modeling.policy_part import PolicyPart
from qadapter.modeling.streams import keep_base_in_eval
from qadapter.modeling.trunk import FromTrunk, KeepTrunk
from qadapter.objective import ImpliedRewards, implied


class BaseStates(NamedTuple):
    """What the base's pass leaves to the adapter's: it is the same in every epoch."""

    final: Tensor  # final hidden states, (B, T, H)
    trunk: Tensor | None  # (B, T, H), the states that enter the first adapted layer; None if no layer is shared


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Within the context the model is in eval mode, afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class TrainingPasses(PolicyPart):
    """The part of `QAdapterForCausalLM` that training uses."""

    @torch.no_grad()
    def base_pass(
        self, input_ids: Tensor, attention_mask: Tensor | dict[str, Tensor] | None = None, **kwargs: Any
    ) -> BaseStates:
        """The base's hidden states, in eval mode: no checkpointing, no adapter dropout.

        It comes before the adapter's pass: sharded training (FSDP, ZeRO-3) needs the passes of a step in this order.
        """
        decoder, training, trunk = self.base.get_decoder(), self.training, KeepTrunk(self.shared_layers)
        batch = _decoder_batch(input_ids, attention_mask, kwargs)
        decoder.eval()
        with self.plan.running(None, layer_pass=trunk):
            final = decoder(**batch, use_cache=False).last_hidden_state
        decoder.train(training)
        keep_base_in_eval(decoder)
        return BaseStates(final, trunk.states if self.shared_layers else None)

    def adapter_pass(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        trunk: Tensor | None = None,
        adapter: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Final hidden states (B, T, H) of one adapter, with gradient; from the trunk's states on if they are given."""
        # The resting plan, not a context: activation checkpointing runs the layers again in the backward pass.
        self.plan.blocks = (adapter or self.adapters[0],)
        rest = None if trunk is None else FromTrunk(self.shared_layers, trunk)
        with self.plan.running(*self.plan.blocks, layer_pass=rest):
            decoder = self.base.get_decoder()
            return decoder(**_decoder_batch(input_ids, attention_mask, kwargs), use_cache=False).last_hidden_state

    def token_statistics(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        base_states: Tensor | None = None,
        trunk_states: Tensor | None = None,
    ) -> TokenStatistics:
        """Statistics of every response token under the trained policy and the base; (B, T-1), zero elsewhere.

        Column t belongs to token t+1, as with shifted labels: its mask is `completion_mask[:, 1:]`. With `base_states`,
        the base's final states (N, H) before the response tokens in the order of the mask, and, where layers are
        shared, `trunk_states` (B, T, H), the base's pass is left out (see `qadapter.base_states`).
        """
        mask = completion_mask[:, 1:].bool()
        # The states before response tokens, among all B·T; finding them makes the host wait for the device.
        states = F.pad(mask, (0, 1)).flatten().nonzero().squeeze(-1)  # (N,)
        targets = input_ids.flatten().index_select(0, states + 1)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._statistics(batch, base_states, trunk_states, states, targets, mask)

    def packed_statistics(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        gather_indices: Tensor,
        restore_indices: Tensor,
        repeated_indices: Tensor,
        boundaries: Tensor,
        sequence_lengths: list[int],
        state_indices: Tensor,
        target_ids: Tensor,
        completion_mask: Tensor,
        base_states: Tensor | None = None,
        trunk_states: Tensor | None = None,
    ) -> TokenStatistics:
        """As `token_statistics`, of the packed row that `PackedCollator` makes; (2P, C), zero outside the mask.

        The base must have been switched to packed attention (`packed.enable_packing`). The slow twin runs the same
        pairs in padded rows of their own.
        """
        sequences = PackedSequences(
            input_ids, position_ids, gather_indices, restore_indices, repeated_indices, boundaries, sequence_lengths
        )
        batch = packed_batch(self.base, sequences, training=True)
        return self._statistics(batch, base_states, trunk_states, state_indices, target_ids, completion_mask)

    def _statistics(
        self,
        batch: dict[str, Any],
        base_states: Tensor | None,
        trunk_states: Tensor | None,
        states: Tensor,
        targets: Tensor,
        mask: Tensor,
    ) -> TokenStatistics:
        """Statistics of the N response tokens that follow the given states, laid out as `mask` (B, C) has it."""
        adapter = self.adapters[0]
        if base_states is None:
            final, trunk_states = self.base_pass(**batch)
            base_states = final.flatten(0, 1).index_select(0, states)  # (N, H)
            del final  # of all tokens; the adapter's pass comes now
        flat = self.head.statistics(
            adapter,
            self.adapter_pass(trunk=trunk_states, **batch).flatten(0, 1).index_select(0, states),
            base_states,
            self.trained_coefficients()[adapter],
            targets,
            self.plan,
            kl_gradient=self.configs[adapter].kl_in_loss,
        )
        return laid_out(flat, mask)

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> ImpliedRewards:
        """What the adapter says of given responses: Q, value and reward of each token (B, T-1), and returns (B,).

        The returns, α̃ log π̃ − α₀ log π_b summed with the discount, rank responses to the same prompt (best-of-n, data
        filtering); how prompts compare, no pair has trained. Column t belongs to token t + 1 of `input_ids`.

        Args:
            input_ids, attention_mask: prompts with their responses, (B, T).
            completion_mask: (B, T), True on response tokens, which form one run a row.

        Raises:
            ConfigError: a composition of several adapters, for which no Q is defined; masks of another shape than the
                tokens', or several runs of response tokens in a row.
        """
        if len(self.adapters) > 1:
            raise ConfigError(f"score reads one adapter, and this policy has {self.adapters}: load one folder alone.")
        check_responses(input_ids, attention_mask, completion_mask)
        with in_eval_mode(self):
            statistics = self.token_statistics(input_ids, attention_mask, completion_mask)
        return implied(statistics, completion_mask[:, 1:].bool(), self.configs[self.adapters[0]])


def check_responses(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> None:
    """Refuse masks that do not mark one response in each row of `input_ids` (B, T); reads them.

    Raises:
        ConfigError: another shape than the tokens', or response tokens with others between them.
    """
    for name, mask in (("attention_mask", attention_mask), ("completion_mask", completion_mask)):
        if mask.shape != input_ids.shape:
            raise ConfigError(
                f"{name} has the shape {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}: it must have one "
                "entry for each token, those of the prompt included."
            )
    marked = completion_mask.bool()
    begun = (marked & ~F.pad(marked, (1, 0))[:, :-1]).sum(-1)  # runs of each row
    if bool((begun > 1).any()):
        raise ConfigError(
            f"completion_mask marks {begun.tolist()} runs of tokens in its rows: a row holds one response, whose "
            "tokens stand together."
        )


def laid_out(flat: TokenStatistics, mask: Tensor) -> TokenStatistics:
    """The statistics (N,) of the tokens that `mask` (B, C) marks as (B, C), zero outside.

    `masked_scatter` does the same, but the host waits for the device in its backward pass, which selects by the mask.
    """
    places = mask.flatten().cumsum(0) * mask.flatten()  # (B·C,), counted from 1: 0 is a zero put in front
    return TokenStatistics(*(F.pad(column, (1, 0)).index_select(0, places).view(mask.shape) for column in flat))


def _decoder_batch(input_ids: Tensor, attention_mask: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The decoder's arguments, with the positions of a mask where none are given."""
    if "position_ids" not in kwargs and isinstance(attention_mask, Tensor):
        kwargs = kwargs | {"position_ids": positions_of(attention_mask)}
    return {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids (B, T) that count real tokens only: padding, on whichever side, then changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
