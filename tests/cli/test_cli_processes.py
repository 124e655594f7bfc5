"""What only a real process shows: pipes, signals, exit codes, limits of the system."""

import io
import json
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from commands import ENVIRONMENT, QUICK, Outcome, assert_refused, process, qadapter, start, succeeded

from qadapter.cli import main
from qadapter.training_log import read_log


def test_exit_codes_reach_the_shell():
    assert process("--version").code == 0
    assert_refused(process("trian"), "unknown command 'trian'", code=2)


def test_a_piped_prompt_is_answered_as_in_process(adapter):
    """The one test of a process that loads a model and answers; also that nothing but the answer is printed."""
    options = ("generate", adapter, "--max-new-tokens", 12)
    expected = succeeded(qadapter(*options, "--prompt", "Why?"))
    assert process(*options, stdin="Why?\n") == Outcome(0, expected, "")


def test_characters_that_the_output_encoding_lacks_are_escaped(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "σ", "chosen": "–", "rejected": "b"}))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert main(["data", "check", str(path)]) == 0
    assert b"\\u03c3[[\\u2013]]" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("arguments", [("--help",), ("data", "check", "builtin", "--json")])
def test_a_reader_that_leaves_ends_the_command_quietly(arguments):
    """Like `| head`, but gone before the first byte."""
    with start(*arguments) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait(100) == 1


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_a_checkpoint_from_which_the_run_completes(base, pairs, tmp_path):
    folder = tmp_path / "run"
    options = ("train", "--model", base, "--dataset", pairs, "--output-dir", folder, *QUICK)
    with start(*options, "--max-steps", 100_000) as running:
        lines = iter(running.stdout.readline, "")
        assert any(": loss " in line for line in lines)  # training has begun
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=100)
    assert_refused(Outcome(running.returncode, "", err), "interrupted after step", code=130, folder=folder)
    step = int(re.search(r"after step (\d+) of 100000", err)[1])
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    succeeded(qadapter(*options, "--resume-from-checkpoint", "last", "--max-steps", step + 2))
    logged = [entry["step"] for entry in read_log(folder / "training_log.jsonl") if "loss" in entry]
    assert logged == list(range(1, step + 3))


def test_a_limit_on_file_sizes_is_a_full_disk(base, pairs, tmp_path):
    folder = tmp_path / "run"
    options = ("--model", base, "--dataset", pairs, "--output-dir", folder, *QUICK, "--max-steps", 1)
    command = [sys.executable, "-m", "qadapter", "train", *map(str, options)]
    limited = ["sh", "-c", 'ulimit -f 20 && exec "$@"', "sh", *command]  # blocks: 10 or 20 KB, the adapter has 33
    ended = subprocess.run(limited, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False)
    outcome = Outcome(ended.returncode, ended.stdout, ended.stderr)
    assert_refused(outcome, "no space left on the device while writing", folder=folder)


@pytest.mark.slow
def test_an_audit_that_is_killed_goes_on_where_it_stopped(adapter, pairs, tmp_path, monkeypatch):
    """Killed without a chance to clean up; the second audit takes the stored parts and ends as a whole one does."""
    monkeypatch.setitem(ENVIRONMENT, "QADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path / "cache"))
    options = ("audit", adapter, "--dataset", pairs, "--no-card", "--max-new-tokens", 40, "--judge", "rule:json")
    killed = ("--output-dir", tmp_path / "killed")
    with start(*options, *killed) as running:
        while not list((tmp_path / "cache").glob("evaluation/pairs-*.json")):
            assert running.poll() is None
            time.sleep(0.002)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "audit.json").exists()
    succeeded(qadapter(*options, *killed))
    succeeded(qadapter(*options, "--no-cache", "--output-dir", tmp_path / "whole"))
    resumed, whole = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("killed", "whole"))
    assert "pairs" in resumed.pop("environment")["reused_parts"]
    assert whole.pop("environment")["reused_parts"] == []
    assert resumed == whole


def test_help_takes_less_than_half_a_second_of_a_core():
    def seconds():
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime  # by the clock, a busy machine would decide

    begin = seconds()
    assert process("--help").code == 0
    assert seconds() - begin < 0.5


def test_help_imports_none_of_the_heavy_libraries():
    code = (
        "import sys; from qadapter.cli import main; main(['--help']); "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'rich'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
