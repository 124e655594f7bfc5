"""lm-eval's own tasks by their names, over rows of our own in the shape of each data set: no hub is needed."""

import json
from functools import cache
from pathlib import Path

import datasets
import pytest
from models import tiny_base, tiny_policy, tiny_tokenizer

from qadapter.errors import ConfigError

pytest.importorskip("lm_eval", reason="needs the extra eval")

import lm_eval.tasks

from qadapter.evaluation import harness
from qadapter.evaluation.benchmarks import Benchmarks
from qadapter.evaluation.columns import Column
from qadapter.evaluation.forgetting import run_loaded
from qadapter.evaluation.gate import Limits, check
from qadapter.evaluation.harness import load_tasks
from qadapter.evaluation.part_store import PartStore
from qadapter.evaluation.progress import silent
from qadapter.evaluation.subjects import Subject

LETTERS = ["A", "B", "C", "D"]
CHOICES = ["one", "two", "three", "four"]
# A row in the shape of each data set that the tasks below read; {n} is its number.
ROWS = {
    "cais/mmlu": {"question": "Q {n}?", "subject": "anatomy", "choices": CHOICES, "answer": 1},
    "TIGER-Lab/MMLU-Pro": {
        "question_id": 1, "question": "Q {n}?", "options": CHOICES, "answer": "B", "answer_index": 1,
        "cot_content": "A: Let's think step by step. The answer is (B).", "category": "law", "src": "",
    },
    "SaylorTwift/bbh": {"input": "Not True is {n}?", "target": "False"},
    "openai/gsm8k": {"question": "How many, {n}?", "answer": "Many.\n#### 4"},
    "google/IFEval": {
        "key": 1, "prompt": "Say {n} without commas.", "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}],
    },
    "allenai/ai2_arc": {
        "id": "{n}", "question": "Q {n}?", "choices": {"text": CHOICES, "label": LETTERS}, "answerKey": "C",
    },
    "Rowan/hellaswag": {
        "ind": 1, "activity_label": "Cooking", "ctx_a": "A cook {n}.", "ctx_b": "he", "ctx": "", "endings": CHOICES,
        "label": "2", "source_id": "", "split": "", "split_type": "",
    },
    "EleutherAI/lambada_openai": {"text": "a text {n} that ends with a word"},
    "cimec/lambada": {"text": "a text {n} that ends with a word", "domain": ""},
}  # fmt: skip
SPLITS = ("train", "validation", "test", "dev")


SUBJECTS = ("biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history",
            "law", "math", "other", "philosophy", "physics", "psychology")  # fmt: skip
FOLDERS = ("mmlu/default", "mmlu_pro", "bbh/cot_fewshot", "gsm8k", "arc", "hellaswag", "lambada", "ifeval")


def rows_of(name, count=6):
    """Rows of a data set that differ in their number; MMLU-Pro's tasks pick theirs by category."""
    rows = [json.loads(json.dumps(ROWS[name]).replace("{n}", str(index))) for index in range(count)]
    if "category" not in ROWS[name]:
        return rows
    return [{**row, "category": category} for row in rows for category in SUBJECTS]


@pytest.fixture(autouse=True)
def stock(monkeypatch):
    """lm-eval's own folders of the tasks below: reading all of its folders takes fifteen seconds."""
    folders = [Path(lm_eval.tasks.__file__).parent / folder for folder in FOLDERS]

    @cache
    def manager(own):
        return harness.TaskManager(include_path=[*own, *folders], include_defaults=False)

    monkeypatch.setattr(harness, "_with_stock_tasks", manager)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(tiny_base(max_position_embeddings=1024))


@pytest.fixture
def hub(monkeypatch):
    """Our rows in place of the hub's; the data sets that were asked for."""
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append(path)
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows_of(path)) for split in SPLITS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    return asked


