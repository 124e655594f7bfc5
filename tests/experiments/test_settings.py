"""The settings that need more than pairs: a base tuned first, a preference to keep, made-up pairs, local files."""

import gzip
import json
from dataclasses import replace

import pytest
from judge_server import serving

from benchmarks.experiments import own_pairs
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.ablations import KL_PENALTY
from benchmarks.experiments.cells import Cell, Store, read_results
from benchmarks.experiments.judges import RightAnswerJudge, StyleJudge, equal_length_wins, held_out_accuracy, repetition
from benchmarks.experiments.methods import MAIN_KNOBS, METHODS, TITLES
from benchmarks.experiments.named_settings import capitals, hh, terse
from benchmarks.experiments.pools import in_rounds, load_pools, with_noise
from benchmarks.experiments.report import write_report
from benchmarks.experiments.runner import Runner
from benchmarks.experiments.suites import fast_dtype, make_suite
from benchmarks.experiments.summary import by_setting
from benchmarks.experiments.tiny import write_tiny_base
from qadapter.config import PRESETS
from qadapter.errors import ConfigError, DataError
from qadapter.generation import Answer
from qadapter.modeling.bases import load_tokenizer

SMOKE = make_suite("smoke").settings[0]
COPIED = ("base", "dtype", "max_length", "train_pairs", "eval_pairs", "training")
SMALL = {name: getattr(SMOKE, name) for name in COPIED}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of made-up local data."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("harmless", "helpful"):
        rows = [
            {"prompt": f"Is {n} {kind}?", "chosen": f"Yes, {n} is {kind}!", "rejected": f"Go away {n}"}
            for n in range(40)
        ]
        write_rows(folder / "pairs" / f"hh_{kind}.jsonl.gz", rows)
    questions = [
        {"question": f"What is {n} plus one?", "choices": ["no", str(n + 1)], "gold": 1, "support": ""}
        for n in range(30)
    ]
    write_rows(folder / "bench" / "sciq_val.jsonl.gz", questions)
    write_rows(folder / "bench" / "gsm8k_test.jsonl.gz", [{"question": "1 + 1?", "answer": "1 + 1 = 2"}] * 3)
    return folder


def run(setting, data, folder, method="dpo", options=None):
    store = Store(folder / "results" / "suite", folder / "work")
    cell = Cell.of(setting, method, options or {"beta": 0.1}, 0)
    Runner(store, data, say=lambda line: None).run([cell])
    return json.loads(store.path(cell).read_text()), store


def test_a_helpful_base_is_made_harmless_and_its_helpfulness_measured(data, tmp_path):
    measuring = replace(SMOKE.measuring, retained_pairs=3)
    result, store = run(hh(**SMALL, measuring=measuring), data, tmp_path)
    assert result["judge"]["name"].startswith("reward model, ")
    assert len(result["points"][0]["retained"]["hh-rlhf/helpful"]["margin_gain"]) == 3
    assert result["base"]["prepared"] == "hh-rlhf/helpful"
    (prepared,) = [path for path in (store.work / "bases").iterdir() if path.name.startswith("prepared")]
    plain, _ = run(hh(**SMALL, measuring=measuring, prepared=""), data, tmp_path)
    assert plain["base"]["fingerprint"] != result["base"]["fingerprint"]
    assert (prepared / "config.json").exists()


def test_variants_in_training_have_the_base_that_is_prepared_by_the_training_unchanged(data, tmp_path):
    plain = Cell.of(hh(**SMALL, measuring=SMOKE.measuring), "dpo", {"beta": 0.1}, 0)
    varied = Cell.of(plain.setting, "dpo", {"beta": 0.1, "training.lora_r": 4, "training.packed": True}, 0)
    runner = Runner(Store(tmp_path / "results", tmp_path / "work"), data, say=lambda line: None)
    assert runner.base_of(varied.setting) == runner.base_of(plain.setting)
    assert runner.cache_of(varied.setting) == runner.cache_of(plain.setting)
    for cell in (plain, varied):
        runner.store.write(cell, {})
    assert len(by_setting(list(read_results(runner.store.results)))["hh-harmless"]) == 2
    changed = replace(plain.setting, training=varied.setting.training)  # its base, too, is tuned with that
    assert changed != varied.setting
    assert runner.cache_of(changed) != runner.cache_of(plain.setting)


