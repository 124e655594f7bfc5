"""Exact drift of every token under any number of policies, from one pass over each stream's hidden states.

All settings of the dial lie on lines from the base: the logits are z_b + λ d, and the head is linear, so d comes from
hidden states by one matmul whatever the number of strengths. A strength then costs three passes over the vocabulary of
elementwise work; the (tokens, vocabulary) logits of a text never exist. Interpolated weights lie on no line: there each
strength has hidden states of its own, at the end of a line of length 1. With p the policy and ⟨·⟩ the mean under it,

    log p(a)  = b_a + λ d_a − LSE(b + λ d)      b = z_b − max z_b,  d shifted so that its mean under π_b is 0
    KL(π_b‖p) = LSE(b + λ d) − LSE(b) = L
    KL(p‖π_b) = λ ⟨d⟩ − L
    entropy   = LSE(b + λ d) − ⟨b + λ d⟩

`modeling.head.statistics` (a matmul for each policy) and full logits are the slow twins in the tests.
Sizes: N tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qadapter.data.packing import PackedSequences
from qadapter.errors import ConfigError
from qadapter.evaluation.batches import batches_by_beginning, batches_by_length
from qadapter.evaluation.columns import Column, Direction
from qadapter.evaluation.progress import Advance
from qadapter.evaluation.texts import Text
from qadapter.functional import kl_divergence, shrinkage
from qadapter.fused import default_chunk_size
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.heads import widened
from qadapter.modeling.mixing import capped_logits
from qadapter.modeling.packed import enable_packing, packed_batch
from qadapter.modeling.passes import in_eval_mode, positions_of
from qadapter.modeling.streams import Stream
from qadapter.modeling.trunk import FromTrunk, KeepTrunk

# Elements of the rows that are widened and worked on together on a CPU: four such matrices stay in its cache.
BLOCK_ELEMENTS = 2**18
# From twice as many streams on, fewer tokens are worked on at a time: each stream holds states and logits of all.
FEW_STREAMS = 4


class TokenDrift(NamedTuple):
    """What became of each token of a text under a policy; all (N,)."""

    logps: Tensor
    kl: Tensor  # KL(policy ‖ base) of the token's distribution, in nats
    reverse_kl: Tensor  # KL(base ‖ policy)
    entropy: Tensor
    agreement: Tensor  # 1 where the base's likeliest token is the policy's too
    greedy: Tensor  # 1 where the token itself is the policy's likeliest


class BaseTokens(NamedTuple):
    """The same tokens under the base; all (N,)."""

    logps: Tensor
    entropy: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class TextDrift:
    """One text (or passage) under the base and under each column, by name."""

    base: BaseTokens
    columns: Mapping[str, TokenDrift]

    @property
    def tokens(self) -> int:
        """The number of tokens that were scored."""
        return len(self.base.logps)

    def mean_kl(self, column: str) -> float:
        """KL(policy ‖ base) of a column in nats a token."""
        return self.columns[column].kl.double().mean().item()


@dataclass(frozen=True)
class Passage:
    """Tokens that are read, and the places in them after which a token is scored.

    Args:
        ids: what the model reads, (T,).
        places: indices into `ids`, in any order, repeated at will, (N,).
        targets: the token that is scored after each place, (N,).
        steps: which token of its answer each target is, from 0, (N,): a decaying strength depends on it.
    """

    ids: Sequence[int]
    places: Sequence[int]
    targets: Sequence[int]
    steps: Sequence[int]

    @classmethod
    def of(cls, text: Text) -> "Passage":
        """Each token of a text's answer; the last one is scored but need not be read."""
        ids = [*text.context, *text.answer]
        places = range(len(text.context) - 1, len(ids) - 1)
        return cls(ids[:-1], places, text.answer, range(len(text.answer)))


def measure_texts(
    model: QAdapterForCausalLM,
    texts: Sequence[Text],
    columns: Sequence[Column],
    batch_tokens: int = 2048,
    advance: Advance | None = None,
) -> list[TextDrift]:
    """The drift of each text under each column, in order; see `measure_passages`."""
    return measure_passages(model, [Passage.of(text) for text in texts], columns, batch_tokens, advance)


