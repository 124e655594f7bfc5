"""The documents: their links lead somewhere, their commands have the options shown, the README's Python runs."""

import re
import shlex
from pathlib import Path

import pytest
from commands import QUICK, SHORT, qadapter, succeeded

from qadapter.cli import COMMANDS
from qadapter.config import PRESETS, QAdapterConfig
from qadapter.evaluation.workload import BUDGETS
from qadapter.training_metrics import METRICS, RETAINED_KL

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCUMENTS = [README, CONTRIBUTING, ROOT / "integrations" / "vllm" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(text):
    """The text without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def code(text, language):
    """The blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def anchors(document):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@NAMED
def test_every_link_leads_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@NAMED
def test_commands_have_the_options_that_are_shown(document):
    text = document.read_text()
    lines = "\n".join(code(text, "sh") + code(text, "")).replace("\\\n", " ").splitlines()
    shown = [line for line in lines + re.findall(r"`([^`\n]+)`", prose(text)) if re.match(r"(\S*/)?qadapter \w", line)]
    for words in (shlex.split(line, comments=True) for line in shown):
        if words[1] in COMMANDS:
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert options <= options_of(words[1]), shlex.join(words)


def options_of(command):
    """The options in its help."""
    arguments = ("data", "check") if command == "data" else (command,)
    return set(re.findall(r"--[a-z][\w-]*", succeeded(qadapter(*arguments, "--help"))))


def test_the_folders_and_files_in_the_readme_exist():
    rows = re.findall(r"^\| (`.*?) \|", README.read_text(), re.MULTILINE)
    places = [ROOT, *(ROOT / name for name in ("src/qadapter", "benchmarks", "tests"))]
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert {name for name in names if not any(list(place.glob(name)) for place in places)} == set()
    assert names


def test_the_tests_that_the_method_names_exist():
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/method.md").read_text()))
    functions = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert names - functions == set()
    assert names


def test_the_files_named_to_contributors_exist():
    names = set(re.findall(r"`((?:\w+/)*(?:\w+\.py|\w+/))`", CONTRIBUTING.read_text()))
    places = [ROOT / name for name in ("src/qadapter", "benchmarks", "tests")]
    found = {name for name in names if (ROOT / name).exists() or any(list(place.rglob(name)) for place in places)}
    assert names - found == set()
    assert len(names) > 20


def test_the_budgets_in_the_documents_are_the_code_s():
    rows = re.findall(
        r"^\| `(quick|standard|full)`.*?\|(.*)\|$", (ROOT / "docs/evaluation.md").read_text(), re.MULTILINE
    )
    shown = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert shown == {
        name: ["all" if n is None else str(n) for n in amounts.values()] for name, amounts in BUDGETS.items()
    }


def test_the_metrics_in_the_documents_are_the_code_s():
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs/training.md").read_text(), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row)) == sorted((*METRICS, RETAINED_KL))


def test_the_presets_in_the_documents_are_the_code_s():
    rows = re.findall(r"^\| `(\w+)`[^|]*\| `(\w+)` \|(.*)\|$", (ROOT / "docs/method.md").read_text(), re.MULTILINE)
    assert {name for name, *_ in rows} == set(PRESETS)
    for name, parametrisation, cells in rows:
        *numbers, penalty, returns = (cell.strip() for cell in cells.split("|"))
        alpha_tilde, alpha_0, gamma, floor, beta = map(float, numbers)
        assert QAdapterConfig.preset(name) == QAdapterConfig(
            parametrisation,
            alpha_tilde,
            alpha_0,
            gamma,
            beta,
            {"r²": "reward", "KL": "kl"}[penalty],
            returns == "a token",
            discount_floor=floor,
        )


def test_the_readme_has_the_verdict_of_the_results():
    """Its counts, and the areas in the mean over domains; the larger one is bold where the page says so."""
    own = README.read_text().partition("### Against DPO")[2].partition("\n## ")[0]
    page = (ROOT / "docs" / "results.md").read_text()
    verdict = next(line for line in page.splitlines() if "**Against DPO:" in line)
    wins, total, thirds, _, root_wins, root_thirds, losses, fewer, root_losses, root_fewer, telling = re.findall(
        r"(?<!√)\b\d+\b", verdict
    )
    prose = own.rpartition("|\n")[2]
    told = [wins, total, losses, telling, thirds, total, fewer, root_wins, root_losses, root_thirds, root_fewer]
    assert re.findall(r"\b\d+\b", prose.partition("\nWith answers")[0]) == told
    means = page.partition("**The mean over the domains of DSP**")[2].partition("<details>")[0]
    yardsticks = [(gain, drift) for gain in ("judged samples", "margin") for drift in ("KL", "KL on prose")]
    rows = re.findall(r"^\| \[[^]]+\]\(docs/results/([\w-]+)\.md\) \| (.*) \|$", own, re.MULTILINE)
    assert len(rows) == 3
    for suite, cells in rows:
        for cell, (gain, drift) in zip(cells.split(" | "), yardsticks, strict=True):
            line = next(line for line in means.splitlines() if f"/{suite}.md) | {gain} | {drift} |" in line)
            ours, dpos, _, word = (part.strip() for part in line.split("|")[4:8])
            bold = {"met": f"**{ours}** / {dpos}", "behind": f"{ours} / **{dpos}**"}
            assert cell == bold.get(word, f"{ours} / {dpos}")


# torch says so on every machine without a GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_python_of_the_readme_runs(base, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_bytes(pairs.read_bytes())
    for folder in ("quickstart/adapter", "polite-adapter"):
        command = ("train", "--model", base, "--dataset", pairs, "--output-dir", folder)
        succeeded(qadapter(*command, *QUICK))
    names = {}
    for example in code(README.read_text(), "python"):
        example = example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(base))
        exec(re.sub(r"max_new_tokens=\d+", "max_new_tokens=3", example), names)
    assert (tmp_path / "concise-adapter" / "qadapter_config.json").exists()
    succeeded(qadapter("generate", "both", "--prompt", "Hi", "--adapter-weights", "concise=0.5", "polite=0.2", *SHORT))


def test_the_python_of_the_evaluation_runs(adapter, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path / "cache"))
    Path("my-adapter").symlink_to(adapter)
    Path("held_out.jsonl").write_bytes(pairs.read_bytes())
    (example,) = code((ROOT / "docs" / "evaluation.md").read_text(), "python")
    exec(example, {})
