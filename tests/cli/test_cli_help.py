"""Help: of every command, without loading a model, and the same in the documents."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import qadapter, succeeded
from render_help import render

from qadapter.cli import COMMANDS, overview
from qadapter.cli.train import GROUPS, TrainParser, own_arguments
from qadapter.program import called_as
from qadapter.training_arguments import UNFIT

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    out = succeeded(qadapter(command, "--help"))
    assert out.startswith(f"usage: qadapter {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_default_once_and_only_where_there_is_one(command):
    out = " ".join(succeeded(qadapter(command, "--help")).split())
    assert not re.search(r"\(default: (None|False|\[\])\)|\(default: [^)]*\) \(default:", out)


def test_help_and_misspelt_options_wait_for_no_heavy_library():
    """All but `train`, whose parser is transformers' own: torch alone takes seconds to be imported."""
    code = """
import sys
from qadapter.cli import COMMANDS, main
for command in COMMANDS:
    if command != "train":
        assert main([command, "--help"]) == 0
        assert main([command, "x", "--output-dir", "y", "--frobnicate"]) == 2
        heavy = {"torch", "transformers", "peft", "fastapi", "pandas"} & set(sys.modules)
        assert not heavy, f"{command} imports {heavy}"
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("--frobnicate") == len(COMMANDS) - 2  # `data` wants its subcommand first


def test_a_sweep_offers_no_judge():
    assert "--judge" not in succeeded(qadapter("sweep", "--help"))


@pytest.mark.parametrize("arguments", [("--help",), ("-h",)])
def test_help_lists_every_command(arguments):
    out = succeeded(qadapter(*arguments))
    assert all(f"\n  {command} " in out for command in COMMANDS)


def test_no_command_at_all_shows_the_help_and_exits_with_2():
    outcome = qadapter()
    assert (outcome.code, outcome.out) == (2, overview() + "\n")


def test_version_is_printed():
    assert succeeded(qadapter("--version")).startswith("qadapter 0.")


def test_every_option_of_ours_to_train_has_a_help_text():
    known = TrainParser().by_name
    ours = [name for group in GROUPS.values() for name in own_arguments(group)]
    assert [name for name in ours if not known[name].help] == []


def test_the_help_of_train_names_every_option_with_dashes():
    """But those of transformers that are refused, and --debug, which is every command's."""
    named = re.findall(r"--[a-z][\w-]*", succeeded(qadapter("train", "--help")).partition("base model:")[2])
    options = {f"--{name.replace('_', '-')}" for name in TrainParser().by_name}
    refused = {f"--{name.replace('_', '-')}" for name in (*UNFIT, "fp16", "debug")}
    assert refused < options
    assert options - refused <= set(named)
    assert not set(named) & refused
    assert not [name for name in named if "_" in name]


def test_the_help_of_train_is_no_longer_than_a_person_reads():
    assert len(succeeded(qadapter("train", "--help")).splitlines()) < 250


def test_the_document_is_what_the_commands_say():
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run python tests/cli/render_help.py > docs/cli.md"


def test_hints_name_the_program_as_it_can_be_called(tmp_path, monkeypatch):
    """After `make quickstart` it is in the environment's folder only."""
    program = tmp_path / "some where" / "qadapter"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [str(program), "quickstart"])
    assert called_as() == f"'{program}'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert called_as() == "qadapter"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [str(tmp_path / "qadapter" / "__main__.py")])
    assert called_as().endswith(" -m qadapter")
    for other in ("pytest", str(tmp_path / "pytest" / "__main__.py")):
        monkeypatch.setattr("sys.argv", [other])
        assert called_as() == "qadapter"
