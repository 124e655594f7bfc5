"""A base and a policy in float64, so that metrics can be compared with the oracle's."""

import pytest
import torch
from models import tiny_base, tiny_policy
from trainer_examples import CONFIG


@pytest.fixture
def base():
    return tiny_base("gpt_neox", dtype=torch.float64)


@pytest.fixture
def policy(base):
    return tiny_policy(base, CONFIG)
