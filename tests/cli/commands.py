"""Running the command line: in this process, or as a process of its own; and what a refusal looks like."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch

from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter.cli import main
from qadapter.modeling.manifest import MANIFEST_NAME

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",
}
# Enough for greedy answers of the tiny model to change, and as fast as it gets.
QUICK = ("--max-steps", 4, "--learning-rate", 0.05, "--beta", 0.1, "--use-cpu", "--logging-steps", 1)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

PROMPT = "Question 3?"
SHORT = ("--max-new-tokens", 12)


class Outcome(NamedTuple):
    """What a command gave back: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str


def qadapter(*arguments, stdin=""):
    """The outcome of `qadapter ARGUMENTS`, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", io.StringIO(stdin)):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def succeeded(outcome):
    """The outcome's standard output, once it is known to be a success."""
    assert outcome.code == 0, outcome.err
    return outcome.out


def adapter_settings(folder):
    """What `qadapter info --json` says of the adapter in a folder."""
    return json.loads(succeeded(qadapter("info", folder, "--json")))["adapters"]["default"]


def assert_refused(outcome, match, code=1, folder=None):
    """The command ended with `code` and one line on standard error that matches; `folder` holds no adapter."""
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
    assert re.search(match, outcome.err), outcome.err
    assert outcome.code == code
    assert folder is None or not (folder / MANIFEST_NAME).exists()


def greedy_answer(folder, prompt, tokens=12):
    """What a plain transformers model in `folder` answers, its chat template filled in by hand."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"user: {prompt}</s>assistant: ", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True).strip()


def start(*arguments, **options):
    """`python -m qadapter ARGUMENTS` as a process with pipes, which hears Ctrl-C.

    A process that a shell put into the background ignores it, and so would what it starts.
    """
    command = [sys.executable, "-m", "qadapter", *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    settings = {**pipes, "preexec_fn": hear_interrupts, **options}
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, encoding="utf-8", **settings)


def hear_interrupts():
    """Let SIGINT do what it does by default."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def process(*arguments, stdin="", **options):
    """The outcome of `python -m qadapter ARGUMENTS`."""
    with start(*arguments, **options) as running:
        out, err = running.communicate(stdin, timeout=100)
    return Outcome(running.returncode, out, err)


def contents(folder):
    """{path in the folder: bytes} of all its files."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
