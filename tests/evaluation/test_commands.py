"""`qadapter eval`, `sweep`, `compare` and `audit` from the command line: outputs, exit codes, one clear line."""

import json
import os
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
from evaluated import write_adapter, write_base

from qadapter import QAdapterConfig, cli
from qadapter.evaluation import benchmarks, evaluate, sweep_report
from qadapter.evaluation.card import BEGIN
from qadapter.evaluation.judges import Verdict
from qadapter.modeling.wrapping import wrap

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def run(monkeypatch, capsys, files):
    """Runs a command on the tiny texts; its exit code, what it printed, and what it complained of."""
    monkeypatch.setenv("COLUMNS", "300")  # no folded cells

    def command(name, *arguments):
        monkeypatch.setitem(cli.COMMANDS, name, "")
        texts = {"--dataset": files["pairs"], "--neutral-text": files["neutral"]}
        if name != "sweep":  # which generates nothing
            texts |= {"--instructions": files["prompts"], "--max-new-tokens": 5}
        given = [part for option, value in texts.items() if option not in arguments for part in (option, value)]
        code = cli.main([name, *map(str, [*arguments, *given])])
        captured = capsys.readouterr()
        complaints = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        return code, captured.out, complaints

    return command


@pytest.fixture
def own(adapter, tmp_path):
    """An adapter folder that may be written into."""
    return shutil.copytree(adapter, tmp_path / "own")


def test_eval_prints_a_table_and_writes_all_figures(run, adapter, tmp_path):
    code, printed, _ = run("eval", adapter, "--strength", 0.5, "--judge", "rule:max-words=3",
                           "--output", tmp_path / "eval.json")  # fmt: skip
    assert code == 0
    assert "KL on neutral text" in printed
    assert "Win rate against the base" in printed
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["columns"] == [{"path": str(adapter), "name": "policy", "strength": 0.5}]
    assert list(figures["results"]["pairs"]["columns"]) == ["base", "policy"]


def test_why_verdicts_are_missing_is_printed(run, adapter, untouched, monkeypatch, tmp_path):
    silent = SimpleNamespace(judge=lambda comparisons, progress: [Verdict(None, "it is down")] * len(comparisons))
    monkeypatch.setattr(evaluate, "make_judge", lambda name: silent)
    judged = ("--judge", "endpoint:http://localhost:21999/v1#m", "--prompts", 3)
    told = "endpoint:m on {}: 3 of 3 verdicts missing, most often (3) for: it is down"
    assert told.format("policy") in run("eval", adapter, *judged)[1]
    printed = run("compare", adapter, untouched, *judged, "--output-dir", tmp_path)[1]
    for name in (adapter.name, untouched.name):
        assert told.format(name) in printed
        assert told.format(name) in (tmp_path / "compare.html").read_text()


def test_compare_joins_adapters_and_plain_loras(run, adapter, untouched, base, tmp_path):
    lora = shutil.copytree(adapter / "adapters" / "default", tmp_path / "lora")
    code, printed, _ = run("compare", adapter, untouched, lora, "--strengths", "0.5,1", "--base-model", base,
                           "--judge", "rule:max-words=3", "--output-dir", tmp_path / "out")  # fmt: skip
    assert code == 0
    columns = json.loads((tmp_path / "out" / "compare.json").read_text())["results"]["pairs"]["columns"]
    first, second = adapter.name, untouched.name
    assert list(columns) == ["base", f"{first}@0.5", first, f"{second}@0.5", second, "lora@0.5", "lora"]
    assert columns["lora"] == columns[first]  # the same LoRA
    assert columns[second]["accuracy"]["value"] == 0.5
    assert "lora@0.5" in printed
    assert f"lora − {first} " in printed
    differences = json.loads((tmp_path / "out" / "compare.json").read_text())["differences"]
    assert len(differences) == 15
    assert "items" not in (tmp_path / "out" / "compare.json").read_text()
    (same,) = (entry for entry in differences if (entry["column"], entry["minus"]) == ("lora", first))
    assert {figure["value"] for figure in same["figures"].values()} == {0.0}
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("Win rate against the base") == 1  # a row a judge
    assert page.count("Calibration error") == 1
    assert "Differences of each two" in page
    assert "answered by all" in (tmp_path / "out" / "compare.html").read_text()


