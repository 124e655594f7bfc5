import pytest
from data_examples import chat_pair, plain_pair
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from qadapter.data import load_preference_dataset
from qadapter.data.mixtures import mixture_counts, parse_mixture
from qadapter.errors import DataError
from qadapter.run_settings import DataArguments
from qadapter.training import load_datasets


@pytest.fixture
def paths(write_lines):
    a = write_lines([plain_pair(f"a{number}") for number in range(70)], "a.jsonl")
    b = write_lines([plain_pair(f"b{number}") for number in range(50)], "b.jsonl")
    return str(a), str(b)


def share_of_a(rows):
    return sum(row["prompt"].startswith("prompt a") for row in rows) / len(rows)


def test_weights_are_shares_of_the_result(paths):
    a, b = paths
    mixed = load_preference_dataset({a: 0.7, b: 0.3}).to_list()
    assert len(mixed) == 100
    assert share_of_a(mixed) == 0.7


def test_the_mixture_ends_where_a_source_runs_out(paths):
    a, b = paths
    mixed = load_preference_dataset({a: 1, b: 1}).to_list()
    assert len(mixed) == 100
    assert share_of_a(mixed) == 0.5


def test_no_row_occurs_twice_and_the_order_is_mixed(paths):
    prompts = load_preference_dataset(dict.fromkeys(paths, 1.0))["prompt"]
    assert len(set(prompts)) == len(prompts)
    sources = [prompt.startswith("prompt a") for prompt in prompts]
    assert sources != sorted(sources, reverse=True)


def test_max_rows_keeps_the_shares(paths):
    a, b = paths
    mixed = load_preference_dataset({a: 7, b: 3}, max_rows=30).to_list()
    assert len(mixed) == 30
    assert share_of_a(mixed) == 0.7


def test_the_same_seed_gives_the_same_rows(paths):
    weights = dict.fromkeys(paths, 0.5)
    first, again, other = (load_preference_dataset(weights, max_rows=11, seed=seed).to_list() for seed in (3, 3, 4))
    assert first == again != other


def test_loaded_splits_are_no_source():
    splits = DatasetDict({name: Dataset.from_list([plain_pair(name)]) for name in ("train", "test")})
    with pytest.raises(DataError, match=r"has the splits 'train', 'test' already loaded; give one of them$"):
        load_preference_dataset(splits)


def test_columns_are_given_by_name(paths):
    with pytest.raises(DataError, match=r"columns is a list; give \{'chosen': "):
        load_preference_dataset(paths[0], columns=["chosen=answer"])


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_rows_are_no_source(kind):
    with pytest.raises(DataError, match="a source is a dict; give paths or hub ids. .* goes to QAdapterTrainer"):
        load_preference_dataset(kind([plain_pair("a")]))


def test_a_list_of_strings_equals_a_dict(paths):
    a, b = paths
    assert (
        load_preference_dataset([f"{a}=0.2", f"{b}=0.8"]).to_list()
        == load_preference_dataset({a: 0.2, b: 0.8}).to_list()
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_takes_a_single_dataset_with_its_weight(paths, streaming):
    run = DataArguments(dataset=[f"{paths[0]}=1"], streaming=streaming)
    expected = load_preference_dataset({paths[0]: 1}, streaming=streaming)
    assert list(load_datasets(run, seed=0)[0]) == list(expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_without_weights_joins_all_rows_in_order(paths, streaming):
    joined = list(load_preference_dataset(list(paths), streaming=streaming))
    assert [row["prompt"] for row in joined] == [f"prompt a{n}" for n in range(70)] + [
        f"prompt b{n}" for n in range(50)
    ]
    assert list(load_preference_dataset(list(paths), streaming=streaming, max_rows=73)) == joined[:73]


def test_a_streamed_mixture_draws_by_weight_until_a_source_runs_out(paths):
    a, b = paths
    mixed = list(load_preference_dataset({a: 0.9, b: 0.1}, streaming=True))
    assert 70 <= len(mixed) < 100
    assert 0.8 < share_of_a(mixed) < 1
    assert len(list(load_preference_dataset({a: 0.9, b: 0.1}, streaming=True, max_rows=7))) == 7


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_text_becomes_messages_beside_a_chat(paths, write_lines, streaming):
    chat = str(write_lines([chat_pair()], "chat.jsonl"))
    rows = list(load_preference_dataset([paths[0], chat], streaming=streaming))
    assert rows[0] == chat_pair("prompt a0", "good a0", "bad a0")
    assert rows[-1] == chat_pair()


def test_a_name_may_hold_an_equals_sign():
    assert parse_mixture(["a=b.jsonl", "c.jsonl"]) == {"a=b.jsonl": None, "c.jsonl": None}
    assert parse_mixture(["a=b.jsonl=2"]) == {"a=b.jsonl": 2.0}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "names no source"),
        ({}, "names no source"),
        (["a=1", "a=2"], "names a source twice"),
        (["a=1", "b"], "a weight to some sources only"),
        ({"a": 0.0}, "the weight of a is 0.0"),
        ({"a": -1.0}, "the weight of a is -1.0"),
        (["a=nan"], "the weight of a is nan"),
        (["a=inf"], "the weight of a is inf"),
        ({"a": "much"}, "the weight of a is 'much'"),
    ],
)
def test_an_impossible_mixture_is_refused(source, message):
    with pytest.raises(DataError, match=message):
        parse_mixture(source)


def test_a_share_below_one_row_is_refused(paths):
    a, b = paths
    with pytest.raises(DataError, match=r"no row of .*b\.jsonl"):
        load_preference_dataset({a: 0.99, b: 0.01}, max_rows=11)


@given(
    parts=st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=5),
    max_rows=st.none() | st.integers(1, 300),
)
def test_counts_are_the_shares_rounded(parts, max_rows):
    sizes, weights = zip(*parts, strict=True)
    counts = mixture_counts(sizes, weights, max_rows)
    total = sum(counts)
    assert max_rows is None or total <= max_rows
    for count, size, weight in zip(counts, sizes, weights, strict=True):
        assert 0 <= count <= size
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6
