"""Local files of benchmarks become tasks and groups of lm-eval; folders without any and damaged files are refused."""

from pathlib import Path

import pytest
from benchmark_tasks import arc_folder, write_rows
from models import tiny_tokenizer

from qadapter import QAdapterError

pytest.importorskip("lm_eval", reason="needs the extra eval")

from qadapter.evaluation.forgetting import run_tasks
from qadapter.evaluation.harness import load_tasks
from qadapter.evaluation.tasks import local_tasks

SHARED = Path(__file__).parents[4] / "shared" / "data" / "bench"


def subject_rows(count):
    return [
        {"subject": subject, "question": f"Q{index}?", "choices": ["a", "b", "c", "d"], "gold": index % 4}
        for subject in ("high school art", "law/tax")
        for index in range(count)
    ]


def test_files_become_tasks_and_groups(policy, tmp_path):
    arc_folder(tmp_path, ".jsonl.gz")
    write_rows(tmp_path / "mmlu_test.jsonl", subject_rows(6))
    write_rows(tmp_path / "mmlu_dev.jsonl.gz", subject_rows(5))
    folder = local_tasks(tmp_path)
    assert local_tasks(tmp_path) == folder
    assert sorted(path.name for path in folder.glob("*.yaml")) == [
        "arc_easy.yaml", "mmlu.yaml", "mmlu_high_school_art.yaml", "mmlu_law_tax.yaml",
    ]  # fmt: skip
    result = run_tasks(policy, tiny_tokenizer(), ["arc_easy", "mmlu"], {"p": {}}, limit=4, include_path=folder)["tasks"]
    assert list(result) == ["arc_easy", "mmlu_high_school_art", "mmlu_law_tax", "mmlu"]
    assert result["arc_easy"]["n"] == 3
    assert "acc_norm" in result["arc_easy"]["other_metrics"]
    assert result["mmlu"]["n"] == 8
    assert result["mmlu"]["subtasks"] == ["mmlu_high_school_art", "mmlu_law_tax"]
    assert result["mmlu_law_tax"]["shots"] == 5
    for column in ("base", "p"):
        parts = [result[name]["columns"][column]["value"] for name in result["mmlu"]["subtasks"]]
        assert result["mmlu"]["columns"][column]["value"] == pytest.approx(sum(parts) / 2)
    by_path = run_tasks(policy, tiny_tokenizer(), [str(folder / "mmlu.yaml")], {"p": {}}, limit=4)["tasks"]
    assert by_path["mmlu"] == result["mmlu"]


def test_a_folder_whose_name_looks_like_a_pattern_is_read(policy, tmp_path):
    folder = tmp_path / "run [1] *"
    folder.mkdir()
    include = local_tasks(arc_folder(folder))
    result = run_tasks(policy, tiny_tokenizer(), ["arc_easy"], {"p": {}}, include_path=include)
    assert result["tasks"]["arc_easy"]["n"] == 3


def test_changed_files_become_new_tasks(tmp_path):
    before = local_tasks(arc_folder(tmp_path))
    write_rows(tmp_path / "lambada_test.jsonl", [{"query": "a b", "choices": ["c"]}])
    after = local_tasks(tmp_path)
    assert before != after
    assert (after / "lambada.yaml").is_file()


def test_folders_without_benchmarks_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(QAdapterError, match=r"holds no benchmark: looked for arc_easy_test, bbh"):
        local_tasks(tmp_path)
    (tmp_path / "bbh.jsonl").write_text('{"task": "t", "input": "i", "target": "t"}\n{"input": 1}\n')
    with pytest.raises(QAdapterError, match=r"bbh.jsonl, line 2: must be a JSON object with the field 'task'"):
        local_tasks(tmp_path, tmp_path / "into")
    assert [path.name for path in tmp_path.iterdir()] == ["bbh.jsonl"]


def test_a_subject_without_examples_is_not_left_out_in_silence(tmp_path):
    write_rows(tmp_path / "mmlu_test.jsonl", subject_rows(2))
    write_rows(tmp_path / "mmlu_dev.jsonl", [row for row in subject_rows(5) if row["subject"] == "law/tax"])
    with pytest.raises(QAdapterError, match=r"mmlu_dev.jsonl: no row has the subject high school art"):
        local_tasks(tmp_path)


def test_shots_of_the_same_file_never_hold_the_question(tmp_path):
    rows = [{"task": "t", "input": f"question {index}", "target": f"{index}"} for index in range(5)]
    write_rows(tmp_path / "bbh.jsonl", rows)
    (task,) = load_tasks(["bbh_t"], local_tasks(tmp_path)).tasks.values()
    for seed in range(20):
        task.set_fewshot_seed(seed)
        for row in rows:
            prompt = task.fewshot_context(row, 3)
            assert prompt.count(row["input"]) == 1
            assert prompt.endswith(f"Question: {row['input']}\nAnswer:")


@pytest.mark.parametrize(
    ("answer", "score"),
    [("2 + 2 = 4\n#### 1,234", 1.0), ("#### 1234\n", 1.0), ("1234", 0.0), ("#### 12", 0.0), ("#### $1234", 0.0)],
)
def test_gsm8k_reads_the_number_behind_the_mark(tmp_path, answer, score):
    write_rows(tmp_path / "gsm8k_test.jsonl", [{"question": "How many?", "answer": "Many.\n#### 1,234"}])
    (task,) = load_tasks(["gsm8k"], local_tasks(tmp_path)).tasks.values()
    task.set_fewshot_seed(0)
    task.build_all_requests()
    (instance,) = task.instances
    assert instance.args[0].count("#### ") == 4
    instance.resps = [answer]
    task.apply_filters()
    assert task.process_results(instance.doc, [instance.filtered_resps["none"]]) == {"exact_match": score}


NEEDED = {
    "arc_easy": ("acc", False), "piqa": ("acc", False), "sciq": ("acc", False), "lambada": ("acc", False),
    "mmlu_anatomy": ("acc", False), "gsm8k": ("exact_match", True), "bbh_navigate": ("exact_match", True),
}  # fmt: skip


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared benchmark files are not on this machine")
def test_the_benchmark_files_run_offline(policy):
    folder = local_tasks(SHARED)
    assert len(list(folder.glob("mmlu_*.yaml"))) == 57
    assert len(list(folder.glob("bbh_*.yaml"))) == 27
    result = run_tasks(policy, tiny_tokenizer(), list(NEEDED), {"p": {}}, limit=1, include_path=folder)["tasks"]
    assert {name: (figures["metric"], "answers" in figures) for name, figures in result.items()} == NEEDED
    assert all(figures["n"] == 1 for figures in result.values())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared benchmark files are not on this machine")
def test_ifeval_is_checked_by_lm_evals_own_code(policy):
    for module in ("langdetect", "immutabledict"):
        pytest.importorskip(module, reason="needs lm-eval[ifeval]")
    nltk = pytest.importorskip("nltk", reason="needs lm-eval[ifeval]")
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        pytest.skip("NLTK's punkt_tab is not on this machine")
    result = run_tasks(policy, tiny_tokenizer(), ["ifeval"], {"p": {}}, limit=2, include_path=local_tasks(SHARED))[
        "tasks"
    ]
    assert result["ifeval"]["metric"] == "prompt_level_strict_acc"
