"""Every recipe in configs/ trains a step on a tiny Llama with its own settings, but for data and model.

The accelerate files need several GPUs: those are only read here.
"""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.experiments.tiny import write_tiny_base
from qadapter.cli.train import parse
from qadapter.config import PRESETS
from qadapter.training import train

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))
ROWS = [{"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, not {n}."} for n in range(8)]
# transformers 5.23 has a new name for it, which 5.19 does not know.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def arguments(recipe, base, pairs, folder):
    values = yaml.safe_load(recipe.read_text())
    own = ["--config", recipe, "--model", base, "--dataset", pairs, "--output-dir", folder, "--max-steps", 1]
    own += ["--use-cpu", "--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 1]
    own += ["--dataloader-pin-memory", "False"]
    own += ["--eval-dataset", pairs] if "eval_dataset" in values else []
    return [str(argument) for argument in own]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_on_a_tiny_llama(recipe, base, pairs, tmp_path):
    folder = tmp_path / "adapter"
    trainer = train(parse(arguments(recipe, base, pairs, folder)))
    assert trainer.state.global_step == 1
    saved = json.loads((folder / "qadapter_config.json").read_text())
    quantised = [bits for bits in (4, 8) if yaml.safe_load(recipe.read_text()).get(f"load_in_{bits}bit")]
    stored = saved["base"]["quantization"]
    assert quantised == ([] if stored is None else [bits for bits in (4, 8) if stored[f"load_in_{bits}bit"]])
    method = saved["adapters"]["default"]
    expected = PRESETS["authors" if recipe.stem.endswith("authors") else "default"]
    assert {name: method[name] for name in expected} == expected


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_starts_it_and_names_published_data(recipe):
    text = recipe.read_text()
    assert f"--config configs/{recipe.name}" in text
    values = yaml.safe_load(text)
    assert values["model"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert values["dataset"] in ("dsp/academy", "hh-rlhf/harmless")
    for file in ACCELERATE:
        if file.name in text:
            return
    assert "accelerate launch" not in text


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_files(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == 4
    assert config.mixed_precision == "bf16"
    assert any(file.name in recipe.read_text() for recipe in RECIPES)


def test_zero3_gathers_the_adapter_and_agrees_with_its_recipe():
    """DeepSpeed compares these figures when training begins; without gathering no adapter can be saved."""
    settings = yaml.safe_load((CONFIGS / "accelerate" / "zero3.yaml").read_text())["deepspeed_config"]
    recipe = yaml.safe_load((CONFIGS / "llama-3.1-8b-dsp-zero3.yaml").read_text())
    assert settings["zero3_save_16bit_model"]
    assert settings["gradient_accumulation_steps"] == recipe["gradient_accumulation_steps"]
    assert settings["gradient_clipping"] == recipe.get("max_grad_norm", 1.0)
