"""The harness end to end on a tiny random model: same numbers again, no cell twice, a page from the files alone."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import padded, tiny_policy, token_ids

from benchmarks.experiments.__main__ import main
from benchmarks.experiments.ablations import ABLATIONS
from benchmarks.experiments.cells import Cell, Store, read_results
from benchmarks.experiments.measure import scaled
from benchmarks.experiments.report import write_report
from benchmarks.experiments.runner import Runner
from benchmarks.experiments.suites import SUITES, make_suite, narrowed
from benchmarks.experiments.summary import by_setting
from qadapter.errors import ConfigError, DataError

NOWHERE = Path("no-such-folder")


@pytest.fixture(scope="module")
def cells():
    suite = make_suite("smoke")
    return [Cell.of(suite.settings[0], method, suite.knobs[method][0], 0) for method in ("qadapter", "dpo", "sft")]


@pytest.fixture(scope="module")
def finished(cells, tmp_path_factory):
    """A store in which the cells were run."""
    folder = tmp_path_factory.mktemp("experiments")
    store = Store(folder / "results" / "smoke", folder / "work")
    said = []
    assert Runner(store, NOWHERE, say=said.append).run(cells) == 3
    assert re.search(r"\[1/3\] .* left", "\n".join(said))
    return store


def numbers(result):
    return {name: result[name] for name in ("points", "data", "judge", "policy")}


def test_a_finished_cell_is_not_run_again(cells, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.results.iterdir()}
    assert Runner(finished, NOWHERE, say=lambda line: None).run(cells) == 0
    assert before == {path: path.stat().st_mtime_ns for path in finished.results.iterdir()}


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(cells, finished, tmp_path):
    first = json.loads(finished.path(cells[0]).read_text())
    store = Store(tmp_path / "results", tmp_path / "work")
    again = Runner(store, NOWHERE, say=lambda line: None)
    again.run([cells[0], replace(cells[0], seed=1)])
    repeated, other = (json.loads(store.path(c).read_text()) for c in (cells[0], replace(cells[0], seed=1)))
    assert numbers(repeated) == numbers(first)
    assert other["points"] != first["points"]


def test_an_interrupted_cell_leaves_no_file_and_starts_anew(cells, tmp_path, monkeypatch):
    from benchmarks.experiments import runner

    store = Store(tmp_path / "results", tmp_path / "work")
    with monkeypatch.context() as patched:
        patched.setattr(runner, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Runner(store, NOWHERE, say=lambda line: None).run(cells[2:])
    assert not list(tmp_path.glob("results/*"))
    assert Runner(store, NOWHERE, say=lambda line: None).run(cells[2:]) == 1
    assert [path.name for path in store.results.iterdir()] == [store.path(cells[2]).name]


def test_a_results_file_names_what_it_depends_on(cells, finished):
    result = json.loads(finished.path(cells[1]).read_text())
    assert result["cell"] == cells[1].described()
    assert {"commit", "command", "device", "versions", "date"} <= set(result["provenance"])
    assert {"torch", "transformers", "peft", "trl"} <= set(result["provenance"]["versions"])
    assert result["data"]["train_pairs"] == 8
    assert len(result["points"]) == 5  # two strengths, without and with a threshold, and one scale
    assert all(len(point["pairs"]["kl"]) == 6 for point in result["points"])
    samples = (finished.work / "samples" / f"{cells[1].name}.jsonl").read_text().splitlines()
    assert {json.loads(line)["point"] for line in samples} == {"base", "strength=1", "threshold=1", "scale=0.5"}


def test_full_strength_gains_what_training_gave_and_half_of_it_less_drift(cells, finished):
    points = {point["value"]: point for point in json.loads(finished.path(cells[1]).read_text())["points"][:2]}
    half, full = (sum(points[value]["pairs"]["kl"]) for value in (0.5, 1.0))
    assert 0 < half < full


def test_a_threshold_lessens_the_drift_of_every_pair(finished, cells):
    points = json.loads(finished.path(cells[1]).read_text())["points"]
    by_dial = {(point["dial"], point["value"]): point["pairs"] for point in points}
    for value in (0.5, 1.0):
        plain, thresholded = (by_dial[dial, value] for dial in ("strength", "threshold"))
        assert all(0 <= less < kl for less, kl in zip(thresholded["kl"], plain["kl"], strict=True))
    assert sum(by_dial["threshold", 1.0]["kl"]) > 0


def test_the_scaled_lora_is_that_of_the_averaged_weights():
    policy = tiny_policy()
    batch = padded(token_ids(5, 7))
    before = policy(**batch).logits
    with scaled(policy, 0.3):
        found = policy(**batch).logits
    assert policy(**batch).logits.equal(before)
    halved = copy.deepcopy(policy)
    with torch.no_grad():
        for name, parameter in halved.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.3)
    torch.testing.assert_close(found, halved(**batch).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)


def test_the_page_is_made_of_the_files(finished, tmp_path):
    write_report(finished.results.parent, tmp_path / "results.md")
    front, page = (tmp_path / "results.md").read_text(), (tmp_path / "results" / "smoke.md").read_text()
    assert "| [smoke](results/smoke.md) | Every method end to end" in front
    assert "## Verdict" in front
    assert "| DPO | with the strength dial |" in page
    assert "8 training pairs" in page
    scaled = re.search(r"^\| margin \| DPO \| .* \|$", page.split("The scale of the weights")[1], re.M)
    dial, scale, difference = (float(cell.split()[0]) for cell in scaled[0].split("|")[5:8])
    assert difference == pytest.approx(scale - dial, abs=0.0011)
    thresholds = page.split("A threshold on the dial")[1:]
    assert len(thresholds) == 2  # against KL on the pairs and on prose
    assert all("| margin | Q-Adapter | " in table for table in thresholds)
    assert (
        len(re.findall(r"^\| Q-Adapter \| .*( → .*){3}\|$", page.split("without → with the threshold")[1], re.M)) == 4
    )
    assert "**Against DPO with the threshold, too: a larger area is met in" in front
    plots = re.findall(r"\]\(([^)]+\.svg)\)", page)
    assert plots
    for name in plots:
        assert (tmp_path / "results" / name).read_text().startswith("<svg")
    figures = json.loads((tmp_path / "results" / "figures.json").read_text())["smoke"]["smoke"]
    assert {"dpo dial", "qadapter dial", "sft dial"} <= set(figures["margin against kl"])
    value = figures["margin against kl"]["dpo dial"]["whole"][0]
    assert f"{value:.3f}" in page


def test_results_on_another_base_are_not_taken_for_further_seeds(cells, tmp_path):
    store = Store(tmp_path / "smoke", tmp_path)
    for setting in (cells[0].setting, replace(cells[0].setting, base="other", dtype="bfloat16")):
        store.write(replace(cells[0], setting=setting), {})
    with pytest.raises(DataError, match=r"both of the setting smoke but differ in base, dtype: .*--results"):
        by_setting(list(read_results(store.results)))


def test_an_empty_folder_gives_no_page(tmp_path):
    with pytest.raises(DataError, match="holds no results file"):
        write_report(tmp_path, tmp_path / "results.md")
    assert main(["report", "--results", str(tmp_path), "--output", str(tmp_path / "results.md")]) == 1


@pytest.mark.parametrize("name", SUITES)
def test_every_cell_of_a_suite_has_a_key_of_its_own(name):
    cells = list(make_suite(name).cells())
    assert len({cell.key for cell in cells}) == len(cells) == len({cell.name for cell in cells})
    assert all(cell == Cell.of(cell.setting, cell.method, dict(cell.options), cell.seed) for cell in cells)


def test_a_key_changes_with_the_setting_and_not_with_the_order_of_options():
    setting = make_suite("full").settings[0]
    one = Cell.of(setting, "qadapter", {"beta": 1.0, "gamma": 0.9}, 0)
    assert one.key == Cell.of(setting, "qadapter", {"gamma": 0.9, "beta": 1.0}, 0).key
    assert one.key != Cell.of(replace(setting, train_pairs=7), "qadapter", {"beta": 1.0, "gamma": 0.9}, 0).key
    ranked = Cell.of(setting, "qadapter", {"training.lora_r": 2}, 0)
    assert (ranked.setting.training.lora_r, ranked.options) == (2, ())


@pytest.mark.parametrize(
    ("suite", "setting", "method", "options", "key"),
    [
        ("dsp-small", "dsp-entertainment", "qadapter", {"beta": 10.0}, "fc048575c5e0"),
        ("cpu", "hh-harmless", "dpo", {"beta": 0.1}, "9a6524c9b1bf"),
        ("cpu", "terse", "sft", {}, "f65c1de29703"),
    ],
)
def test_a_finished_cell_keeps_its_key(suite, setting, method, options, key):
    """Another key would throw results away: RESULT_VERSION is raised where their meaning changes, and a new field of
    the settings goes into YOUNGER (`cells.py`).
    """
    (setting,) = narrowed(make_suite(suite), [setting], dtype="float32").settings
    assert Cell.of(setting, method, options, 0).key == key


def test_a_suite_can_be_narrowed_and_a_wrong_name_is_refused():
    suite = narrowed(make_suite("full"), ["dsp-business"], ["dpo"], [4], base="tiny", dtype="float32")
    assert {(cell.setting.name, cell.method, cell.seed) for cell in suite.cells()} == {("dsp-business", "dpo", 4)}
    assert {cell.setting.base for cell in suite.cells()} == {"tiny"}
    noise = narrowed(make_suite("full"), ["dsp-business"], ablations=["noise"])
    assert len(list(noise.cells())) == 3 * len(ABLATIONS["noise"])
    for part in ({"settings": ["x"]}, {"methods": ["x"]}):
        with pytest.raises(ConfigError, match="'x' is not in the suite"):
            narrowed(make_suite("full"), **part)


def test_cells_are_chosen_by_name_in_the_order_of_the_patterns(capsys):
    def listed(*patterns):
        code = main(["list", "--suite", "epochs-small", "--dtype", "float32", *patterns])
        return code, capsys.readouterr()

    _, everything = listed()
    code, some = listed("--cells", "polite__dpo__beta-0.1__s1__*", "polite__*__s1__*")
    names = some.out.split()
    assert code == 0
    assert names[:2] == [name for name in everything.out.split() if name.startswith("polite__dpo__beta-0.1__s1__")]
    assert sorted(names) == sorted(
        name for name in everything.out.split() if name.startswith("polite") and "__s1__" in name
    )
    code, none = listed("--cells", "polite*", "no-such*")
    assert (code, none.out) == (1, "")
    assert "--cells 'no-such*' matches no cell of the suite" in none.err


def test_shards_share_the_cells(capsys):
    def listed(shard):
        assert main(["list", "--suite", "cpu", "--shard", shard]) == 0
        return capsys.readouterr().out.split()

    assert sorted(listed("0/2") + listed("1/2")) == sorted(listed("0/1"))


@pytest.mark.parametrize("shard", ["2/2", "1", "0/0", "-1/2", "a/b", "0/2/3", ""])
def test_a_shard_that_there_is_not_is_refused(shard, capsys):
    assert main(["list", "--suite", "cpu", f"--shard={shard}"]) == 1
    assert f"error: --shard {shard!r}: give I/N with I from 0 to N - 1" in capsys.readouterr().err


def test_results_of_another_version_are_left_out(finished, cells, tmp_path):
    result = json.loads(finished.path(cells[0]).read_text())
    result["cell"]["version"] = -1
    (tmp_path / "a__b.json").write_text(json.dumps(result))
    assert list(read_results(tmp_path)) == []
