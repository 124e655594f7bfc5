"""Settings of `qadapter train` from a YAML file, a preset and the command line: which one wins, and what is refused."""

import json

import pytest
from commands import adapter_settings, assert_refused, qadapter, succeeded

from qadapter.cli.train import parse
from qadapter.config import PRESETS, QAdapterConfig


@pytest.fixture
def train_yaml(base, pairs, tmp_path):
    """Run `qadapter train --config` with a file of these lines besides model, dataset and one quick step."""
    common = f"model: {base}\ndataset: {pairs}\nmax_steps: 1\nuse_cpu: true\n"

    def run(text, *options, common=common):
        (tmp_path / "run.yaml").write_text(common + text, encoding="utf-8")
        return qadapter("train", "--config", tmp_path / "run.yaml", "--output-dir", tmp_path / "run", *options)

    return run


@pytest.fixture
def settings(train_yaml, tmp_path):
    """The method's settings and rank of the adapter that training with this YAML gives."""

    def run(text, *options):
        succeeded(train_yaml(text, *options))
        return adapter_settings(tmp_path / "run")

    return run


@pytest.fixture
def training_arguments(train_yaml, tmp_path):
    """The training arguments that were in force."""

    def run(text, *options):
        succeeded(train_yaml(text, *options))
        return json.loads((tmp_path / "run" / "training_arguments.json").read_text())

    return run


# -- which one wins ------------------------------------------------------------------------------------------------


def test_values_of_the_file_are_used(settings):
    found = settings("beta: 3\nalpha_tilde: 0.25\nlora_r: 3\nlength_normalised: true\n")
    assert (found["beta"], found["alpha_tilde"], found["rank"], found["length_normalised"]) == (3.0, 0.25, 3, True)


def test_what_nobody_sets_has_its_default(settings):
    found = settings("beta: 3\n")
    defaults = QAdapterConfig(beta=3).to_dict()
    assert {name: found[name] for name in defaults} == defaults


def test_the_authors_preset_is_the_papers_numbers(settings):
    found = settings("", "--preset", "authors")
    paper = {
        "parametrisation": "logits",
        "alpha_tilde": 1.0,
        "alpha_0": 0.01,
        "gamma": 1.0,
        "beta": 0.1,
        "length_normalised": True,
        "discount_floor": 0.0,
    }
    assert {name: found[name] for name in paper} == paper
    assert PRESETS["authors"] == paper
    assert QAdapterConfig.preset("undiscounted") == QAdapterConfig(gamma=1.0, discount_floor=0.0)


def test_the_file_beats_the_preset(settings):
    found = settings("preset: authors\nbeta: 5\n")
    assert (found["beta"], found["alpha_tilde"]) == (5.0, 1.0)


def test_the_command_line_beats_the_file_and_the_preset(settings):
    found = settings("preset: authors\nbeta: 5\nlora_r: 3\n", "--beta", "7", "--alpha-0=0.5", "--lora-r", "2")
    assert (found["beta"], found["alpha_0"], found["rank"], found["alpha_tilde"]) == (7.0, 0.5, 2, 1.0)


def test_the_command_lines_preset_beats_the_files(settings):
    assert settings("preset: authors\n", "--preset", "default")["parametrisation"] == "residual"


# -- spelling and types --------------------------------------------------------------------------------------------


def test_names_may_have_dashes_or_underscores(settings):
    found = settings("alpha-tilde: 0.3\nalpha_0: 0.3\nlora-r: 3\n", "--label_smoothing", "0.1", "--lora-alpha", "4")
    assert (found["alpha_tilde"], found["alpha_0"], found["rank"], found["label_smoothing"]) == (0.3, 0.3, 3, 0.1)


@pytest.mark.parametrize(("written", "value"), [("1e-4", 1e-4), ("2.5E-5", 2.5e-5), ("'0.5'", 0.5), ("1", 1.0)])
def test_numbers_may_be_written_in_any_way(training_arguments, written, value):
    assert training_arguments(f"learning_rate: {written}\n")["learning_rate"] == value


@pytest.mark.parametrize("written", ["false", "no", "'false'", "off"])
def test_false_may_be_written_in_any_way(training_arguments, written):
    assert training_arguments(f"average_tokens_across_devices: {written}\n")["average_tokens_across_devices"] is False


def test_a_bare_no_is_a_strategys_name(training_arguments, tmp_path):
    assert training_arguments("save_strategy: no\n")["save_strategy"] == "no"
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_lists_may_be_lists_or_single_values(settings):
    assert settings("lora_target_modules: [q_proj, v_proj]\n")["modules"] == 4
    assert settings("lora_target_modules: q_proj\ninclude_for_metrics: [loss]\noverwrite: true\n")["modules"] == 2


