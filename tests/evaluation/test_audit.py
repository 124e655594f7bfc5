"""The audit: reproducible, resumable, and as its documented schema says."""

import json
import re
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from evaluated import open_policy, pair_rows, write_adapter, write_jsonl
from models import lora, tiny_tokenizer, train_randomly
from rich.console import Console
from transformers import AutoModelForCausalLM

from qadapter import ConfigError, QAdapterConfig, QAdapterForCausalLM
from qadapter.data.texts import excerpt
from qadapter.evaluation import benchmarks, evaluate
from qadapter.evaluation.audit import run_audit
from qadapter.evaluation.audit_report import page, print_audit, write_audit
from qadapter.evaluation.columns import Column
from qadapter.evaluation.evaluate import Evaluation
from qadapter.evaluation.gate import Limits
from qadapter.evaluation.judges import Verdict
from qadapter.evaluation.judges.models import RewardJudge
from qadapter.evaluation.part_store import PartStore
from qadapter.evaluation.subjects import Subject, open_subject
from qadapter.evaluation.tables import headline
from qadapter.evaluation.workload import Workload
from qadapter.generation import Answer

DOCUMENT = Path(__file__).parents[2] / "docs" / "evaluation.md"


def without_environment(audit):
    """What two audits of the same inputs agree on."""
    return {name: value for name, value in audit.items() if name != "environment"}


@pytest.fixture
def workload(files):
    return Workload(
        dataset=str(files["pairs"]),
        neutral_text=files["neutral"],
        instructions=files["prompts"],
        judges=("rule:max-words=3",),
        prompts=4,
        max_new_tokens=6,
    )


@pytest.fixture
def subject(base):
    return Subject("runs/tiny", open_policy(base), tiny_tokenizer())


@pytest.fixture
def audited(subject, workload, tmp_path):
    def run(subject=subject, workload=workload, strength=1.0, limits=None, folder=tmp_path / "parts"):
        return run_audit(subject, Column("policy", strength), workload, limits or Limits(), PartStore(folder))

    return run


def schema():
    """The schema as the documentation states it."""
    return json.loads(re.search(r"```json\n(\{\n  \"\$schema\".*?)```", DOCUMENT.read_text(), re.DOTALL)[1])


