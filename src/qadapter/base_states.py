"""The base's hidden states of every training pair, computed once and kept over the epochs, in memory or in a folder.

The base never changes, so from the second epoch on its pass is work done before. Kept are the final states before the
answers' tokens and, where layers are shared, the states of all tokens that enter the first adapted layer; both in the
dtype that the base computes in. `policy.token_statistics` without them is the slow twin.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from qadapter.data.packing import SIDES, PackedCollator, PackedSequences
from qadapter.data.tokenisation import as_python, pairs_digest
from qadapter.errors import ConfigError
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.base_digest import base_digest
from qadapter.modeling.packed import packed_batch
from qadapter.modeling.passes import BaseStates
from qadapter.new_folders import whole_file, write_json

logger = logging.getLogger(__name__)

MANIFEST = "base_states.json"
FORMAT = 3
SHARD_PAIRS = 32
IN_MEMORY = "memory"
# Of what is free; the rest is left to the run itself.
USABLE_SHARE = 0.8
FINAL, TRUNK = "base_final", "base_trunk"

Pair = Mapping[str, Any]
Shard = Mapping[str, Tensor]


class PairStates(NamedTuple):
    """The base's states of one pair."""

    final: Tensor  # (N, H), final states before each token of the chosen answer, then of the rejected
    trunk: Tensor | None  # (L, H), of the tokens of prompt, chosen and rejected answer; None if no layer is shared


class PairsWithStates(torch.utils.data.Dataset):
    """Tokenised pairs, each with its `PairStates` as the columns `base_final` and `base_trunk`.

    Args:
        shards: the states of SHARD_PAIRS pairs each, or the files that hold them.
    """

    def __init__(self, pairs: Dataset, shards: Sequence[Shard | Path]) -> None:
        self.pairs, self.shards = pairs, shards

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, shard, place = self.pairs[index], self.shards[index // SHARD_PAIRS], index % SHARD_PAIRS
        states = {name: _tensor(shard, f"{place}.{name}") for name in (FINAL, TRUNK)}
        found = {name: value for name, value in states.items() if value is not None}
        if any(value.dim() != 2 or len(value) != _tokens(pair, name) for name, value in found.items()):
            raise ConfigError(f"the base's states of pair {index} in {shard} are not of its tokens: remove its folder.")
        return pair | found


@dataclass(frozen=True)
class BaseStatesCollator:
    """Adds `base_states` (N, H) and `trunk_states` to what `collator` makes of pairs that have them."""

    collator: Callable[[Sequence[Pair]], dict[str, Any]]

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        batch = self.collator(pairs)
        if FINAL not in pairs[0]:
            return batch
        answers = [pair[FINAL].split([len(pair[side]) for side in SIDES]) for pair in pairs]
        batch["base_states"] = torch.cat([states for side in zip(*answers, strict=True) for states in side])
        if TRUNK in pairs[0]:
            sequences = zip(*(_sequences(pair) for pair in pairs), strict=True)
            batch["trunk_states"] = _in_rows(batch, torch.cat([states for side in sequences for states in side]))
        return batch


def keep_base_states(
    model: QAdapterForCausalLM,
    pairs: Dataset,
    collator: Callable[[Sequence[Pair]], dict[str, Any]],
    where: str,
    batch_pairs: int,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    show_progress: bool = True,
    share: tuple[int, int] = (0, 1),
    in_turn: Callable[[], AbstractContextManager] = nullcontext,
) -> PairsWithStates:
    """The pairs with the base's states, computed now unless the folder holds them.

    Several processes compute a share each; they may read once all are done.

    Args:
        collator: makes the batches to compute on, without states; packed or padded.
        where: "memory", or a folder, which a later run on the same pairs reads; an interrupted one goes on there.
        batch_pairs: pairs a pass.
        precision: the context in which training runs the model.
        show_progress: whether to draw a bar.
        share: which process this is, and of how many.
        in_turn: a context that the first process leaves before the others enter it.

    Raises:
        ConfigError: the states do not fit, or the folder holds those of other pairs, of another base or of another
            first adapted layer, or cannot be read.
    """
    if not isinstance(pairs, Dataset):
        raise ConfigError("cache_base_states needs a dataset of known length: leave streaming out.")
    pairs = as_python(pairs)
    starts = range(0, len(pairs), SHARD_PAIRS)
    folder = None if where == IN_MEMORY else Path(where)
    paths: list[Path] = []
    with in_turn():
        if folder is not None:
            paths = [folder / f"pairs-{start:08d}.safetensors" for start in starts]
            with precision():
                stated = fingerprint(model, pairs, isinstance(collator, PackedCollator))
            check_folder(folder, stated)
        missing = [i for i in range(len(starts)) if not (paths and paths[i].exists())]
        check_size(model, pairs, len(missing) / max(1, len(starts)), folder)
        if folder is not None and not (folder / MANIFEST).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / MANIFEST, stated)
    _opened.cache_clear()  # of a folder that has been made anew
    shards: list[Shard | Path] = [*paths] or [{}] * len(starts)
    process, processes = share
    own = [number for number in missing if number % processes == process]
    kept = len(pairs) - _pairs_in(missing, pairs)
    total = kept + _pairs_in(own, pairs)
    done = tqdm(total=total, initial=kept, unit="pair", desc="base states", disable=not show_progress)
    with done, torch.no_grad():
        for number in own:
            rows = list(pairs.select(range(starts[number], min(starts[number] + SHARD_PAIRS, len(pairs)))))
            shard: dict[str, Tensor] = {}
            for first in range(0, len(rows), batch_pairs):
                some = rows[first : first + batch_pairs]
                with precision():
                    states = pair_states(model, some, collator(some))
                shard |= dict(_named(states, first))
                done.update(len(some))
            if paths:
                with whole_file(paths[number]) as scratch:
                    save_file(shard, scratch)
            else:
                shards[number] = shard
    return PairsWithStates(pairs, shards)


