"""A base model with a chat template on disk, pairs in a file, and an adapter trained on them by the command line."""

import json

import datasets
import huggingface_hub
import pytest
from commands import CHAT_TEMPLATE, QUICK, qadapter, succeeded
from models import tiny_base, tiny_tokenizer


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub cannot be reached, wherever the tests run."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def save_base(folder, template=CHAT_TEMPLATE, seed=0, positions=512):
    tiny_base(max_position_embeddings=positions, eos_token_id=1, seed=seed).save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny Llama with a chat template."""
    return save_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def long_base(tmp_path_factory):
    """The folder of the same with a context that holds the built-in pairs, a character a token."""
    return save_base(tmp_path_factory.mktemp("bases") / "long-llama", positions=2048)


@pytest.fixture(scope="session")
def other_base(tmp_path_factory):
    """The folder of a base with other weights."""
    return save_base(tmp_path_factory.mktemp("bases") / "other-llama", seed=9)


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory):
    """The folder of a base whose tokenizer has no chat template."""
    return save_base(tmp_path_factory.mktemp("bases") / "plain-llama", template=None)


PAIRS = [
    {"prompt": f"Question {number}?", "chosen": f"Yes, {number}.", "rejected": f"No, never {number}."}
    for number in range(7)
]


@pytest.fixture
def write_pairs(tmp_path):
    """Write rows as JSON Lines and give the path; bytes are written as they are."""

    def write(rows=PAIRS, name="pairs.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file of seven good pairs."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base, pairs):
    """The folder of an adapter that `qadapter train` has written; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    succeeded(qadapter("train", "--model", base, "--dataset", pairs, "--output-dir", folder, *QUICK))
    return folder


@pytest.fixture
def train(base, pairs, tmp_path):
    """Run `qadapter train` into tmp_path/"run" with quick settings; options come last, so they win."""

    def run(*options, model=base, dataset=pairs, folder=tmp_path / "run", settings=QUICK):
        given = ("--model", model, "--dataset", dataset, "--output-dir", folder)
        return qadapter("train", *given, *settings, *options)

    return run


@pytest.fixture
def folder(tmp_path):
    """Where the fixture `train` writes."""
    return tmp_path / "run"