def test_entries_with_values_may_be_a_mapping(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: builtin\ndataset: {a.jsonl: 0.7, owner/b: 0.3}\ncolumns: {prompt: q, chosen: yes_answer}\n"
    )
    options = ["--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "run")]
    data = parse(options).data
    assert data.dataset == ["a.jsonl=0.7", "owner/b=0.3"]
    assert data.columns == ["prompt=q", "chosen=yes_answer"]


def test_numbers_within_an_option_are_numbers_too(tmp_path):
    nested = "{min_lr: 1e-5, list: [2.5E+3, -.5e1], inner: {name: 1e-5 or so, id: e5, text: '7'}}"
    (tmp_path / "run.yaml").write_text(f"model: builtin\ndataset: builtin\nlr_scheduler_kwargs: {nested}\n")
    training = parse(["--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "run")]).training
    inner = {"name": "1e-5 or so", "id": "e5", "text": "7"}
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5, "list": [2500.0, -5.0], "inner": inner}


def test_null_takes_a_limit_away(train_yaml, write_pairs, long_base):
    long = write_pairs([{"prompt": "x" * 1100, "chosen": "a", "rejected": "b"}])
    options = ("--model", long_base, "--dataset", long, "--overwrite")
    cut, whole = (train_yaml(f"max_length: {limit}\n", *options) for limit in ("1024", "null"))
    assert "1 prompts truncated" in cut.err
    assert whole == (0, whole.out, "")


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("alpha_tild: 0.3\n", r"run.yaml: unknown key 'alpha_tild'. Did you mean 'alpha_tilde'\?"),
        ("lora-rank: 3\n", r"unknown key 'lora_rank'. Did you mean 'lora_r"),
        ("dataset_name: x\n", r"unknown key 'dataset_name'. Did you mean 'dataset'\?"),
        ("xyzzy: 3\n", r"unknown key 'xyzzy'\. See qadapter train --help"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("help: true\n", "unknown key 'help'"),
        ("beta: 1\nbeta: 2\n", "'beta' is there 2 times: keep one"),
        ("lora_r: 1\nlora-r: 2\n", "'lora_r' is there 2 times: keep one"),
        ("columns: {chosen: a, chosen: b}\n", "run.yaml: columns: 'chosen' is there 2 times: keep one"),
        ("columns: [chosen=a, chosen=b]\n", "--columns names 'chosen' twice: keep one"),
        ("beta: many\n", "beta = 'many' has the wrong type"),
        ("beta: [1, 2]\n", r"beta = \[1, 2\] has the wrong type"),
        ("beta: {a: 1}\n", r"beta = {'a': 1} has the wrong type"),
        ("learning_rate: true\n", "learning_rate = True has the wrong type"),
        ("learning_rate:\n", "learning_rate = None has the wrong type"),
        ("logging_steps: .nan\nmax_grad_norm: x\n", "max_grad_norm = 'x' has the wrong type"),
        ("lora_r: 2.5\n", "lora_r = 2.5 has the wrong type"),
        ("columns: {prompt: [q]}\n", r"columns = {'prompt': \['q'\]} has the wrong type"),
        ("lora_target_modules: {q_proj: 1}\n", "lora_target_modules = {'q_proj': 1} has the wrong type"),
        ("lora_target_modules: [q_proj, [v_proj]]\n", "lora_target_modules = .* has the wrong type"),
        ("length_normalised: maybe\n", "length_normalised = 'maybe' has the wrong type"),
        ("eval_strategy: sometimes\n", "eval_strategy = 'sometimes': choose one of no, steps, epoch"),
        ("preset: author\n", "preset 'author' is unknown: choose one of default, undiscounted, kl, authors"),
        ("beta: [1\n", "run.yaml is not valid YAML"),
    ],
)
def test_a_bad_line_is_one_clear_error(train_yaml, tmp_path, text, match):
    assert_refused(train_yaml(text), match, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dataset_that_is_named_twice_in_a_mapping_is_refused(train_yaml):
    run = train_yaml("", common="dataset: {a.jsonl: 1, b-c.jsonl: 1, b_c.jsonl: 1, a.jsonl: 2}\n")
    assert_refused(run, "run.yaml: dataset: 'a.jsonl' is there 2 times: keep one")


@pytest.mark.parametrize("text", ["", "- model\n- dataset\n", "model\n"])
def test_a_file_that_is_no_mapping_is_refused(train_yaml, text):
    assert_refused(train_yaml(text, common=""), "run.yaml must hold options as `name: value` lines")


def test_a_missing_file_is_named(tmp_path):
    outcome = qadapter("train", "--config", tmp_path / "none.yaml", "--output-dir", tmp_path / "run")
    assert_refused(outcome, r"--config \S+none.yaml: No such file or directory")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert_refused(qadapter("train", "--config", tmp_path / "run.yaml"), "run.yaml is not valid YAML: 'utf-8' codec")


def test_a_huge_file_is_not_read(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"#" * (2**20 + 1))
    assert_refused(qadapter("train", "--config", tmp_path / "run.yaml"), "1048577 bytes; at most 1048576 are read")


@pytest.mark.parametrize(
    ("name", "match"),
    [("model", "--model is missing"), ("dataset", "--dataset is missing")],
)
def test_what_is_needed_and_missing_is_named(train_yaml, base, pairs, name, match):
    given = {"model": base, "dataset": pairs}
    common = "".join(f"{key}: {value}\n" for key, value in given.items() if key != name)
    assert_refused(train_yaml("", common=common), match)


def test_a_missing_output_folder_is_named(base, pairs):
    assert_refused(qadapter("train", "--model", base, "--dataset", pairs), "--output-dir is missing: --output-dir DIR")