def errors_of(value, rule, root, where="audit"):
    """What of the JSON Schema `rule` a value breaks; knows the keywords that the documented schema uses."""
    if "$ref" in rule:
        rule = root["$defs"][rule["$ref"].rsplit("/", 1)[1]]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": int | float,
             "null": type(None)}  # fmt: skip
    allowed = rule.get("type", list(kinds))
    allowed = [allowed] if isinstance(allowed, str) else allowed
    fits = [kind for kind in allowed if isinstance(value, kinds[kind])]
    if not fits or (isinstance(value, bool) and "boolean" not in fits):
        return [f"{where}: {type(value).__name__} is not {allowed}"]
    found = [f"{where}: {value!r} is not in {rule['enum']}"] if value not in rule.get("enum", [value]) else []
    if isinstance(value, dict):
        properties = rule.get("properties", {})
        found += [f"{where}: {name} is missing" for name in rule.get("required", []) if name not in value]
        for name, item in value.items():
            other = rule.get("additionalProperties", {})
            if name not in properties and other is False:
                found.append(f"{where}: {name} is unknown")
            else:
                found += errors_of(item, properties.get(name, other or {}), root, f"{where}.{name}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += errors_of(item, rule.get("items", {}), root, f"{where}[{index}]")
    return found


class Loaded:
    """What lm-eval would have loaded: one task."""

    def __init__(self, name):
        self.tasks, self.groups = {name: None}, {}


TASK = {
    "metric": "acc",
    "higher_is_better": True,
    "n": 7,
    "columns": {"base": {"value": 0.6, "low": 0.3, "high": 0.9}, "policy": {"value": 0.5, "low": 0.2, "high": 0.8}},
    "differences": {"policy": {"value": -0.1, "low": -0.3, "high": 0.1, "mcnemar_p": 0.5}},
}


@pytest.fixture
def fake_tasks(monkeypatch):
    """Benchmarks without lm-eval; the names of those that were run."""
    ran = []

    def run(subject, loaded, columns, *rest):
        ran.extend(loaded.tasks)
        return dict.fromkeys(loaded.tasks, TASK)

    monkeypatch.setattr(benchmarks, "load", lambda name, folder, track: Loaded(name))
    monkeypatch.setattr(benchmarks, "run", run)
    monkeypatch.setattr(benchmarks, "require_lm_eval", lambda: None)
    monkeypatch.setattr(benchmarks, "state", lambda task, folder: [task])
    return ran


def test_an_audit_is_as_its_schema_says(audited, fake_tasks):
    audit = audited(limits=Limits(0.01, {"lambada": 1.0}, 0.2))
    document = schema()
    assert errors_of(audit, document, document) == []
    assert errors_of({**audit, "verdict": "perhaps", "more": 1}, document, document) != []
    assert json.loads(json.dumps(audit, allow_nan=False)) == audit


@pytest.fixture
def composed(base):
    """A subject of two adapters with temperatures of their own."""
    model = AutoModelForCausalLM.from_pretrained(base)
    configs = {"one": QAdapterConfig(alpha_tilde=0.7, gamma=0.5), "two": QAdapterConfig(alpha_tilde=0.4)}
    policy = QAdapterForCausalLM(model, configs, {"one": lora(), "two": lora()})
    return Subject("runs/composed", train_randomly(policy).eval(), tiny_tokenizer())


def test_returns_are_those_of_the_only_adapter_with_a_weight(composed, workload, tmp_path):
    def figures(**weights):
        columns = [Column(name, adapter_weights=own) for name, own in weights.items()]
        pairs = Evaluation(composed, columns, workload, PartStore(tmp_path / "parts")).pairs()
        rewards = {name: own["reward_accuracy"]["n"] for name, own in pairs["columns"].items()}
        return rewards, {name: own["ece"] is not None for name, own in pairs["calibration"].items()}

    both = {"one": 1.0, "two": 0.5}
    assert figures(second={"two": 1.0}, mixed=both) == (
        {"base": 0, "second": 9, "mixed": 0},
        {"second": True, "mixed": False},
    )
    assert figures(second={"two": 1.0}, half={"one": 0.0, "two": 0.5})[0] == {"base": 9, "second": 9, "half": 9}
    assert figures(first={"one": 1.0}, second={"two": 1.0})[0] == {"base": 0, "first": 9, "second": 9}
    assert composed.temperatures(Column("two", adapter_weights={"two": 1.0})).alpha_tilde == 0.4
    assert composed.temperatures(Column("own weights")) is None


def test_an_audit_of_a_composition_has_no_calibration(audited, composed, tmp_path):
    audit, document = audited(composed), schema()
    assert errors_of(audit, document, document) == []
    assert audit["results"]["pairs"]["calibration"]["policy"] == {"ece": None, "expected": None, "n": 0, "bins": None}
    assert "Calibration of" not in page(audit)
    assert ("Calibration error of σ(reward margin)", "–", "–") in headline(audit["results"], ["policy"])


def test_two_audits_of_the_same_inputs_agree(audited, tmp_path):
    first, second = audited(folder=tmp_path / "a"), audited(folder=tmp_path / "b")
    assert "pairs" not in second["environment"]["reused_parts"]
    assert without_environment(first) == without_environment(second)
    assert "date" not in json.dumps(without_environment(first))


def test_an_untouched_adapter_costs_and_gains_nothing(base, audited):
    subject = Subject("untouched", open_policy(base, trained=False), tiny_tokenizer())
    audit = audited(subject, limits=Limits(max_kl=0.0, min_accuracy=0.5))
    assert audit["verdict"] == "passes"
    results = audit["results"]
    for part in (results["pairs"]["chosen"], results["neutral"], results["instructions"]):
        figures = part["columns"]["policy"]
        assert {figures[name]["value"] for name in ("kl", "reverse_kl", "loss_change", "entropy_change")} == {0.0}
        assert figures["agreement"]["value"] == 1.0
    accuracy = results["pairs"]["columns"]["policy"]["accuracy"]
    assert accuracy["value"] == 0.5
    assert 0 < accuracy["low"] < 0.5 < accuracy["high"] < 1
    assert results["judged"][0]["rate"]["value"] == 0.5
    assert audit["findings"] == []


def test_an_interrupted_audit_goes_on_where_it_stopped(audited, monkeypatch, tmp_path):
    expected = audited(folder=tmp_path / "whole")

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "behaviour", interrupted)
        with pytest.raises(KeyboardInterrupt):
            audited()
    resumed = audited()
    assert set(resumed["environment"]["reused_parts"]) >= {"pairs", "neutral", "instructions"}
    assert without_environment(resumed) == without_environment(expected)


