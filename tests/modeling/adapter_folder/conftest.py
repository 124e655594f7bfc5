"""A policy with a tokenizer and its adapter folder."""

import shutil

import pytest
from models import tiny_tokenizer
from saved_adapters import build


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """(policy, its folder's parent), with a tokenizer; not to be changed."""
    root = tmp_path_factory.mktemp("original")
    return build(root, tokenizer=tiny_tokenizer()), root


@pytest.fixture
def policy(original):
    return original[0]


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the adapter folder, free to be changed; it names the base in the original's place."""
    return shutil.copytree(original[1] / "out", tmp_path / "out")