@torch.no_grad()
def measure_passages(
    model: QAdapterForCausalLM,
    passages: Sequence[Passage],
    columns: Sequence[Column],
    batch_tokens: int = 2048,
    advance: Advance | None = None,
) -> list[TextDrift]:
    """The drift of each passage's scored tokens under each column, in order.

    Args:
        batch_tokens: tokens a batch may hold, padding included (a longer passage is a batch of its own).
        advance: called with the number of passages done since the last call.
    """
    directions = {column.name: column.direction(model) for column in columns}
    streams = list(dict.fromkeys(name for direction in directions.values() for name, _ in direction.streams))
    measured: dict[int, TextDrift] = {}
    batch_tokens //= max(1, len(streams) // FEW_STREAMS)
    with in_eval_mode(model):
        packs = packing_pays(model) and enable_packing(model.base)
        batches = batches_by_beginning if packs else batches_by_length
        for batch in batches([passage.ids for passage in passages], batch_tokens):
            rows = [passages[index] for index in batch]
            hidden = _hidden_states(model, *(_packed if packs else _padded)(model, rows), [None, *streams])
            targets, steps = (
                torch.tensor([value for passage in rows for value in getattr(passage, name)], device=model.device)
                for name in ("targets", "steps")
            )
            lengths = [len(passage.targets) for passage in rows]
            base, drifts = token_drift(model, hidden, targets, steps, columns, directions)
            _require_finite(base, drifts)
            base_parts = zip(*(column.split(lengths) for column in base), strict=True)
            parts = {
                name: list(zip(*(field.split(lengths) for field in drift), strict=True))
                for name, drift in drifts.items()
            }
            for row, (index, base_part) in enumerate(zip(batch, base_parts, strict=True)):
                by_column = {name: TokenDrift(*rows[row]) for name, rows in parts.items()}
                measured[index] = TextDrift(BaseTokens(*base_part), by_column)
            if advance is not None:
                advance(len(batch))
    return [measured[index] for index in range(len(passages))]


def packing_pays(model: QAdapterForCausalLM) -> bool:
    """Whether packed rows are the faster ones: not on a GPU in float32, where attention is a kernel a sequence."""
    return model.device.type == "cpu" or model.dtype != torch.float32


def _require_finite(base: BaseTokens, drifts: Mapping[str, TokenDrift]) -> None:
    if not bool(base.logps.isfinite().all()):
        raise ConfigError("the base's log-probabilities are not finite: load it in float32 (--dtype float32).")
    for name, drift in drifts.items():
        if not all(bool(field.isfinite().all()) for field in drift):
            raise ConfigError(
                f"the log-probabilities of {name!r} are not finite: the adapter is damaged, or its strength too large."
            )


def _packed(model: QAdapterForCausalLM, passages: Sequence[Passage]) -> tuple[dict[str, Any], Tensor]:
    """The decoder's arguments for all passages in one row, and the places of the states before scored tokens (N,)."""
    sequences = PackedSequences.of([passage.ids for passage in passages])
    of_passages = sequences.gather_indices.split(sequences.sequence_lengths)
    states = [places[list(passage.places)] for places, passage in zip(of_passages, passages, strict=True)]
    return packed_batch(model.base, sequences), torch.cat(states)