def test_finished_parts_are_not_measured_again(audited, monkeypatch):
    first = audited()
    for name in ("measure_texts", "generate_texts"):
        monkeypatch.setattr(evaluate, name, lambda *args, **options: pytest.fail("measured again"))
    assert without_environment(audited()) == without_environment(first)


@pytest.mark.parametrize("change", ["weights", "settings", "strength", "pairs", "dtype"])
def test_a_changed_input_is_measured_again(audited, base, workload, tmp_path, change):
    audited()
    options = {}
    if change == "weights":
        options["subject"] = Subject("runs/tiny", open_policy(base, seed=7), tiny_tokenizer())
    if change == "settings":
        options["subject"] = Subject("runs/tiny", open_policy(base, QAdapterConfig(alpha_0=0.3)), tiny_tokenizer())
    if change == "dtype":
        options["subject"] = Subject("runs/tiny", open_policy(base).double(), tiny_tokenizer())
    if change == "strength":
        options["strength"] = 0.5
    if change == "pairs":
        path = write_jsonl(tmp_path / "other.jsonl", pair_rows(7))
        options["workload"] = Workload(**{**vars(workload), "dataset": str(path)})
    assert "pairs" not in audited(**options)["environment"]["reused_parts"]


@pytest.mark.parametrize(
    ("file", "setting", "parts"),
    [
        ("config.json", {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}}, {"pairs", "answers"}),
        ("generation_config.json", {"eos_token_id": 7}, {"pairs", "answers"}),
        ("config.json", {"transformers_version": "5.0.0", "_name_or_path": "elsewhere"}, set()),
    ],
)
def test_a_base_with_other_settings_is_measured_again(audited, base, tmp_path, file, setting, parts):
    folder = shutil.copytree(base, tmp_path / "base")
    audited(Subject("runs/tiny", open_policy(folder), tiny_tokenizer()))
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    again = audited(Subject("runs/tiny", open_policy(folder), tiny_tokenizer()))
    assert {"pairs", "answers"} - set(again["environment"]["reused_parts"]) == parts


def test_answers_of_the_base_are_shared_by_all_adapters_of_it(audited, base, monkeypatch):
    audited()
    columns = []
    generated = Evaluation._generated

    def noted(self, column, *rest):
        columns.append(column.name)
        return generated(self, column, *rest)

    monkeypatch.setattr(Evaluation, "_generated", noted)
    audited(Subject("runs/other", open_policy(base, seed=7), tiny_tokenizer()))
    assert set(columns) == {"policy"}


def test_a_judge_that_could_not_be_reached_is_asked_again_and_the_reason_told(audited, monkeypatch, capsys):
    asked = []

    class Down:
        def judge(self, comparisons, progress):
            asked.append(len(comparisons))
            return [Verdict(None, f"{number} times down at http://key@here/v1") for number in range(len(comparisons))]

    monkeypatch.setattr(evaluate, "make_judge", lambda name: Down())
    for _ in range(2):
        audit = audited()
        (judged,) = audit["results"]["judged"]
        assert judged["missing"] == 4
        assert judged["wins"] == 0
        assert judged["rate"]["value"] is None
    assert asked == [4, 4]
    said = "rule:max-words=3 on policy: 4 of 4 verdicts missing, most often (4) for: 0 times down at (address)"
    assert f"<p>{said}</p>" in page(audit)
    print_audit(audit, Console(width=200))
    assert f"\n{said}\n" in capsys.readouterr().out