def test_a_wrapped_lora_is_audited_to_the_end_as_the_adapter_it_was_is(run, base, tokenizer, tmp_path):
    own = write_adapter(tmp_path / "own", base, config=QAdapterConfig.preset("undiscounted"))
    policy, _ = wrap(own / "adapters" / "default", base, tokenizer)
    policy.save_pretrained(tmp_path / "wrapped", tokenizer=tokenizer)
    audits = []
    for folder in (tmp_path / "wrapped", own):
        assert run("audit", folder, "--strength", 0.7, "--max-kl", 100, "--no-cache")[0] == 0
        audits.append(json.loads((folder / "audit.json").read_text()))
        assert BEGIN in (folder / "README.md").read_text()
    assert audits[0]["verdict"] == "passes"
    assert audits[0]["results"] == audits[1]["results"]


def test_the_base_has_no_returns_where_adapters_have_different_temperatures(run, adapter, untouched, base, tmp_path):
    def of_the_base(*folders):
        assert run("compare", *folders, "--output-dir", tmp_path)[0] == 0
        columns = json.loads((tmp_path / "compare.json").read_text())["results"]["pairs"]["columns"]
        assert all(columns[folder.name]["reward_accuracy"]["n"] == 9 for folder in folders)
        return columns["base"]["reward_accuracy"]

    other = write_adapter(tmp_path / "other", base, config=QAdapterConfig(alpha_tilde=0.7))
    assert of_the_base(adapter, other) == {"value": None, "low": None, "high": None, "n": 0}
    assert of_the_base(adapter, untouched)["n"] == 9


def test_folders_with_at_signs_are_lines_of_their_own(run, adapter, untouched, tmp_path):
    folders = [shutil.copytree(own, tmp_path / name) for own, name in ((adapter, "run@1"), (untouched, "run@2"))]
    assert run("compare", *folders, "--strengths", "0.5,1", "--output-dir", tmp_path / "out")[0] == 0
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<polyline") == 2
    assert ">run@1</text>" in page
    shutil.copytree(adapter, tmp_path / "run")
    code, _, (complaint,) = run("compare", tmp_path / "run", folders[1], "--strengths", "1,2")
    assert code == 1
    assert "two have one name" in complaint