def test_terse_pairs_are_made_from_the_bases_own_answers(data, tmp_path):
    measuring = replace(SMOKE.measuring, texts=("gsm8k",))
    small = SMALL | {"training": replace(SMALL["training"], epochs=1.0)}
    result, store = run(terse(**small, measuring=measuring), data, tmp_path)
    assert result["judge"]["name"] == "right in at most 4 words"
    assert len(result["points"][0]["texts"]["gsm8k"]["loss_change"]) == 3
    (made,) = store.work.rglob("terse.jsonl")
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    assert rows[0]["chosen"][0]["content"] == str(int(rows[0]["prompt"][0]["content"].split()[2]) + 1)


def test_capitals_are_the_bases_own_answers_in_capitals(data, tmp_path, monkeypatch):
    monkeypatch.setattr(own_pairs, "CAPITALS_TOKENS", 4)
    measuring = replace(SMOKE.measuring, texts=("prose",))
    small = SMALL | {"training": replace(SMALL["training"], epochs=1.0)}
    result, store = run(capitals(**small, measuring=measuring), data / "none", tmp_path)
    (made,) = store.work.rglob("capitals.jsonl")
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    assert len(rows) > 100
    for row in rows:
        assert row["chosen"][0]["content"] == row["rejected"][0]["content"].upper() != row["rejected"][0]["content"]
    assert result["judge"]["name"].startswith("rule regex=")
    assert result["judge"]["held_out_accuracy"] == 1.0


def test_benchmarks_over_local_files_are_run_and_what_they_lose_is_a_drift(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measuring = replace(SMOKE.measuring, tasks=("sciq",), task_limit=5, sampled_strengths=(0.5, 1.0))
    result, store = run(replace(SMOKE, measuring=measuring), data, tmp_path)
    figures = result["tasks"]["sciq"]
    assert (figures["metric"], figures["n"], set(figures["differences"])) == ("acc", 5, {"strength=0.5", "strength=1"})
    lost = {point["value"]: point.get("lost") for point in result["points"] if point["dial"] == "strength"}
    assert lost.keys() == {0.5, 1.0}
    assert all(set(losses["sciq"]) <= {-1, 0, 1} and len(losses["sciq"]) == 5 for losses in lost.values())
    assert sum(lost[1.0]["sciq"]) / 5 == pytest.approx(-figures["differences"]["strength=1"]["value"])
    write_report(store.results.parent, tmp_path / "results.md")
    page = (tmp_path / "results" / f"{store.results.name}.md").read_text()
    assert "Drift: score lost on the benchmarks." in page
    assert "| method | options | sciq, strength=0.5 | sciq, strength=1 |" in page


def test_texts_that_are_not_there_are_named(tmp_path):
    measuring = replace(SMOKE.measuring, texts=("lambada",))
    with pytest.raises(DataError, match=r"lambada_test.jsonl.gz is not there: .*Pass --data"):
        run(replace(SMOKE, measuring=measuring), tmp_path / "none", tmp_path)
    with pytest.raises(ConfigError, match="judge 'taste': choose style"):
        run(replace(SMOKE, judge="taste"), tmp_path / "none", tmp_path)


def test_pools_share_no_prompt_and_do_not_depend_on_the_seed(data, tmp_path):
    tokenizer = load_tokenizer(write_tiny_base(tmp_path / "tiny"))
    pools = load_pools(replace(SMOKE, train_pairs=None, eval_pairs=None), tokenizer, data, tmp_path)
    prompts = [{json.dumps(pair["prompt"]) for pair in part} for part in (pools.train, pools.held_out, pools.judge)]
    assert all(prompts)
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert {json.dumps(prompt) for prompt in pools.prompts} >= prompts[1]
    swapped = with_noise(pools.train_ids, 0.4)
    changed = [one != other for one, other in zip(pools.train_ids, swapped, strict=True)]
    assert sum(changed) == round(0.4 * len(changed))
    assert swapped[changed.index(True)]["chosen_ids"] == pools.train_ids[changed.index(True)]["rejected_ids"]


def test_pairs_come_in_rounds_whatever_their_order():
    pairs = [{"prompt": prompt, "chosen": str(n)} for n, prompt in enumerate("aaabbc")]
    order = in_rounds(pairs)
    assert order == in_rounds(pairs[::-1])
    assert {pair["prompt"] for pair in order[:3]} == {"a", "b", "c"}
    assert order[-1]["prompt"] == "a"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Mitochondria.", 1.0),
        ("The mitochondrion? No: mitochondria", 1.0),
        ("It is the mitochondria of the cell", 0.0),
        ("chloroplasts", 0.0),
        ("HETATM", 0.0),
        ("", 0.0),
    ],
)
def test_a_short_answer_counts_where_it_is_right(text, score):
    def said(words):
        return [{"role": "assistant", "content": words}]

    prompt = [{"role": "user", "content": "What powers a cell?"}]
    pairs = [{"prompt": prompt, "chosen": said("mitochondria"), "rejected": said("A cell is powered by many things.")}]
    judge = RightAnswerJudge(pairs, 4)
    assert judge.scores([prompt], [Answer(text, True)]) == [score]
    assert held_out_accuracy(judge, pairs) == 1.0


