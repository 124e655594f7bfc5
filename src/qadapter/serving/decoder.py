"""All that touches the model: feed tokens to a batch whose rows follow different policies, and get their logits.

A row that needs K streams has K lanes, one a stream. Rows bring only the lanes they need: a row of the base has one,
a row of one adapter one or two, however many adapters are loaded, and one where weights are interpolated. Lanes of one
stream stand together, so that a LoRA layer works on one slice a stream; the base's weights are read once for all lanes.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qadapter.errors import ConfigError
from qadapter.functional import beside
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.cache_name import CACHE
from qadapter.modeling.mixing import capped_logits, thresholded_logits
from qadapter.modeling.streams import Blend, Stream
from qadapter.serving.cache import LaneCache, Part, assembled
from qadapter.serving.catalogue import BLENDED, Dial

LAYER_TYPES = {"full_attention", "sliding_attention"}
# Called with the first of some columns that were fed, and the logits (R, C, V) of what follows each of them.
Watch = Callable[[int, Tensor], None]
WATCHED_LOGITS = 2**24  # numbers at a time


class RowBatch:
    """Rows with their dials, the number of tokens each has seen, and the lanes that hold their keys and values.

    Args:
        steps: how many logits were read of each row: which token of its answer comes next.
        shares: of the strength at each row's next token: 1, but where its dial is conditional what the text so far asks
            for, which others know.
        like: a tensor of the model's device and of the dtype to mix in.
    """

    def __init__(
        self, dials: Sequence[Dial], lengths: Sequence[int], steps: Sequence[int], cache: LaneCache, like: Tensor
    ) -> None:
        self.like = like
        self.dials, self.lengths, self.steps, self.cache = list(dials), list(lengths), list(steps), cache
        pairs = [(row, stream) for row, dial in enumerate(dials) for stream in dial.coefficients]
        # Adapters by name, then the base.
        self.lanes: list[tuple[int, str | None]] = sorted(
            pairs, key=lambda lane: (lane[1] is None, lane[1] or "", lane[0])
        )
        self.lane_rows = self.tensor([row for row, _ in self.lanes])
        self.shares = [1.0] * len(self.dials)
        self.changing = any(dial.changing for dial in dials)
        coefficients = [dials[row].coefficients[stream] for row, stream in self.lanes]
        self._constant = self.tensor(coefficients, like.dtype).unsqueeze(-1)  # (L, 1)
        self._blend = self._blended()
        # Each row's one lane is its policy as it stands: nothing to mix.
        self.plain = len(self.lanes) == len(dials) and all(c == 1.0 for c in coefficients)

    def __len__(self) -> int:
        return len(self.dials)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.long) -> Tensor:
        """`values` on the model's device."""
        return self.like.new_tensor(values, dtype=dtype)

    @property
    def width(self) -> int:
        """Columns of the cache."""
        return self.cache.get_seq_length()

    def base_lanes(self, rows: Sequence[int]) -> list[int]:
        """The lane of the base of each of the rows, which have one."""
        places = {row: place for place, (row, stream) in enumerate(self.lanes) if stream is None}
        return [places[row] for row in rows]

    def coefficients(self) -> Tensor:
        """The weight of each lane in its row's next logits (L, 1)."""
        if not self.changing:
            return self._constant
        values = [self.dials[row].at(stream, self.steps[row], self.shares[row]) for row, stream in self.lanes]
        return self.tensor(values, self.like.dtype).unsqueeze(-1)

    def lanes_of(self, name: str | None) -> list[int]:
        """The places of a stream's lanes, by its name."""
        return [place for place, (_, own) in enumerate(self.lanes) if own == name]

    def stream(self, name: str | None) -> Stream:
        """The stream of that name: the blend with the factors (L,) of its lanes."""
        return self._blend if name == BLENDED else name

    def _blended(self) -> Blend:
        factors = [self.dials[self.lanes[place][0]].factors for place in self.lanes_of(BLENDED)]
        adapters = sorted({name for own in factors for name in own})
        columns = ([own.get(name, 0.0) for own in factors] for name in adapters)
        return Blend(tuple(zip(adapters, (self.tensor(column, self.like.dtype) for column in columns), strict=True)))

    def stream_blocks(self) -> list[tuple[Stream, int]]:
        """The stream and number of lanes of each block."""
        return [(self.stream(name), len(list(run))) for name, run in groupby(name for _, name in self.lanes)]