# name: (data sets that it reads, headline metric, tasks in it)
NAMES = {
    "mmlu": ({"cais/mmlu"}, "acc", 57),
    "mmlu_pro": ({"TIGER-Lab/MMLU-Pro"}, "exact_match,custom-extract", 14),
    "bbh": ({"SaylorTwift/bbh"}, "exact_match,get-answer", 27),
    "gsm8k": ({"openai/gsm8k"}, "exact_match,strict-match", 1),
    "ai2_arc": ({"allenai/ai2_arc"}, "acc", 2),
    "arc_challenge": ({"allenai/ai2_arc"}, "acc", 1),
    "hellaswag": ({"Rowan/hellaswag"}, "acc", 1),
    "lambada": ({"EleutherAI/lambada_openai", "cimec/lambada"}, "acc", 2),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_benchmarks_of_the_field_run_by_their_names(policy, hub, name):
    read, metric, count = NAMES[name]
    loaded = load_tasks([name])
    assert len(loaded.tasks) == count
    assert set(hub) == read
    few = dict(list(loaded.tasks.items())[:2])  # the others are alike
    groups = {name: list(few)} if name in loaded.groups else {}
    for task in few.values():
        if task.OUTPUT_TYPE == "generate_until":  # a token is a character here
            task.config.generation_kwargs["max_gen_toks"] = 4
    part = harness.LoadedTasks(few, groups, loaded.manager)
    figures = run_loaded(policy, tiny_tokenizer(), part, {"policy": {}}, limit=2)["tasks"]
    assert set(figures) == {*few, *groups}
    for own in figures.values():
        assert own["metric"] == metric
        assert set(own["columns"]) == {"base", "policy"}
    assert figures[name if groups else next(iter(few))]["n"] == 2 * len(few)


def test_ifeval_runs_or_says_before_the_first_answer_what_is_missing(policy, hub, monkeypatch):
    nltk = pytest.importorskip("nltk", reason="needs lm-eval[ifeval]")
    pytest.importorskip("langdetect", reason="needs lm-eval[ifeval]")
    monkeypatch.setattr(nltk, "download", lambda *names, **options: False)

    def missing(name, *rest):
        raise LookupError(name)

    with monkeypatch.context() as patch:
        patch.setattr(nltk.data, "find", missing)
        with pytest.raises(ConfigError, match="punkt_tab, which is not on this machine: run `python -m"):
            load_tasks(["ifeval"])
    monkeypatch.setattr(nltk.data, "find", lambda name, *rest: name)
    loaded = load_tasks(["ifeval"])
    loaded.tasks["ifeval"].config.generation_kwargs["max_gen_toks"] = 4
    figures = run_loaded(policy, tiny_tokenizer(), loaded, {"policy": {}}, limit=2)["tasks"]["ifeval"]
    assert figures["metric"] == "prompt_level_strict_acc"


def test_a_package_that_a_task_needs_is_named(hub, monkeypatch):
    def absent(self, names):
        raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    monkeypatch.setattr(harness.TaskManager, "load", absent)
    with pytest.raises(ConfigError, match=r"task ifeval needs the package langdetect.*pip install 'lm-eval\[ifeval\]'"):
        load_tasks(["ifeval"])


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def unreachable(*names, **options):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match="of hellaswag cannot be loaded: Couldn't reach 'Rowan/hellaswag' on the Hub"):
        load_tasks(["hellaswag"])


@pytest.mark.parametrize(("name", "similar"), [("MMLU-Pro", "mmlu_pro"), ("arc", "ai2_arc"), ("LAMBADA", "lambada")])
def test_names_as_papers_write_them_are_answered_with_lm_evals(name, similar):
    with pytest.raises(ConfigError, match=f"has no task '{name}' .similar: .*\\b{similar}\\b"):
        load_tasks([name])


# -- before anything is measured ---------------------------------------------------------------------------------------


def benchmarks_of(policy, folder, names=(), required=(), **changed):
    """Benchmarks of the policy, with a store in `folder`."""
    settings = {"limit": 2, "seed": 0, "chat_template": False, "shared": False} | changed
    subject, columns = Subject("tiny", policy, tiny_tokenizer()), [Column("policy")]
    store = PartStore(folder)
    return Benchmarks(subject, {}, columns, names, required, None, settings, store, silent)


def test_a_limit_on_a_tag_or_group_has_the_figures_of_all_its_tasks(policy, hub, tmp_path):
    results = benchmarks_of(policy, tmp_path, required=["lambada"]).results()
    assert list(results) == ["lambada_openai", "lambada_standard", "lambada"]
    assert results["lambada"]["n"] == 4
    (entry,) = check({"tasks": results}, "policy", Limits(max_drop={"lambada": 100.0}))
    assert entry["passes"]


def test_what_a_named_group_holds_is_not_run_twice(policy, hub, tmp_path):
    found = benchmarks_of(policy, tmp_path, ["ai2_arc"], ["arc_easy"])
    assert list(found.loaded) == ["ai2_arc"]


def test_stored_benchmarks_are_not_even_loaded(policy, hub, tmp_path):
    first = benchmarks_of(policy, tmp_path, ["arc_easy"]).results()
    hub.clear()
    again = benchmarks_of(policy, tmp_path, ["arc_easy"], ["arc_easy"])
    assert again.results() == first
    assert hub == []
    benchmarks_of(policy, tmp_path, ["arc_easy"], limit=3)
    assert hub != []


def test_a_limit_that_no_score_will_have_is_refused_at_once(policy, hub, tmp_path, monkeypatch):
    path = tmp_path / "own.yaml"
    path.write_text("task: mine\ninclude: " + str(Path(lm_eval.tasks.__file__).parent / "arc/arc_easy.yaml") + "\n")
    with pytest.raises(ConfigError, match="there is no score of that name; limit one of mine"):
        benchmarks_of(policy, tmp_path, required=[str(path)])
    with pytest.raises(ConfigError, match="has no task 'lambda'"):
        benchmarks_of(policy, tmp_path, required=["lambda"])
