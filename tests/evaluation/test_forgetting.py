"""Benchmarks through lm-eval: our path against its own, paired differences, planted damage, tasks over local files."""

import copy
import gzip
import itertools
import json
import random
from pathlib import Path

import datasets
import pytest
import torch
from models import lora, plain_peft, tiny_base, tiny_policy, tiny_tokenizer, tiny_trainer

from qadapter import QAdapterConfig, QAdapterError
from qadapter.evaluation.intervals import bootstrap_mean, mcnemar_exact
from qadapter.evaluation.resampling import paired_difference

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qadapter.evaluation import harness
from qadapter.evaluation.forgetting import local_tasks, run_tasks
from qadapter.evaluation.harness import PolicyLM, load_tasks

SHARED = Path(__file__).parents[3] / "shared" / "data" / "bench"
LENGTH = 4096  # positions of the tiny models: a token is a character here


@pytest.fixture(autouse=True)
def scratch_caches(tmp_path_factory, monkeypatch):
    # lm-eval describes the machine after each evaluation, by a dozen subprocesses.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)


# Questions that a small model can learn by heart, in the form of the benchmarks' files.
SUMS = [(f"{a}+{b}=", a + b) for a in range(6) for b in range(6) if a + b < 10]
LETTERS = [(f"{chr(code)}>", chr(code + 1)) for code in range(ord("a"), ord("z"))]


def sum_rows():
    return [{"query": q, "choices": [str((s + d) % 10) for d in range(4)], "gold": 0} for q, s in SUMS]


def letter_rows():
    return [{"id": i, "query": q, "choices": [a]} for i, (q, a) in enumerate(LETTERS)]


def letter_task(folder):
    """A task that scores by likelihood: is the next letter the likeliest?"""
    return jsonl_task(folder, "letters", letter_rows(), """
output_type: loglikelihood
doc_to_text: query
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""")  # fmt: skip


def sum_task(folder):
    return jsonl_task(folder, "sums", sum_rows(), """
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""")  # fmt: skip


