"""The figures of a benchmark: paired differences, planted damage, progress, and what cannot be measured."""

import copy
import json

import pytest
import torch
from benchmark_tasks import (
    LENGTH,
    LETTERS,
    SUMS,
    arc_folder,
    jsonl_task,
    letter_rows,
    letter_task,
    sum_task,
    write_rows,
    writing_task,
)
from models import lora, tiny_base, tiny_policy, tiny_tokenizer, tiny_trainer

from qadapter import QAdapterConfig, QAdapterError
from qadapter.evaluation.intervals import mcnemar_exact

pytest.importorskip("lm_eval", reason="needs the extra eval")

from qadapter.evaluation import harness
from qadapter.evaluation.benchmarks import Benchmarks, state
from qadapter.evaluation.columns import Column
from qadapter.evaluation.forgetting import run_tasks
from qadapter.evaluation.harness import load_tasks
from qadapter.evaluation.part_store import PartStore
from qadapter.evaluation.progress import silent
from qadapter.evaluation.subjects import Subject
from qadapter.evaluation.tasks import local_tasks


def test_an_untouched_adapter_changes_no_benchmark(base, tmp_path):
    untouched = tiny_policy(base, config=QAdapterConfig(), trained=False)
    tasks = [sum_task(tmp_path), letter_task(tmp_path)]
    for figures in run_tasks(untouched, tiny_tokenizer(), tasks, {"policy": {}})["tasks"].values():
        difference = figures["differences"]["policy"]
        assert difference["value"] == 0
        assert difference["low"] < 0 < difference["high"]
        assert difference["mcnemar_p"] == 1


def test_planted_damage_is_found_where_it_is_and_only_there(tmp_path):
    """A base that knows sums and letters, and an adapter trained on pairs that prefer wrong sums."""
    damaged = broken_policy(tmp_path)
    figures = run_tasks(damaged, tiny_tokenizer(), [sum_task(tmp_path), letter_task(tmp_path)], {"policy": {}})["tasks"]
    assert figures["sums"]["columns"]["base"]["value"] > 0.9
    assert figures["letters"]["columns"]["base"]["value"] > 0.9
    broken, kept = (figures[task]["differences"]["policy"] for task in ("sums", "letters"))
    assert broken["high"] < 0
    assert broken["mcnemar_p"] < 0.001
    assert kept["low"] < 0 < kept["high"]
    assert kept["mcnemar_p"] > 0.05


def broken_policy(folder):
    tokenizer = tiny_tokenizer()

    def ids(text):
        return tokenizer(str(text))["input_ids"]

    facts = [*SUMS, *LETTERS]
    learned = tiny_base(max_position_embeddings=LENGTH)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=5e-3)
    for question_length in [4, 2] * 60:
        rows = torch.tensor([ids(q) + ids(a) for q, a in facts if len(ids(q)) == question_length])
        labels = rows.clone()
        labels[:, :question_length] = -100
        optimizer.zero_grad()
        learned(input_ids=rows, labels=labels).loss.backward()
        optimizer.step()
    pairs = [{"prompt_ids": ids(q), "chosen_ids": ids((s + 1) % 10), "rejected_ids": ids(s)} for q, s in SUMS]
    pairs += [
        {"prompt_ids": ids(q), "chosen_ids": ids(a), "rejected_ids": ids(chr(ord("a") + index))}
        for index, (q, a) in enumerate(LETTERS)
    ]
    policy = tiny_policy(learned.eval(), config=QAdapterConfig(beta=0.0), peft_config=lora(r=8), trained=False)
    tiny_trainer(
        policy, folder / "run", copy.deepcopy(pairs), max_steps=40, per_device_train_batch_size=16, learning_rate=1e-2,
        logging_strategy="no", report_to="none",
    ).train()  # fmt: skip
    return policy.eval()