def pair_states(model: QAdapterForCausalLM, pairs: Sequence[Pair], batch: dict[str, Any]) -> list[PairStates]:
    """The base's states of each pair, on the CPU, from one pass over `batch`, which holds these pairs."""
    states = _base_pass(model, batch)
    lengths = [len(pair["prompt_ids"]) + len(pair[side]) for side in SIDES for pair in pairs]
    final = _by_sequence(batch, states.final, lengths)
    trunk = None if states.trunk is None else _by_sequence(batch, states.trunk, lengths)
    found = []
    for i, pair in enumerate(pairs):
        prompt, sides = len(pair["prompt_ids"]), (i, i + len(pairs))
        answers = torch.cat([final[side][prompt - 1 : -1] for side in sides])
        rest = None if trunk is None else torch.cat([trunk[sides[0]], trunk[sides[1]][prompt:]])
        found.append(PairStates(answers.contiguous(), rest))
    return found


def check_folder(folder: Path, stated: dict[str, Any]) -> None:
    """Pass if the folder is not there, empty, or that of states with this fingerprint.

    Raises:
        ConfigError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        different = [name for name in stated if found.get(name) != stated[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"cache_base_states = {str(folder)!r}: it holds no readable {MANIFEST}, but other things. Give another."
        ) from error
    if different:
        raise ConfigError(
            f"cache_base_states = {str(folder)!r}: it holds something else than the states of this run (different: "
            f"{', '.join(different)}). Give another folder, or remove this one."
        )


def fingerprint(model: QAdapterForCausalLM, pairs: Dataset, packed: bool) -> dict[str, Any]:
    """What the states depend on, in the precision of the context; `packed`: whether they are of packed rows."""
    device, dtype = model.device.type, str(model.dtype)
    if torch.is_autocast_enabled(device):
        dtype = f"{dtype} with products in {torch.get_autocast_dtype(device)}"
    return {
        "format": FORMAT,
        "base": base_digest(model.base),
        "pairs": pairs_digest(pairs),
        "shared_layers": model.shared_layers,
        "dtype": dtype.replace("torch.", ""),
        "attention": model.config.get_text_config(decoder=True)._attn_implementation,
        "packed": packed,
    }


def estimated_bytes(model: QAdapterForCausalLM, pairs: Dataset) -> int:
    """Bytes of the states of all pairs."""
    hidden = model.config.get_text_config(decoder=True).hidden_size
    kinds = (FINAL, TRUNK) if model.shared_layers else (FINAL,)
    return sum(_tokens(pair, kind) for pair in pairs for kind in kinds) * hidden * model.dtype.itemsize


def check_size(model: QAdapterForCausalLM, pairs: Dataset, share: float, folder: Path | None) -> None:
    """Log the size of the states and of the `share` of them that is still to be made.

    Raises:
        ConfigError: they do not fit.
    """
    size = estimated_bytes(model, pairs)
    free = psutil.virtual_memory().available if folder is None else shutil.disk_usage(_existing(folder)).free
    place = "memory" if folder is None else str(folder)
    logger.info("The base's states of %d pairs take %s in %s.", len(pairs), _readable(size), place)
    if size * share > USABLE_SHARE * free:
        raise ConfigError(
            f"cache_base_states: the base's states of {len(pairs)} pairs take {_readable(size)}, but of the "
            f"{_readable(free)} free in {place} only {USABLE_SHARE:.0%} may be used: "
            f"{'give a folder, ' if folder is None else ''}leave the cache out, or use fewer or shorter pairs."
        )


def _base_pass(model: QAdapterForCausalLM, batch: dict[str, Any]) -> BaseStates:
    if "gather_indices" in batch:
        sequences = PackedSequences(*(batch[name] for name in PackedSequences._fields))
        return model.base_pass(**packed_batch(model.base, sequences, training=True))
    return model.base_pass(batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device))


def _tokens(pair: Pair, kind: str) -> int:
    """How many tokens of a pair have states of that kind."""
    return sum(len(pair[name]) for name in (SIDES if kind == FINAL else ("prompt_ids", *SIDES)))


def _by_sequence(batch: dict[str, Any], states: Tensor, lengths: list[int]) -> Sequence[Tensor]:
    """The states (T, H) of each sequence of a batch."""
    states = states.cpu()
    if "gather_indices" in batch:
        return states[0].index_select(0, batch["gather_indices"]).split(lengths)
    return states[batch["attention_mask"].bool()].split(lengths)


def _in_rows(batch: dict[str, Any], states: Tensor) -> Tensor:
    """The states of all sequences, one after the other, as the batch has them: (1, S, H) or (B, T, H)."""
    if "restore_indices" in batch:
        return states.index_select(0, batch["restore_indices"]).unsqueeze(0)
    rows = states.new_zeros(*batch["attention_mask"].shape, states.shape[-1])
    rows[batch["attention_mask"].bool()] = states
    return rows


def _sequences(pair: Pair) -> tuple[Tensor, Tensor]:
    """The states of prompt and chosen answer, and of prompt and rejected answer, from those of the pair."""
    prompt, chosen, rejected = pair[TRUNK].split([len(pair[name]) for name in ("prompt_ids", *SIDES)])
    return torch.cat([prompt, chosen]), torch.cat([prompt, rejected])


def _named(states: Sequence[PairStates], first: int) -> Iterator[tuple[str, Tensor]]:
    for place, pair in enumerate(states, start=first):
        yield f"{place}.{FINAL}", pair.final
        if pair.trunk is not None:
            yield f"{place}.{TRUNK}", pair.trunk


@functools.lru_cache(maxsize=256)
def _opened(path: Path) -> Any:
    """The file, mapped into memory; only what is asked for is read.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove its folder; the states are made anew.") from error


def _tensor(shard: Shard | Path, name: str) -> Tensor | None:
    """A tensor of a shard in memory or in a file, None if it has none of that name."""
    if not isinstance(shard, Path):
        return shard.get(name)
    file = _opened(shard)
    return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 -- not a dict


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _pairs_in(shards: Sequence[int], pairs: Dataset) -> int:
    """How many pairs these shards hold."""
    return sum(min(SHARD_PAIRS, len(pairs) - SHARD_PAIRS * number) for number in shards)


def _readable(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