class Decoder:
    """Runs a policy model on batches of rows, each with a `Dial` of its own.

    Raises:
        ConfigError: a base whose layers keep another memory than keys and values.
    """

    def __init__(self, model: QAdapterForCausalLM) -> None:
        self.model = model.eval()
        # As `functional.mix_streams`: bfloat16 is mixed in float32, float64 stays.
        self.like = torch.empty(0, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
        config = model.config.get_text_config(decoder=True)
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        kinds = set(getattr(config, "layer_types", None) or LAYER_TYPES)
        sharing = getattr(config, "num_kv_shared_layers", None)
        if not kinds <= LAYER_TYPES or sharing:
            has = f"{sharing} layers that read another's keys and values" if sharing else f"layers {sorted(kinds)}"
            raise ConfigError(
                f"{type(model.base).__name__} has {has}; the server knows {sorted(LAYER_TYPES)} with keys and values "
                "of their own. Use `qadapter generate`."
            )

    def empty(self, dials: Sequence[Dial]) -> RowBatch:
        """A batch of rows that have seen nothing."""
        return RowBatch(dials, [0] * len(dials), [0] * len(dials), LaneCache(self.layers), self.like)

    @torch.inference_mode()
    def feed(
        self, batch: RowBatch, ids: Sequence[Sequence[int]], read: bool = True, watch: Watch | None = None
    ) -> Tensor | None:
        """Let every row see its tokens; the logits (R, V) of what follows, unless `read` is false.

        Rows may get fewer tokens than others only as long as they have seen none: they are padded at the left.

        Args:
            watch: told the logits at all columns, a few at a time.
        """
        columns = max(map(len, ids))
        padded = batch.tensor([[0] * (columns - len(row)) + list(row) for row in ids])
        batch.lengths = [seen + len(row) for seen, row in zip(batch.lengths, ids, strict=True)]
        lengths = batch.tensor(batch.lengths).unsqueeze(-1)  # (R, 1)
        width = batch.width + columns
        places = torch.arange(width, device=lengths.device)
        attention_mask = places >= width - lengths  # (R, width)
        position_ids = (places[:columns] + lengths - columns).clamp(min=0)  # (R, columns)
        lanes = batch.lane_rows
        streams, sizes = zip(*batch.stream_blocks(), strict=True)
        with self.model.plan.running(*streams, sizes=sizes):
            output = self.model.get_decoder()(
                input_ids=padded[lanes],
                attention_mask=attention_mask[lanes].long(),
                position_ids=position_ids[lanes],
                use_cache=True,
                **{CACHE: batch.cache},
            )
        hidden = output.last_hidden_state  # (L, columns, H)
        if watch is not None:
            few = max(1, WATCHED_LOGITS // (len(batch) * self.vocabulary))
            for column in range(0, columns, few):
                watch(column, self._logits(batch, hidden[:, column : column + few]))
        if not read:
            return None
        logits = self._logits(batch, hidden[:, -1])
        batch.steps = [step + 1 for step in batch.steps]
        return logits

    def _logits(self, batch: RowBatch, hidden: Tensor) -> Tensor:
        """Each row's mix of its lanes' hidden states (L, ..., H), as logits (R, ..., V)."""
        head = self.model.head
        mixed = None
        if head.shared and batch.plain:
            logits = head.logits(torch.empty_like(hidden).index_copy_(0, batch.lane_rows, hidden))
        elif head.shared:
            mixed = self.like.new_zeros(len(batch), *hidden.shape[1:])
            parts = beside(batch.coefficients(), hidden.dim()) * hidden.to(mixed)
            logits = head.logits(mixed.index_add_(0, batch.lane_rows, parts))
        else:
            logits = self._separate_logits(batch, hidden)
        logits = self._thresholded(batch, hidden, mixed, logits.to(self.like))
        return self._capped(batch, hidden, logits)

    def _separate_logits(self, batch: RowBatch, hidden: Tensor) -> Tensor:
        """The mix of logits, for heads that do not let hidden states be mixed (`Head.shared`)."""
        mixed: Tensor | None = None
        coefficients = batch.coefficients()
        for name in dict.fromkeys(name for _, name in batch.lanes):
            lanes = batch.tensor(batch.lanes_of(name))
            part = beside(coefficients[lanes], hidden.dim()) * self._stream_logits(hidden[lanes], batch.stream(name))
            mixed = part.new_zeros(len(batch), *part.shape[1:]) if mixed is None else mixed
            mixed.index_add_(0, batch.lane_rows[lanes], part)
        assert mixed is not None
        return mixed

    def _stream_logits(self, hidden: Tensor, stream: Stream) -> Tensor:
        with self.model.plan.running(stream):
            return self.model.head.logits(hidden).to(self.like)

    def _thresholded(self, batch: RowBatch, hidden: Tensor, mixed: Tensor | None, logits: Tensor) -> Tensor:
        """`logits`, with the share of the way from the base that a row's threshold leaves of it."""
        rows = [row for row, dial in enumerate(batch.dials) if dial.min_kl is not None]
        if rows:
            base_hidden = hidden[batch.base_lanes(rows)]
            base_logits = self._stream_logits(base_hidden, None)
            if mixed is None:
                delta = logits[rows] - base_logits
            else:  # of hidden states, where a difference is finer than of logits
                delta = self.model.head.logits(mixed[rows] - base_hidden.to(mixed)).to(self.like)
            dials = [(row, batch.dials[row]) for row in rows]
            used = [batch.shares[row] * dial.strength * dial.decay ** batch.steps[row] for row, dial in dials]
            thresholds = batch.tensor([dial.min_kl for _, dial in dials], self.like.dtype)
            moved, _ = thresholded_logits(base_logits, delta, batch.tensor(used, self.like.dtype), thresholds)
            logits = logits.index_copy(0, batch.tensor(rows), moved.to(logits))
        return logits

    def _capped(self, batch: RowBatch, hidden: Tensor, logits: Tensor) -> Tensor:
        """`logits`, drawn towards the base where a row's dial caps the KL."""
        rows = [row for row, dial in enumerate(batch.dials) if dial.max_kl is not None and len(dial.coefficients) > 1]
        if rows:
            base_logits = self._stream_logits(hidden[batch.base_lanes(rows)], None)
            caps = batch.tensor([batch.dials[row].max_kl or 0.0 for row in rows], torch.float32)
            capped, _ = capped_logits(logits[rows], base_logits, caps)
            logits = logits.index_copy(0, batch.tensor(rows), capped.to(logits))
        return logits


def joined(parts: Sequence[tuple[RowBatch, Sequence[int]]]) -> RowBatch:
    """A batch of the given rows of several batches, in that order; those batches are used up.

    A row may be taken several times, for several answers to one prompt. Columns that no row needs any more go.
    """
    taken = [(number, batch, row) for number, (batch, rows) in enumerate(parts) for row in rows]
    result = RowBatch(
        [batch.dials[row] for _, batch, row in taken],
        [batch.lengths[row] for _, batch, row in taken],
        [batch.steps[row] for _, batch, row in taken],
        LaneCache(0),
        parts[0][0].like,
    )
    cache_parts = []
    for number, (batch, _) in enumerate(parts):
        places = {lane: place for place, lane in enumerate(batch.lanes)}
        moves = [
            (places[taken[row][2], stream], target)
            for target, (row, stream) in enumerate(result.lanes)
            if taken[row][0] == number
        ]
        if moves:
            sources, targets = (batch.tensor(column) for column in zip(*moves, strict=True))
            cache_parts.append(Part(batch.cache, sources, targets))
    result.cache = assembled(cache_parts, max(result.lengths))
    return result