def test_figures_are_plain_json_with_paired_intervals(policy, tmp_path):
    result = run_tasks(
        policy, tiny_tokenizer(), [sum_task(tmp_path)], {"p": {}, "q": {"strength": 2.0}}, limit=5, seed=2
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["settings"]["limit"] == 5
    figures = result["tasks"]["sums"]
    assert (figures["metric"], figures["n"], figures["shots"], figures["higher_is_better"]) == ("acc", 5, 0, True)
    assert list(figures["columns"]) == ["base", "p", "q"]
    assert list(figures["differences"]) == ["p", "q"]
    scores = figures["scores"]
    for name in ("p", "q"):
        low, value, high = (figures["differences"][name][key] for key in ("low", "value", "high"))
        assert low <= value <= high
        assert value == pytest.approx(sum(scores[name]) / 5 - sum(scores["base"]) / 5)
        assert figures["differences"][name]["mcnemar_p"] == mcnemar_exact(scores[name], scores["base"])


def test_progress_opens_a_bar_for_each_column_and_fills_it(policy, tmp_path, capsys):
    bars = {}

    def track(name, total):
        bars[name] = [total, 0]
        return lambda done: bars[name].__setitem__(1, bars[name][1] + done)

    tasks = [letter_task(tmp_path), writing_task(tmp_path)]
    run_tasks(policy, tiny_tokenizer(), tasks, {"p": {}}, progress=track)
    kinds = ("base: likelihoods", "base: answers", "p: likelihoods", "p: answers")
    assert list(bars) == [f"letters, {kind}" for kind in kinds]
    assert bars["letters, base: likelihoods"] == [len(LETTERS)] * 2
    assert bars["letters, p: answers"] == [7, 7]
    bars.clear()
    run_tasks(policy, tiny_tokenizer(), tasks, {"p": {}}, progress=track, shared=True)
    assert list(bars) == [f"letters, {kind}" for kind in ("all columns: likelihoods", "base: answers", "p: answers")]
    assert "Running" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["arc_eazy"]}, r"lm-eval has no task 'arc_eazy' \(similar: arc_easy"),
        ({"tasks": []}, "give at least one task"),
        ({"limit": 0}, "limit = 0: give at least one task, and at least one item"),
        ({"columns": {"p": {"temperature": 1.0}}}, r"column 'p' sets \['temperature'\]; the settings are strength"),
        ({"columns": {"p": {"strength": "much"}}}, "strength = 'much': must be a finite number"),
        ({"columns": {"p": {"adapter_weights": {"x": 1.0}}}}, r"adapter_weights names \['x'\]"),
        ({"columns": {"base": {"strength": 1.0}}}, "column 'base' is the base, strength 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(policy, tmp_path, change, message, monkeypatch):
    folder = local_tasks(arc_folder(tmp_path))
    arguments = {"tasks": ["arc_easy"], "columns": {"p": {}}, "limit": 1} | change
    # Reading lm-eval's own thousands of tasks takes ten seconds.
    monkeypatch.setattr(
        harness, "_with_stock_tasks", lambda folders: harness.TaskManager(include_path=folders, include_defaults=False)
    )
    with pytest.raises(QAdapterError, match=message):
        run_tasks(policy, tiny_tokenizer(), include_path=folder, **arguments)


def test_a_task_without_item_scores_is_refused_by_name(policy, tmp_path):
    task = jsonl_task(tmp_path, "perplexity", letter_rows(), """
output_type: loglikelihood
doc_to_text: query
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""")  # fmt: skip
    with pytest.raises(QAdapterError, match=r"task perplexity has no metric that is a mean .* only \['perplexity'\]"):
        load_tasks([task])  # before anything is measured


def group_of(folder, *tasks):
    """A task file of a group."""
    (folder / "both.yaml").write_text(f"group: both\ntask: [{', '.join(tasks)}]\n")
    return str(folder / "both.yaml")


def benchmarks_of(policy, tokenizer, folder, names, required=(), chat_template=False):
    settings = {"limit": 2, "seed": 0, "chat_template": chat_template, "shared": False}
    store = PartStore(folder / "parts")
    subject, columns = Subject("tiny", policy, tokenizer), [Column("p")]
    return Benchmarks(subject, {"adapter": 1}, columns, names, required, None, settings, store, silent)


def test_a_limit_on_a_group_without_a_figure_is_refused_before_anything_is_measured(policy, tmp_path):
    letter_task(tmp_path)
    writing_task(tmp_path)
    group = group_of(tmp_path, "letters", "writing")  # acc, exact_match
    with pytest.raises(QAdapterError, match="--max-drop both: .* limit one of letters, writing"):
        benchmarks_of(policy, tiny_tokenizer(), tmp_path, [group], ["both"])
    assert "letters" in benchmarks_of(policy, tiny_tokenizer(), tmp_path, [group], ["letters"]).results()


def test_a_chat_template_that_is_not_there_is_refused_before_anything_is_measured(policy, tmp_path):
    with pytest.raises(QAdapterError, match="the tokenizer has no chat template"):
        benchmarks_of(policy, tiny_tokenizer(template=None), tmp_path, [letter_task(tmp_path)], chat_template=True)


def test_a_changed_file_of_a_task_is_run_again(policy, tmp_path):
    """Its data, a task of its group."""
    group = group_of(tmp_path, "letters", "sums")
    letter_task(tmp_path)
    sum_task(tmp_path)

    def results():
        return benchmarks_of(policy, tiny_tokenizer(), tmp_path, [group]).results()

    assert {name: task["n"] for name, task in results().items()} == {"letters": 2, "sums": 2, "both": 4}
    write_rows(tmp_path / "letters.jsonl", letter_rows()[:1])
    assert results()["letters"]["n"] == 1
    definition = tmp_path / "sums.yaml"
    definition.write_text(definition.read_text().replace("metric: acc", "metric: acc_norm"))
    assert results()["sums"]["metric"] == "acc_norm"


def test_the_state_of_a_task_follows_what_it_includes_and_its_data(tmp_path):
    """Code beside an included file, a template that it includes, files of a pattern, files of local folders."""
    for name in ("own", "shared", "parts", "data", "more/deep"):
        (tmp_path / name).mkdir(parents=True)
    files = {
        "own/task.yaml": "include: ../shared/common.yaml\ndoc_to_text: What is a * b?\ndataset_kwargs:\n"
        f"  data_files: {{test: '{tmp_path}/parts/*.jsonl'}}\n  data_dir: ../data\n",
        "shared/common.yaml": "include: template_yaml\ndoc_to_target: !function code.target\n",
        "shared/template_yaml": f"include: ../own/task.yaml\ndataset_path: {tmp_path}/more\n",
        "shared/code.py": "",
        "parts/one.jsonl": "",
        "data/one.jsonl": "",
        "more/deep/one.parquet": "",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "parts" / "unnamed.txt").write_text("")
    _, _, found = state(str(tmp_path / "own" / "task.yaml"), None)
    assert {path for path, _ in found} == {str(tmp_path / name) for name in files}
    for name in files:
        (tmp_path / name).write_text(files[name] + "\n")
        (changed,) = set(map(tuple, state(str(tmp_path / "own" / "task.yaml"), None)[2])) - set(map(tuple, found))
        assert changed[0] == str(tmp_path / name)
        (tmp_path / name).write_text(files[name])