def test_the_style_judge_tells_styles_apart_at_equal_length():
    def pair(n):
        said = [{"role": "assistant", "content": text} for text in (f"Wow {n}! Great fun!", f"The figure is {n}.")]
        return {"prompt": [{"role": "user", "content": str(n)}], "chosen": said[:1], "rejected": said[1:]}

    judge = StyleJudge([pair(n) for n in range(40)], words=8)
    assert held_out_accuracy(judge, [pair(n) for n in range(100, 120)]) == 1.0
    fun, dry, long_dry = (Answer(text, True) for text in ("Wow! Great fun!", "The figure is.", "The figure is. Wow!"))
    assert equal_length_wins(judge, [None] * 2, [fun, long_dry], [dry, dry]) == [1.0, 0.5]


@pytest.mark.parametrize("score", [lambda text: len(text.split()), lambda text: text.count("\n")])
def test_equal_length_counts_words_between_any_white_space_and_keeps_it(score):
    class Scoring:
        def scores(self, prompts, answers):
            return [float(score(answer.text)) for answer in answers]

    long, short = (Answer(text, True) for text in ("- one\n- two\n\n- three\t\tand four", "- one\n- two\n"))
    assert equal_length_wins(Scoring(), [None] * 3, [long, short, long], [short, long, Answer("", True)]) == [0.5] * 3


def test_repetition_counts_sequences_of_four_words():
    assert repetition("a b c d") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)


def test_auto_is_a_dtype_and_a_given_one_stays():
    assert fast_dtype("auto") in ("float32", "bfloat16")
    assert fast_dtype("float32") == "float32"


def test_every_method_has_a_title_and_a_knob():
    assert TITLES.keys() == MAIN_KNOBS.keys() == METHODS.keys() | {"qadapter-logits"}


def test_stored_samples_can_be_judged_later(tmp_path, monkeypatch):
    """By a rule, and by a language model behind an endpoint."""
    results = tmp_path / "results"
    store = Store(results / "smoke", tmp_path / "work")
    # Answers that are the base's own are a tie without a question.
    cell = Cell.of(replace(SMOKE, training=replace(SMOKE.training, learning_rate=0.3)), "sft", {}, 0)
    Runner(store, tmp_path, say=lambda line: None).run([cell])
    command = ["judge", "--suite", "smoke", "--results", str(results), "--work", str(store.work), "--judge"]

    def judged(judge):
        assert main([*command, judge]) == 0
        return json.loads((store.results / "judged" / store.path(cell).name).read_text())["win_rates"]

    assert set(judged("rule:max-words=3")) == {"strength=1", "threshold=1", "scale=0.5"}
    assert main([*command, "rule:max-words=3"]) == 1  # nothing is left to judge
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with serving(lambda handler, attempt, body: handler.say("TIE")) as server:
        rates = judged(f"endpoint:{server.url}#m")
        assert server.requests
        stored = (store.work / "samples" / f"{store.path(cell).stem}.jsonl").read_text().splitlines()
        prompts = {json.loads(line)["prompt"][-1]["content"] for line in stored}
        assert all(any(prompt in str(body["messages"]) for prompt in prompts) for _, _, body in server.requests)
    assert {rate["rate"]["value"] for rate in rates.values()} == {0.5}


def test_the_kl_penalty_of_the_suites_is_the_preset():
    alpha = KL_PENALTY["alpha"]
    expected = {"alpha_tilde": alpha, "alpha_0": alpha, "penalty": "kl", "length_normalised": True, "beta": 1.0}
    expected |= {"gamma": 1.0, "discount_floor": 0.0}
    assert PRESETS["kl"] == expected
    assert {name: KL_PENALTY[name] for name in KL_PENALTY if name != "alpha"}.items() <= expected.items()