def test_compare_refuses_adapters_of_different_bases(run, adapter, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "other-base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    model.save_pretrained(base)
    other = write_adapter(tmp_path / "other", base)
    code, _, (complaint,) = run("compare", adapter, other)
    assert code == 1
    assert "have a different base model" in complaint


def test_compare_refuses_adapters_of_bases_with_equal_weights_and_other_settings(run, adapter, tmp_path):
    base = write_base(tmp_path / "other-base")
    settings = json.loads((base / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 12345.0
    (base / "config.json").write_text(json.dumps(settings))
    code, _, (complaint,) = run("compare", adapter, write_adapter(tmp_path / "other", base))
    assert code == 1
    assert "have a different config.json of the base" in complaint


def test_sweep_writes_into_the_adapter_folder(run, own):
    code, printed, _ = run("sweep", own, "--strengths", "0:1:3", "--alpha-0", 0.3, "--max-kl", 100)
    assert code == 0
    assert "Recommended strength: 1," in printed
    sweep = json.loads((own / "sweep.json").read_text())
    assert [point["name"] for point in sweep["points"]] == ["base", "0.5", "1", "0.5, alpha_0 0.3", "1, alpha_0 0.3"]
    for name in ("sweep.svg", "sweep.html", "sweep.png"):
        assert str(own / name) in printed
        assert (own / name).exists()


@pytest.mark.parametrize("before", [(), ("--adapter-weights", "default=1", "--strengths", "0.5,1")])
def test_a_sweep_ends_with_the_audit_of_the_strength_it_recommends(run, own, files, before):
    options = (
        "--strengths",
        "0.5,1",
        "--alpha-0",
        0.3,
        "--max-kl",
        100,
        "--decay",
        0.9,
        "--confident",
        "--output-dir",
        own,
    )
    code, printed, _ = run("sweep", *before, own, *options)
    program, name, *arguments = shlex.split(printed.partition("next: ")[2].splitlines()[0])
    assert (code, program, name) == (0, "qadapter", "audit")
    code, _, _ = run("audit", *arguments, "--instructions", files["prompts"])
    audit = json.loads((own / "audit.json").read_text())
    assert (code, audit["settings"]["strength"], audit["settings"]["decay"]) == (0, 1.0, 0.9)
    assert audit["settings"]["limits"]["confident"]


def test_a_sweep_that_recommends_no_strength_ends_with_no_audit(run, own):
    assert "next: " not in run("sweep", own, "--strengths", "1", "--max-kl", 0)[1]
    assert "next: " not in run("sweep", own, "--strengths", "1")[1]


def test_a_sweep_without_pillow_says_what_is_missing(run, own, monkeypatch):
    monkeypatch.setattr(sweep_report, "find_spec", lambda name: None)
    code, printed, _ = run("sweep", own, "--strengths", "1")
    assert code == 0
    assert "no sweep.png: it needs Pillow, pip install 'qadapter[eval]'" in printed
    assert not (own / "sweep.png").exists()


def test_audit_passes_fails_and_cannot_run(run, own):
    passing = run("audit", own, "--max-kl", 50, "--min-accuracy", 0)
    assert passing[0] == 0
    assert "Passes: all 4 limits are kept." in passing[1]
    failing = run("audit", own, "--max-kl", 0.0001)
    assert failing[0] == 1
    assert "Fails 3 of 3 limits" in failing[1]
    assert json.loads((own / "audit.json").read_text())["verdict"] == "fails"
    accuracy = json.loads((own / "audit.json").read_text())["results"]["pairs"]["columns"]["policy"]["accuracy"]
    assert accuracy["low"] < accuracy["value"]
    assert run("audit", own, "--min-accuracy", accuracy["value"])[0] == 0
    confident = run("audit", own, "--min-accuracy", accuracy["value"], "--confident")
    assert confident[0] == 1
    assert "Fails 1 of 1 limits, to be kept by the whole interval" in confident[1]
    (own / "adapters" / "default" / "adapter_model.safetensors").write_bytes(b"damaged")
    code, _, complaints = run("audit", own, "--max-kl", 50)
    assert code == 2
    assert len(complaints) == 1
    assert json.loads((own / "audit.json").read_text())["verdict"] == "fails"  # as it was


@pytest.mark.parametrize(
    ("command", "option", "written", "code"),
    [
        ("audit", "--output-dir", "audit.html", 0),
        ("eval", "--output", "", 1),
        ("compare", "--output-dir", "compare.html", 1),
    ],
)
def test_results_are_written_and_a_verdict_stands_where_nobody_reads(
    run, adapter, tmp_path, monkeypatch, command, option, written, code
):
    """As in `| true`: the pipe's reader is gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        arguments = ["--no-card", "--max-kl", 50] if command == "audit" else []
        assert run(command, adapter, *arguments, option, tmp_path / "out")[0] == code
    assert (tmp_path / "out" / written).is_file()


def test_interpolated_weights_are_measured_as_such(run, own, tmp_path):
    def kl(*options):
        code, printed, _ = run("eval", own, *options, "--output", tmp_path / "eval.json")
        assert code == 0, printed
        return json.loads((tmp_path / "eval.json").read_text())["results"]["neutral"]["columns"]["policy"]["kl"]

    weights = ("--interpolation", "weights")
    assert kl("--strength", 0.5) != kl("--strength", 0.5, *weights)  # nor taken from what is stored
    assert kl() == kl(*weights)
    assert run("audit", own, "--strength", 0.5, *weights)[0] == 0
    assert json.loads((own / "audit.json").read_text())["settings"]["interpolation"] == "weights"
    for page in ("audit.html", "README.md"):
        assert "at strength 0.5, weights interpolated" in (own / page).read_text()
    code, printed, _ = run("sweep", own, "--strengths", "0.5,1", *weights)
    assert code == 0
    assert "Gain and drift along the dial, weights interpolated" in printed


def test_a_threshold_is_measured_and_told(run, own, tmp_path):
    def kl(*options):
        code, printed, _ = run("eval", own, *options, "--output", tmp_path / "eval.json")
        assert code == 0, printed
        return json.loads((tmp_path / "eval.json").read_text())["results"]["neutral"]["columns"]["policy"]["kl"][
            "value"
        ]

    plain = kl()
    assert 0 == kl("--threshold", 1e6) < kl("--threshold", plain / 2) < plain == kl("--threshold", 0)
    assert run("audit", own, "--threshold", plain / 2)[0] == 0
    assert json.loads((own / "audit.json").read_text())["settings"]["min_kl"] == plain / 2
    for page in ("audit.html", "README.md"):
        assert f"at strength 1, threshold {plain / 2:g} nats" in (own / page).read_text()
    code, printed, _ = run("sweep", own, "--strengths", "0.5,1", "--threshold", plain / 2)
    assert code == 0
    assert f"Gain and drift along the dial, threshold {plain / 2:g} nats" in printed.replace("\n", " ")


def test_a_certificate_says_all_that_the_dial_was_set_to(run, own):
    """A cap may be all that keeps the limits."""
    dial = ("--cap", 0.001, "--decay", 0.5, "--adapter-weights", "default=0.5")
    assert run("audit", own, *dial)[0] == 0
    for page in ("audit.html", "README.md"):
        assert "at strength 1, weights default=0.5, decay 0.5, KL cap 0.001 nats" in (own / page).read_text()
    code, printed, _ = run("sweep", own, "--strengths", "0.5,1", "--adapter-weights", "default=0.5")
    assert code == 0
    assert "Gain and drift along the dial, weights default=0.5" in printed.replace("\n", " ")
    assert json.loads((own / "sweep.json").read_text())["dial"]["adapter_weights"] == {"default": 0.5}


def test_a_card_names_only_files_that_are_beside_it(run, own, tmp_path):
    assert run("audit", own, "--output-dir", tmp_path / "elsewhere")[0] == 0
    assert "`audit.json`" not in (own / "README.md").read_text()
    assert run("audit", own)[0] == 0
    assert "`audit.json` has every figure" in (own / "README.md").read_text()


def test_weights_that_are_no_policy_are_not_interpolated(run, base, tmp_path):
    folder = write_adapter(tmp_path / "apart", base, config=QAdapterConfig(alpha_0=0.5))
    for command in ("eval", "audit", "sweep", "compare"):
        code, _, complaints = run(command, folder, "--interpolation", "weights")
        assert code == (2 if command == "audit" else 1)
        assert len(complaints) == 1
        assert "not of the residual form with alpha_0 = alpha_tilde" in complaints[0]


def test_audit_writes_its_certificate_into_the_card(run, own, tmp_path):
    (own / "README.md").write_text("# Mine\n")
    run("audit", own, "--output-dir", tmp_path / "evidence")
    card = (own / "README.md").read_text()
    assert "# Mine" in card
    assert BEGIN in card
    assert (tmp_path / "evidence" / "audit.html").exists()
    assert not (own / "audit.json").exists()
    run("audit", own, "--no-card", "--max-kl", 50)
    assert (own / "README.md").read_text() == card


def test_the_new_card_of_a_plain_lora_does_not_call_it_an_adapter_folder(run, adapter, base, tmp_path):
    lora = shutil.copytree(adapter / "adapters" / "default", tmp_path / "lora")
    (lora / "README.md").unlink(missing_ok=True)
    assert run("audit", lora, "--base-model", base)[0] == 0
    card = (lora / "README.md").read_text()
    assert "library_name: peft" in card
    assert "AutoPeftModelForCausalLM.from_pretrained" in card
    assert "QAdapterForCausalLM" not in card


def test_an_audited_folder_still_loads(run, own):
    run("audit", own)
    assert run("audit", own)[0] == 0


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("audit", ["--max-kl", "-1"], "--max-kl = -1.0: must be 0 or above"),
        ("audit", ["--max-kl", "nan"], "--max-kl = nan"),
        ("audit", ["--max-drop", "lambada"], "write TASK=POINTS"),
        ("audit", ["--min-accuracy", "70"], "--min-accuracy = 70.0: must be between 0 and 1"),
        ("audit", ["--strength", "nan"], "strength = nan"),
        ("audit", ["--judge", "rule:nothing"], "'nothing' is unknown"),
        ("audit", ["--dataset", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ("audit", ["--neutral-text", "nowhere.txt"], "nowhere.txt cannot be read"),
        ("audit", ["--adapter-weights", "x"], "write NAME=WEIGHT"),
        ("audit", ["--adapter-weights", "x=1"], "the adapters are ['default']"),
        ("audit", ["--max-pairs", "0"], "max_pairs = 0: must be at least 1"),
        ("audit", ["--max-length", "1"], "max_length = 1: must be at least 2"),
        ("eval", ["--seed", "-1"], "seed = -1: must be between 0 and 4294967295"),
        ("sweep", ["--strengths", "a"], "--strengths 'a': give numbers"),
        ("sweep", ["--strengths", "0"], "names the base only"),
        ("sweep", ["--max-drop", "1", "--max-drop", "2"], "one number for all benchmarks"),
        ("sweep", ["--max-drop", "x"], "write POINTS or TASK=POINTS"),
        ("sweep", ["--max-drop", "1"], "--max-drop needs benchmarks"),
        ("sweep", ["--interpolation", "weights", "--decay", "0.9"], "a decay cannot be used with interpolation"),
        ("sweep", ["--interpolation", "weights", "--alpha-0", "0.2"], "alpha_0 = 0.2 mixes logits"),
        ("sweep", ["--threshold", "-1"], "--threshold -1: must be a finite number of nats, 0 or above"),
        ("sweep", ["--cap", "-1"], "--cap -1: must be a finite number of nats, 0 or above"),
        ("sweep", ["--judge", "rule:json"], "a sweep generates no answers to judge"),
        ("compare", ["--strengths", "0"], "--strengths '0' names the base only"),
        ("compare", ["--output-dir", __file__], "test_commands.py is a file. Choose another one"),
        ("eval", ["--output", "."], "--output . is a folder: name a file in it"),
        ("compare", ["--strengths", "1:2"], "--strengths '1:2': give numbers"),
        ("eval", ["--tasks-from", "nowhere", "--tasks", "arc"], "nowhere: there is no such folder"),
        ("eval", ["--columns", "prompt"], "write NAME=YOUR_COLUMN"),
    ],
)
def test_wrong_arguments_get_one_clear_line(run, adapter, monkeypatch, command, arguments, message):
    monkeypatch.setattr(benchmarks, "require_lm_eval", lambda: None)
    code, _, complaints = run(command, adapter, *arguments)
    assert code == (2 if command == "audit" else 1)
    assert len(complaints) == 1
    assert message in complaints[0]
    assert "Traceback" not in complaints[0]


def test_folders_that_are_not_there(run, tmp_path):
    for command, code in (("audit", 2), ("eval", 1), ("sweep", 1), ("compare", 1)):
        found, _, (complaint,) = run(command, tmp_path / "nowhere")
        assert found == code
        assert "nowhere" in complaint


def test_limits_on_benchmarks_need_lm_eval(run, adapter, monkeypatch):
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    code, _, (complaint,) = run("eval", adapter, "--tasks", "arc_easy")
    assert code == 1
    assert "pip install 'qadapter[eval]'" in complaint


def test_budgets_fill_in_what_is_not_given():
    from qadapter.cli.measuring import workload_of
    from qadapter.cli.options import add_workload_options

    parser = cli.command_parser("eval", "")
    add_workload_options(parser)
    quick = workload_of(parser.parse_args(["--budget", "quick", "--prompts", "5"]))
    assert (quick.max_pairs, quick.prompts) == (60, 5)
    assert workload_of(parser.parse_args(["--budget", "full"])).max_pairs is None
