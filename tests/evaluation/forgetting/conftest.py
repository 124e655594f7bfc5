"""A tiny base with room for whole questions, a policy on it, and caches of the tests' own."""

import datasets
import pytest
from benchmark_tasks import LENGTH
from models import tiny_base, tiny_policy


@pytest.fixture(autouse=True)
def scratch_caches(tmp_path_factory, monkeypatch):
    # lm-eval describes the machine after each evaluation, by a dozen subprocesses.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def base():
    return tiny_base(max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def policy(base):
    return tiny_policy(base)