def test_only_missing_verdicts_are_asked_for_again(audited, monkeypatch):
    """Each may be paid for, and one that never comes must not cost all others with each run."""
    asked = []

    class Filtering:
        def judge(self, comparisons, progress):
            asked.append(len(comparisons))
            filtered = Verdict(None, "HTTP status 400: 'filtered'")
            return [filtered if "say the" in comparison.prompt else Verdict("a", "m") for comparison in comparisons]

    monkeypatch.setattr(evaluate, "make_judge", lambda name: Filtering())
    first, second = (audited()["results"]["judged"][0] for _ in range(2))
    assert first == second
    assert 0 < first["missing"] < 4
    assert first["missing"] + first["wins"] == 4
    assert asked == [4, first["missing"]]


def test_verdicts_speak_of_no_letters_and_cut_answers_are_marked(audited):
    audit = audited()
    (judged,) = audit["results"]["judged"]
    decided = [verdict["reason"] for verdict in judged["verdicts"] if verdict["winner"] != "tie"]
    assert all(reason == "it alone satisfies max-words=3" for reason in decided)
    shown = page(audit).partition("judge rule:max-words=3")[2]
    cut = [verdict for verdict in judged["verdicts"] if not verdict["policy_finished"]]
    assert cut
    assert all(f"{escape(verdict['policy'])} […cut]</pre>" in shown for verdict in cut)


def test_a_base_that_says_nothing_is_refused_in_one_line(audited, monkeypatch):
    """As with one token, of white space."""
    monkeypatch.setattr(evaluate, "generate_texts", lambda model, tokenizer, prompts, *_, **__: [Answer("", False)] * 3)
    with pytest.raises(ConfigError, match=r"all 3 answers of the base .* --instructions, or more than 6 tokens with"):
        audited()


def test_judged_prompts_are_drawn_from_all_pairs_by_the_seed(audited, workload, files):
    asked = [json.loads(line)["prompt"] for line in files["pairs"].read_text().splitlines()]
    results = [audited(workload=replace(workload, seed=seed))["results"]["judged"][0] for seed in (0, 0, 1, 2)]
    judged = [[verdict["prompt"] for verdict in result["verdicts"]] for result in results]
    assert judged[0] == judged[1]
    assert len({tuple(prompts) for prompts in judged}) > 1
    assert any(asked[-1] in prompts for prompts in judged)


def test_a_judge_with_other_weights_is_asked_again(audited, monkeypatch):
    class ByLength:
        tokenizer = tiny_tokenizer()

        def __init__(self, sign):
            self.sign = sign

        def fingerprint(self):
            return [self.sign]

        def score(self, ids):
            return self.sign * len(ids)

    results = []
    for sign in (1, -1):
        monkeypatch.setattr(evaluate, "make_judge", lambda name, sign=sign: RewardJudge(ByLength(sign)))
        results += audited()["results"]["judged"]
    assert results[0]["wins"] + results[0]["losses"] > 0
    assert (results[1]["wins"], results[1]["losses"]) == (results[0]["losses"], results[0]["wins"])


def test_limits_on_benchmarks_run_them_once(audited, workload, fake_tasks):
    workload = Workload(**{**vars(workload), "tasks": ("arc",)})
    audit = audited(workload=workload, limits=Limits(max_drop={"arc": 20.0, "lambada": 1.0}))
    assert fake_tasks == ["arc", "lambada"]
    assert [entry["passes"] for entry in audit["gate"]] == [True, False]
    assert audit["verdict"] == "fails"


def test_the_page_stands_alone_and_shows_everything(audited, fake_tasks, tmp_path):
    audit = audited(limits=Limits(0.01, {"lambada": 1.0}))
    write_audit(audit, tmp_path)
    html = (tmp_path / "audit.html").read_text()
    assert json.loads((tmp_path / "audit.json").read_text()) == audit
    assert not re.search(r"<script|(src|href)=|https?://(?!www\.w3\.org)", html)
    for shown in ("KL on neutral text", "FAILS", "lambada", "arithmetic", "By category", "By kind of token", "<svg",
                  "tell of cats", "max-words=3", "qadapter", "Fails"):  # fmt: skip
        assert shown in html, shown