def writing_task(folder, **generation):
    options = json.dumps({"until": ["~"], "max_gen_toks": 12, "do_sample": False} | generation)
    return jsonl_task(folder, "writing", letter_rows()[:7], f"""
output_type: generate_until
doc_to_text: query
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {options}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")  # fmt: skip


def jsonl_task(folder, name, rows, config):
    write_rows(folder / f"{name}.jsonl", rows)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    (folder / f"{name}.yaml").write_text(f"task: {name}\ntest_split: test\n{config}\n" + json_as_yaml(data))
    return str(folder / f"{name}.yaml")


def json_as_yaml(values):
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


@pytest.fixture(scope="module")
def base():
    return tiny_base(max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def policy(base):
    return tiny_policy(base)


# -- our path and lm-eval's own --------------------------------------------------------------------------------------


def test_numbers_of_the_base_equal_those_of_lm_evals_own_path(base, policy, tmp_path):
    tasks = [sum_task(tmp_path), letter_task(tmp_path), writing_task(tmp_path)]
    tokenizer = tiny_tokenizer()
    ours = run_tasks(policy, tokenizer, tasks, {"policy": {"strength": 1.0}}, batch_size=3)["tasks"]
    # The same tasks, but model and evaluation are lm-eval's alone.
    manager = load_tasks(tasks).manager
    lm = HFLM(pretrained=base, tokenizer=tiny_tokenizer(), batch_size=3)
    own = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    for task, metric in (("sums", "acc"), ("letters", "acc"), ("writing", "exact_match")):
        samples = sorted(own["samples"][task], key=lambda sample: sample["doc_id"])
        assert ours[task]["scores"]["base"] == [sample[metric] for sample in samples]
        assert ours[task]["columns"]["base"]["value"] == pytest.approx(own["results"][task][f"{metric},none"])
        assert ours[task]["n"] == len(samples)
    assert ours["writing"]["answers"]["base"] == [sample["resps"][0][0] for sample in own["samples"]["writing"]]


def test_likelihoods_of_strength_zero_equal_the_bare_base_bit_by_bit(base, policy):
    requests = [
        Instance("loglikelihood", {}, (question, f" {answer}"), index, ("t", index, 1))
        for index, (question, answer) in enumerate(SUMS)
    ]
    bare = HFLM(pretrained=base, tokenizer=tiny_tokenizer(), batch_size=4).loglikelihood(requests)
    lm = PolicyLM(policy, tiny_tokenizer(), 4, lambda name, total: lambda done: None)
    with policy.defaults(0.0, policy.adapter_weights, None):
        assert lm.loglikelihood(requests) == bare
    assert lm.loglikelihood(requests) != bare  # the policy's own


def test_generating_tasks_sample_from_the_policy_not_from_its_lora_or_base(base, policy, tmp_path):
    task, tokenizer = writing_task(tmp_path), tiny_tokenizer()
    answers = run_tasks(policy, tokenizer, [task], {"policy": {}, "half": {"strength": 0.5}})["tasks"]["writing"][
        "answers"
    ]
    for column, strength in (("base", 0.0), ("policy", 1.0), ("half", 0.5)):
        expected = []
        for question, _ in LETTERS[:7]:
            ids = torch.tensor([tokenizer(question)["input_ids"]])
            output = policy.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, strength=strength
            )
            expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split("~")[0])
        assert answers[column] == expected
    plain = HFLM(pretrained=plain_peft(base, policy).get_base_model(), tokenizer=tokenizer, batch_size=8)
    samples = simple_evaluate(model=plain, tasks=[task], task_manager=load_tasks([task]).manager)["samples"]["writing"]
    lora_answers = [sample["resps"][0][0] for sample in samples]
    assert all(a != b for a, b in zip(answers["policy"], lora_answers, strict=True))
    assert all(a != b for a, b in zip(answers["policy"], answers["base"], strict=True))
    assert answers["half"] != answers["policy"]


def test_the_same_call_gives_the_same_numbers_even_when_sampling(policy, tmp_path):
    task = writing_task(tmp_path, do_sample=True, temperature=1.0)
    calls = [run_tasks(policy, tiny_tokenizer(), [task], {"p": {}}, seed=seed) for seed in (3, 3, 4)]
    assert calls[0] == calls[1]
    assert calls[0]["tasks"]["writing"]["answers"] != calls[2]["tasks"]["writing"]["answers"]


def test_model_and_tokenizer_are_left_as_they_were(base, tmp_path):
    policy, tokenizer = tiny_policy(base).train(), tiny_tokenizer()
    tokenizer.pad_token = None
    policy.strength, policy.max_kl = 0.7, 0.1
    weights = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    run_tasks(policy, tokenizer, [letter_task(tmp_path)], {"p": {"strength": 0.2, "max_kl": 0.01}}, limit=2)
    assert policy.training
    assert (policy.strength, policy.max_kl, policy.adapter_weights) == (0.7, 0.1, {"default": 1.0})
    assert tokenizer.pad_token is None
    assert all(torch.equal(parameter, weights[name]) for name, parameter in policy.named_parameters())


def test_every_setting_of_a_column_reaches_the_model(policy, tmp_path):
    columns = {
        "zero": {"strength": 0.0},
        "weightless": {"adapter_weights": {"default": 0.0}},
        "capped": {"max_kl": 0.0},
        "full": {"strength": 1.0},
    }
    answers = run_tasks(policy, tiny_tokenizer(), [writing_task(tmp_path)], columns)["tasks"]["writing"]["answers"]
    assert answers["zero"] == answers["weightless"] == answers["capped"] == answers["base"]
    assert answers["full"] != answers["base"]


def test_one_pass_for_all_columns_gives_the_same_scores(policy, tmp_path):
    tasks = [sum_task(tmp_path), letter_task(tmp_path), writing_task(tmp_path)]
    columns = {str(strength): {"strength": strength} for strength in (0.5, 1.0, 1.5)}
    apart, shared = (
        run_tasks(policy, tiny_tokenizer(), tasks, columns, limit=9, shared=shared)["tasks"] for shared in (False, True)
    )
    assert shared == apart


# -- the figures -----------------------------------------------------------------------------------------------------


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
        run_tasks(policy, tiny_tokenizer(), [task], {"p": {}}, limit=2)


# -- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "gained", "lost"), [(20, 0.02, 0.06), (40, 0.0, 0.05), (40, 0.1, 0.3), (150, 0.05, 0.15)]
)
def test_paired_intervals_of_rates_cover_the_truth(n, gained, lost):
    generator, covered = random.Random(0), 0
    for _ in range(2000):
        changes = [generator.random() for _ in range(n)]
        base = [
            0 if change < gained else 1 if change < gained + lost else generator.choice((0, 1)) for change in changes
        ]
        policy = [1 - b if change < gained + lost else b for b, change in zip(base, changes, strict=True)]
        interval = paired_difference(policy, base)
        covered += interval.low <= gained - lost <= interval.high
    assert covered / 2000 > 0.94  # 0.95 less three standard errors of the simulation is 0.935


def test_paired_intervals_of_other_scores_cover_the_truth():
    generator, covered = random.Random(0), 0
    for seed in range(200):
        base = [generator.gauss(0, 3) for _ in range(50)]  # the items differ far more than the models
        policy = [b + generator.gauss(0.3, 1) for b in base]
        interval = paired_difference(policy, base, seed)
        covered += interval.low <= 0.3 <= interval.high
        assert interval.high - interval.low < 1
    assert covered / 200 > 0.9  # the percentile bootstrap has about 0.94 at n = 50; two standard errors are 0.03


def test_paired_difference_of_equal_scores_does_not_claim_certainty():
    interval = paired_difference([1, 0, 1] * 10, [1, 0, 1] * 10)
    assert interval.value == 0
    assert interval.low == pytest.approx(-interval.high)
    assert 0.01 < interval.high < 0.15
    assert bootstrap_mean([0.0] * 30)[:3] == (0, 0, 0)  # what it would have said


def test_mcnemar_equals_the_enumeration_of_all_signs():
    for up, down in ((0, 0), (1, 0), (3, 1), (5, 5), (0, 8)):
        policy, base = [1] * up + [0] * down + [1, 0], [0] * up + [1] * down + [1, 0]
        observed = abs(up - down)
        signs = itertools.product((1, -1), repeat=up + down)
        extreme = sum(abs(sum(sign)) >= observed for sign in signs)
        assert mcnemar_exact(policy, base) == pytest.approx(extreme / 2 ** (up + down))
    assert mcnemar_exact([0] * 6000, [1] * 6000) == 0  # below the smallest float


# -- local files -----------------------------------------------------------------------------------------------------


def arc_folder(folder, ending=".jsonl"):
    write_rows(
        folder / f"arc_easy_test{ending}", [{"query": "Question: 1+1?\nAnswer:", "choices": ["2", "3"], "gold": 0}] * 3
    )
    return folder


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
