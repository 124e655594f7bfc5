"""What is measured of a pair."""

import pytest
import torch

from benchmarks.experiments.measure import body_gain
from qadapter.evaluation.drift import BaseTokens, TextDrift, TokenDrift


@pytest.mark.parametrize(("moved", "expected"), [([0.5, -0.1, 3.0], 0.2), ([2.0], 0.0)])
def test_the_gain_without_ends_leaves_out_the_last_token(moved, expected):
    base = torch.full((len(moved),), -2.0)
    rest = [torch.zeros(len(moved))] * 4
    policy = TokenDrift(base + torch.tensor(moved), *rest, rest[0])
    drift = TextDrift(BaseTokens(base, rest[0], rest[0]), {"policy": policy})
    assert body_gain(drift, "policy") == pytest.approx(expected)
