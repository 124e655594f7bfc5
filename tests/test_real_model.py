"""SmolLM2-135M-Instruct itself: the quickstart's claims on a short run, and the dial on real text."""

import io

import pytest
import torch
from rich.console import Console

from qadapter import QAdapterError, QAdapterForCausalLM
from qadapter.builtin import neutral_paragraphs
from qadapter.evaluation.report import print_report, write_report
from qadapter.functional import kl_divergence
from qadapter.generation import Sampling, generate_texts
from qadapter.modeling.bases import load_base, load_tokenizer, resolve_base
from qadapter.quickstart import run_quickstart

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


@pytest.fixture(scope="module")
def source():
    try:
        return resolve_base("builtin")
    except QAdapterError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def quickstart(source, tmp_path_factory):
    """A short quickstart: its folder, result and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    console = Console(record=True, width=100, file=io.StringIO())
    result = run_quickstart(folder, console, steps=10, judged_prompts=4, held_out_pairs=48)
    write_report(result, folder)
    print_report(result, folder, console)
    return folder, result, console.export_text()


@pytest.fixture(scope="module")
def policy(quickstart):
    return QAdapterForCausalLM.from_pretrained(quickstart[0] / "adapter", dtype=torch.float32)


def test_held_out_margin_is_significantly_above_the_base(quickstart):
    """After ten steps the accuracy is not on every processor: bfloat16 rounds otherwise."""
    gain = quickstart[1].pairs["policy"]["token_margin_gain"]
    assert gain.n == 48
    assert gain.low > 0


def test_drift_is_measured_and_printed(quickstart):
    _, result, printed = quickstart
    drift = result.neutral["policy"]
    assert 0 < drift["kl"].value < result.neutral["plain"]["kl"].value  # the threshold leaves less
    assert f"{drift['kl'].value:.4f}" in printed
    assert f"{drift['loss'].value:.3f}" in printed
    assert "KL from the base on chosen answers" in printed


def test_everything_that_the_quickstart_names_is_there(quickstart):
    folder, _, printed = quickstart
    for name in (
        "adapter/qadapter_config.json",
        "adapter/training_curve.svg",
        "report.md",
        "report.html",
        "results.json",
    ):
        assert (folder / name).stat().st_size > 0
    assert "training_curve.svg" in printed


def test_the_base_knows_the_capital_of_france(policy, source):
    prompts = ["What is the capital of France?"]
    (answer,) = generate_texts(policy, load_tokenizer(source), prompts, Sampling(max_new_tokens=16), strength=0.0)
    assert "Paris" in answer.text


def test_strength_zero_is_bit_equal_to_the_bare_model(policy, source):
    ids = torch.tensor([load_tokenizer(source)(neutral_paragraphs()[0])["input_ids"][:64]])
    base = load_base(source, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(policy(ids, strength=0.0).logits, base(ids).logits)


def test_kl_is_monotone_in_strength_on_a_thousand_tokens_of_real_text(policy, source):
    tokenizer = load_tokenizer(source)
    ids = torch.tensor([tokenizer("\n\n".join(neutral_paragraphs()))["input_ids"][:1000]]).view(4, 250)
    with torch.no_grad():
        base = policy(ids, strength=0.0).logits
        last = torch.zeros(ids.shape)
        for strength in (0.25, 0.5, 1.0, 2.0):
            kl = kl_divergence(policy(ids, strength=strength).logits, base)
            assert (kl >= last - 1e-5).all()  # float32
            last = kl
    assert last.numel() == 1000
    assert last.mean() > 0