def _padded(model: QAdapterForCausalLM, passages: Sequence[Passage]) -> tuple[dict[str, Any], Tensor]:
    """Likewise with a padded row for each passage; the places are those among all B·T tokens."""
    width = max(len(passage.ids) for passage in passages)
    input_ids = torch.zeros(len(passages), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    states = []
    for row, passage in enumerate(passages):
        input_ids[row, : len(passage.ids)] = torch.tensor(passage.ids)
        attention_mask[row, : len(passage.ids)] = 1
        states.append(row * width + torch.tensor(passage.places))
    batch = {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions_of(attention_mask)
    }  # fmt: skip
    return {name: tensor.to(model.device) for name, tensor in batch.items()}, torch.cat(states)


def _hidden_states(
    model: QAdapterForCausalLM, batch: dict[str, Any], states: Tensor, streams: Sequence[Stream]
) -> dict[Stream, Tensor]:
    """Final hidden states (N, H) of each stream.

    A pass a stream, all of one shape: an adapter without effect then gives the base's very numbers. The layers below
    the first adapted one run once, for the base.
    """
    states = states.to(model.device)
    hidden: dict[Stream, Tensor] = {}
    trunk = KeepTrunk(model.shared_layers)
    for stream in streams:
        layers = trunk if trunk.states is None else FromTrunk(model.shared_layers, trunk.states)
        with model.plan.running(stream, layer_pass=layers):
            output = model.get_decoder()(**batch, use_cache=False)
        hidden[stream] = output.last_hidden_state.flatten(0, 1).index_select(0, states)
    return hidden


def token_drift(
    model: QAdapterForCausalLM,
    hidden: Mapping[Stream, Tensor],
    targets: Tensor,
    steps: Tensor,
    columns: Sequence[Column],
    directions: Mapping[str, Direction],
) -> tuple[BaseTokens, dict[str, TokenDrift]]:
    """The drift of N tokens from the hidden states (N, H) before them, on the CPU.

    Args:
        steps: which token of its answer each is (N,), from 0.
    """
    chunk = default_chunk_size(model.head.linear.weight)
    chunk = max(1, chunk // max(1, len(hidden) // FEW_STREAMS))
    parts: list[tuple[BaseTokens, dict[str, TokenDrift]]] = []
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        chunk_logits = _chunk_logits(model, {stream: states[rows] for stream, states in hidden.items()})
        for block in _blocks(chunk_logits[None]):
            base, differences = _wide(model, {stream: logits[block] for stream, logits in chunk_logits.items()})
            places = targets[rows][block], steps[rows][block]
            parts.append(_block_drift(base, differences, *places, columns, directions))
    bases = BaseTokens(*(torch.cat(field).cpu() for field in zip(*(base for base, _ in parts), strict=True)))
    drifts = {
        column.name: TokenDrift(
            *(torch.cat(field).cpu() for field in zip(*(drift[column.name] for _, drift in parts), strict=True))
        )
        for column in columns
    }
    return bases, drifts


def _chunk_logits(model: QAdapterForCausalLM, hidden: Mapping[Stream, Tensor]) -> dict[Stream, Tensor]:
    """z_b (n, V), and of each adapter's stream z_k − z_b where one head serves all streams, else z_k, in its dtype.

    Where it does, the difference is taken of the hidden states: in bfloat16 the difference of two rounded logits would
    be off by more than a weak adapter moves them.
    """
    head = model.head
    if not head.shared:
        return dict(zip(hidden, head.stream_logits(hidden, model.plan), strict=True))
    base = hidden[None]
    return {
        name: head.logits(base if name is None else widened(states) - widened(base)) for name, states in hidden.items()
    }


def _wide(model: QAdapterForCausalLM, logits: Mapping[Stream, Tensor]) -> tuple[Tensor, dict[Stream, Tensor]]:
    """z_b (n, V), and z_k − z_b of each adapter's stream, in float32 or wider, from some rows of `_chunk_logits`."""
    base = widened(logits[None])
    own: dict[Stream, Tensor] = {name: widened(values) for name, values in logits.items() if name is not None}
    return base, own if model.head.shared else {name: values - base for name, values in own.items()}


def _blocks(logits: Tensor) -> Iterator[slice]:
    n, vocabulary = logits.shape
    step = max(1, BLOCK_ELEMENTS // vocabulary) if logits.device.type == "cpu" else n
    for start in range(0, n, step):
        yield slice(start, start + step)


def _block_drift(
    base_logits: Tensor,
    differences: Mapping[Stream, Tensor],
    targets: Tensor,
    steps: Tensor,
    columns: Sequence[Column],
    directions: Mapping[str, Direction],
) -> tuple[BaseTokens, dict[str, TokenDrift]]:
    index = targets.unsqueeze(-1)
    base = base_logits - base_logits.amax(-1, keepdim=True)  # (n, V)
    top = base.argmax(-1, keepdim=True)
    probabilities, base_lse = _distribution(base, base.new_zeros(len(base)))
    base_target = base.gather(-1, index).squeeze(-1)
    base_entropy = base_lse - torch.linalg.vecdot(probabilities, base)
    lines: dict[Direction, Tensor] = {}
    far: dict[Direction, Tensor] = {}  # KL of the policy at strength 1
    drifts = {}
    for column in columns:
        direction = directions[column.name]
        if direction not in lines:
            lines[direction] = _line(direction, differences, base, probabilities)
        d = lines[direction]
        strength: float | Tensor = column.share
        if column.decay == 1.0:
            z = torch.add(base, d, alpha=column.share)  # (n, V)
        else:
            strength = column.strength * column.decay ** steps.to(base.dtype)  # (n,)
            z = torch.addcmul(base, d, strength.unsqueeze(-1))
        if column.min_kl:
            if direction not in far:
                far[direction] = kl_divergence(base + d, base)
            strength = strength * shrinkage(far[direction], column.min_kl)
            z = torch.addcmul(base, d, strength.unsqueeze(-1))
        if column.max_kl is not None:
            cap = torch.tensor(column.max_kl, device=base.device)
            z, share = (value.to(base.dtype) for value in capped_logits(z, base, cap))  # in float32
            strength = strength * share
        peak, target = z.amax(-1), z.gather(-1, index).squeeze(-1)
        policy, lse = _distribution(z, peak)
        shift = lse - base_lse
        drifts[column.name] = TokenDrift(
            logps=target - lse,
            kl=(strength * torch.linalg.vecdot(policy, d) - shift).clamp_(min=0),
            reverse_kl=shift.clamp(min=0),
            entropy=lse - torch.linalg.vecdot(policy, z),
            agreement=(z.gather(-1, top).squeeze(-1) >= peak).to(z.dtype),
            greedy=(target >= peak).to(z.dtype),
        )
    return BaseTokens(base_target - base_lse, base_entropy, (base_target >= 0).to(base.dtype)), drifts


def _line(direction: Direction, differences: Mapping[Stream, Tensor], base: Tensor, probabilities: Tensor) -> Tensor:
    """d (n, V), shifted so that its mean under the base is 0: KL and LSE are then differences of small numbers."""
    d = direction.base * base if direction.base else torch.zeros_like(base)
    for name, coefficient in direction.streams:
        d.add_(differences[name], alpha=coefficient)
    return d.sub_(torch.linalg.vecdot(probabilities, d).unsqueeze(-1))


def _distribution(z: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(z) (n, V) and LSE(z) (n,), given max(z) (n,); cheaper than logsumexp and exp one after the other."""
    probabilities = z.softmax(-1)
    return probabilities, peak - probabilities.amax(-1).log()
