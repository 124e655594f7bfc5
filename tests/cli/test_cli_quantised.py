"""A base in 4 or 8 bits on the command line: trained on, used without a word, and left behind for exports."""

import re

import pytest
from commands import CHAT_TEMPLATE, PROMPT, QUICK, SHORT, adapter_settings, assert_refused, qadapter, succeeded
from models import randomise, tiny_base, tiny_tokenizer
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """The folder of a base with weights so small that quantising moves its logits little, as it does real ones."""
    folder = tmp_path_factory.mktemp("bases") / "small-llama"
    base = tiny_base(max_position_embeddings=512, eos_token_id=1)
    randomise(base, scale=0.1)
    base.save_pretrained(folder)
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[4, 8])
def trained(request, small_base, pairs, tmp_path_factory):
    """(folder of an adapter trained on the base in so many bits, what the training said)."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    option = f"--load-in-{request.param}bit"
    outcome = qadapter("train", "--model", small_base, "--dataset", pairs, "--output-dir", folder, option, *QUICK)
    succeeded(outcome)
    return folder, outcome.err


def test_the_suggested_commands_run_on_what_was_trained(trained):
    folder, said = trained
    assert "MatMul8bitLt" not in said  # at every product
    assert adapter_settings(folder)["rank"] == 8
    answers = [
        succeeded(qadapter("generate", folder, "--prompt", PROMPT, *SHORT, *options))
        for options in ((), ("--unquantised",), ("--strength", 0.5))
    ]
    assert all(answers)


def test_exports_ask_for_the_base_unquantised(trained, tmp_path):
    folder, _ = trained
    export = ("export", folder, "--format", "merged", "--output-dir", tmp_path / "merged")
    assert_refused(qadapter(*export), "the base is quantised: merging .* --unquantised", folder=tmp_path / "merged")
    assert "largest logit difference" in succeeded(qadapter(*export, "--unquantised"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_info_names_the_quantisation(trained):
    folder, _ = trained
    assert re.search(r"quantization +in [48] bits", succeeded(qadapter("info", folder)))
