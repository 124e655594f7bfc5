"""Which layers the experiments' LoRA is on."""

import pytest
from models import tiny_base

from benchmarks.experiments.settings import Training
from benchmarks.experiments.trainer import lora_of


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", None), ("upper", [4, 5, 6, 7]), ("1/4", [6, 7]), ("3/4", [2, 3, 4, 5, 6, 7])]
)
def test_a_share_of_the_layers_is_counted_from_the_top(tmp_path, layers, expected):
    tiny_base(num_hidden_layers=8).save_pretrained(tmp_path)
    assert lora_of(str(tmp_path), Training(lora_layers=layers)).layers_to_transform == expected