def test_worst_cases_stand_beside_their_own_answers(audited):
    audit = audited()
    instructions, behaviour = audit["results"]["instructions"], audit["results"]["behaviour"]
    prompts = ["x" * 170 + ending for ending in ("one", "two")] + ["y" * 155 + ending for ending in ("one", "two")]
    row, example = instructions["worst"]["policy"][0], behaviour["examples"][0]
    instructions["worst"]["policy"] = [{**row, "text": excerpt(prompt)} for prompt in prompts]
    behaviour["examples"] = [{**example, "prompt": prompt} for prompt in prompts]
    (shown,) = re.findall("<h2>Worst cases</h2>(.*?)<details>", page(audit), re.DOTALL)
    assert [prompt in shown for prompt in prompts] == [False, False, True, True]


def test_texts_cannot_leave_the_page(audited):
    audit = audited()
    audit["results"]["behaviour"]["examples"][0]["prompt"] = "<script>alert(1)</script>"
    audit["adapter"]["name"] = "<img src=x>"
    assert "<script>" not in page(audit)
    assert "<img" not in page(audit)


def test_a_plain_lora_folder_is_wrapped_in_memory(base, tmp_path):
    lora = tmp_path / "lora"
    adapter = write_adapter(tmp_path / "own", base, config=QAdapterConfig.preset("undiscounted"))
    shutil.copytree(adapter / "adapters" / "default", lora)
    subject = open_subject(str(lora), str(base), dtype=next(open_policy(base).parameters()).dtype, device="cpu")
    ours = open_subject(str(adapter), None, subject.model.dtype, "cpu")
    assert subject.identity() == ours.identity()


def test_columns_are_named_once(subject, workload, tmp_path):
    for names in (["a", "a"], ["base"]):
        with pytest.raises(ConfigError, match="each name once, and 'base' is taken"):
            Evaluation(subject, [Column(name) for name in names], workload, PartStore(tmp_path))


def test_pairs_of_one_prompt_tell_no_more_about_chosen_answers_than_one(subject, tmp_path):
    rows = [{**row, "prompt": f"say {index}"} for index, row in enumerate(pair_rows(5))]
    once, thrice = (
        Evaluation(
            subject,
            [Column("policy")],
            Workload(dataset=str(write_jsonl(tmp_path / f"{times}.jsonl", rows * times))),
            PartStore(tmp_path / "parts"),
        ).pairs()["chosen"]
        for times in (1, 3)
    )
    figures = [chosen["breakdown"]["policy"]["position"]["1-8"]["kl"] for chosen in (once, thrice)]
    figures += [chosen["columns"]["policy"]["kl"] for chosen in (once, thrice)]
    widths = [figure["high"] - figure["low"] for figure in figures]
    assert widths[1] == pytest.approx(widths[0])
    assert widths[3] == pytest.approx(widths[2])


def test_what_was_left_out_is_told_of_these_pairs(subject, tmp_path):
    """The same pairs are left of both files."""
    rows = pair_rows(5)
    left_out = [
        Evaluation(
            subject,
            [Column("policy")],
            Workload(dataset=str(write_jsonl(tmp_path / f"{len(more)}.jsonl", rows + more)), max_length=60),
            PartStore(tmp_path / "parts"),
        ).pairs()["rows"]
        for more in ([], [{**rows[0], "chosen": "x" * 200}])
    ]
    assert ["1 dropped" in summary for summary in left_out] == [False, True]


def test_an_edited_adapter_folder_is_another_adapter(base, tmp_path):
    one, other = (
        open_subject(str(write_adapter(tmp_path / str(seed), base, seed=seed)), None, open_policy(base).dtype, "cpu")
        for seed in (1, 2)
    )
    assert one.base_identity() == other.base_identity()
    assert one.identity() != other.identity()
