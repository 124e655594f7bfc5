"""Time to tokenise pairs, and to read their tokens from the cache instead.

    python benchmarks/tokenising.py [--rows 4000] [--rounds 5]

The rows are the built-in pairs over and over, each prompt with its own number. A round makes an empty cache and runs
without it, into it and out of it, in turn; figures are medians of seconds by the clock and of processor seconds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import datasets
from datasets import Dataset

from qadapter.data import load_preference_dataset, tokenise_preferences
from qadapter.data.token_cache import cache_folder, tokenise_cached
from qadapter.modeling.bases import load_tokenizer, resolve_base
from qadapter.modeling.fingerprints import tokenizer_fingerprint

MAX_LENGTH = 1024


def numbered_pairs(rows: int) -> Dataset:
    """Built-in pairs, all different."""
    pairs = list(load_preference_dataset("builtin", split="train"))
    some = ((number, pairs[number % len(pairs)]) for number in range(rows))
    return Dataset.from_list([pair | {"prompt": f"{number}. {pair['prompt']}"} for number, pair in some])


def seconds(call: Callable[[], tuple]) -> tuple[float, float, tuple]:
    """(by the clock, of the processor, what `call` gave)."""
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - clock, time.process_time() - processor, result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    pairs, tokenizer = numbered_pairs(arguments.rows), load_tokenizer(resolve_base("builtin"))

    def cached() -> tuple:
        return tokenise_cached(pairs, tokenizer, fingerprint=tokenizer_fingerprint(tokenizer), max_length=MAX_LENGTH)

    ways = {
        "tokenise": lambda: tokenise_preferences(pairs, tokenizer, max_length=MAX_LENGTH),
        "tokenise and keep": cached,
        "read": cached,
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = folder
            results = []
            for name, way in ways.items():
                *times, result = seconds(way)
                measured[name].append((times[0], times[1]))
                results.append((result[0].to_list(), result[1]))
            assert results[1:] == results[:1] * 2
            size = sum(path.stat().st_size for path in cache_folder().rglob("*") if path.is_file())
    for name, times in measured.items():
        clock, processor = (statistics.median(values) for values in zip(*times, strict=True))
        print(f"{name}: {clock:.2f} s by the clock, {processor:.2f} s of the processor")
    print(f"{arguments.rows} rows, {size / 2**20:.1f} MiB in the cache")


if __name__ == "__main__":
    main()
