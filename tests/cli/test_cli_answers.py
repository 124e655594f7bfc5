"""`qadapter generate` and `qadapter chat`: what is said equals what plain transformers computes."""

import json
import re
import shutil
import sys

import models
import pytest
from commands import PROMPT, SHORT, assert_refused, greedy_answer, qadapter, succeeded
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from qadapter import OffInside
from qadapter.cli.chat import converse


@pytest.fixture(scope="module")
def answers(adapter, base):
    """(the base's answer, the policy's) to PROMPT, different ones."""
    of_base = greedy_answer(base, PROMPT)
    of_policy = succeeded(qadapter("generate", adapter, "--prompt", PROMPT, *SHORT)).strip()
    assert of_policy != of_base
    return of_base, of_policy


# -- generate ------------------------------------------------------------------------------------------------------


def test_strength_0_prints_the_base_models_answer(adapter, answers):
    outcome = qadapter("generate", adapter, "--prompt", PROMPT, "--strength", 0, *SHORT)
    assert succeeded(outcome).strip() == answers[0]


def test_interpolated_weights_answer_as_the_base_with_the_scaled_lora(adapter, base, tmp_path):
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter / "adapters" / "default")
    for layer in lora.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(2.5)
    lora.merge_and_unload().save_pretrained(tmp_path)
    shutil.copytree(base, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    options = ("--strength", 2.5, "--interpolation", "weights", *SHORT)
    written = greedy_answer(tmp_path, PROMPT)
    assert succeeded(qadapter("generate", adapter, "--prompt", PROMPT, *options)).strip() == written
    by_logits = succeeded(qadapter("generate", adapter, "--prompt", PROMPT, "--strength", 2.5, *SHORT)).strip()
    assert by_logits != written


def test_code_and_the_like_are_left_to_the_base(adapter, answers, monkeypatch):
    options = ("generate", adapter, "--prompt", PROMPT, *SHORT, "--off-inside")
    assert succeeded(qadapter(*options)).strip() == answers[1]  # there is none of it in the answer
    monkeypatch.setattr(OffInside, "off", lambda self, text: True)
    assert succeeded(qadapter(*options)).strip() == answers[0]
    outcome = qadapter(*options, "--interpolation", "weights")
    assert_refused(outcome, 'a callable strength cannot be used with interpolation="weights"')


def test_a_threshold_leaves_tokens_to_the_base(adapter):
    def answer(*options):
        return qadapter("generate", adapter, "--prompt", PROMPT, *SHORT, *options).out

    base = answer("--strength", 0)
    assert answer("--strength", 2, "--threshold", 1e6) == base != answer("--strength", 2, "--threshold", 1e-9)
    outcome = qadapter("generate", adapter, "--prompt", PROMPT, "--threshold", -1, *SHORT)
    assert_refused(outcome, "--threshold -1: must be a finite number of nats, 0 or above")
    outcome = qadapter("generate", adapter, "--prompt", PROMPT, "--threshold", 1, "--interpolation", "weights", *SHORT)
    assert_refused(outcome, 'min_kl cannot be used with interpolation="weights"')


def test_a_cap_and_weights_are_those_of_the_dial(adapter, answers):
    def answer(*options):
        return succeeded(qadapter("generate", adapter, "--prompt", PROMPT, *options, *SHORT)).strip()

    base, policy = answers
    assert answer("--cap", 0) == base
    assert answer("--cap", 1e6) == policy
    assert answer("--adapter-weights", "default=0") == base
    assert answer("--adapter-weights", "default=2") == answer("--strength", 2) != policy
    for options, message in (
        (("--cap", "nan"), "--cap nan: must be a finite number of nats, 0 or above."),
        (("--adapter-weights", "other=1"), "adapter_weights names ['other']; the adapters are ['default']."),
    ):
        assert_refused(qadapter("generate", adapter, "--prompt", PROMPT, *options, *SHORT), re.escape(message))


def test_a_decay_of_interpolated_weights_is_refused(adapter):
    outcome = qadapter("generate", adapter, "--prompt", PROMPT, "--interpolation", "weights", "--decay", 0.9, *SHORT)
    assert_refused(outcome, 'a decay cannot be used with interpolation="weights"')


def test_compare_shows_both_answers(adapter, answers):
    outcome = qadapter("generate", adapter, "--prompt", PROMPT, "--compare", *SHORT)
    assert succeeded(outcome) == f"> {PROMPT}\n[base] {answers[0]}\n\n[policy] {answers[1]}\n\n"


def test_json_is_one_object_a_prompt(adapter, answers):
    prompts = ("--prompt", PROMPT, "--prompt", "Why?")
    lines = succeeded(qadapter("generate", adapter, *prompts, "--compare", "--json", *SHORT)).splitlines()
    first, second = map(json.loads, lines)
    assert first == {"prompt": PROMPT, "strength": 1.0, "base": answers[0], "policy": answers[1]}
    assert second["prompt"] == "Why?"


def test_a_prompt_on_standard_input_is_answered(adapter, answers):
    assert succeeded(qadapter("generate", adapter, *SHORT, stdin=f"{PROMPT}\n")).strip() == answers[1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", f"\n{PROMPT}\n\nWhy?\n"),
        ("prompts.jsonl", f'{{"prompt": "{PROMPT}"}}\n{{"prompt": "Why?", "more": 1}}\n'),
        ("dos.jsonl", f'\ufeff{{"prompt": "{PROMPT}"}}\r\n{{"prompt": "Why?"}}\r\n'),
    ],
)
def test_prompts_come_from_a_file(adapter, answers, tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    out = succeeded(qadapter("generate", adapter, "--prompts-file", tmp_path / name, *SHORT))
    assert out.startswith(f"> {PROMPT}\n{answers[1]}\n\n> Why?\n")


def test_a_line_separator_inside_a_json_prompt_is_part_of_it(adapter, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
    outcome = qadapter("generate", adapter, "--prompts-file", path, "--json", *SHORT)
    assert json.loads(succeeded(outcome))["prompt"] == "one\u2028two"


def test_a_batch_of_no_prompts_is_refused_for_one_prompt_too(adapter):
    outcome = qadapter("generate", adapter, "--prompt", PROMPT, "--batch-size", 0)
    assert_refused(outcome, "batch_size = 0: must be at least 1")


def test_sampling_repeats_with_its_seed(adapter):
    options = ("--prompt", PROMPT, "--temperature", 2, *SHORT)
    first, again, other = (succeeded(qadapter("generate", adapter, *options, "--seed", s)) for s in (5, 5, 6))
    assert first == again != other


@pytest.mark.filterwarnings("default:.*the base model differs")
def test_no_verify_turns_the_refusal_of_another_base_into_a_warning(adapter, other_base):
    options = ("--prompt", PROMPT, "--base-model", other_base, *SHORT)
    assert_refused(qadapter("generate", adapter, *options), "the base model differs: trained on '.*tiny-llama'")
    outcome = qadapter("generate", adapter, *options, "--no-verify")
    succeeded(outcome)
    assert re.fullmatch(r"warning: .*the base model differs[^\n]+\n", outcome.err)


def test_half_precision_that_changes_the_weights_is_refused_with_the_reason(adapter):
    outcome = qadapter("generate", adapter, "--prompt", PROMPT, "--dtype", "float16")
    assert_refused(outcome, "the base model differs: .* In float16 the same weights differ: try bfloat16 or float32")


# -- chat ----------------------------------------------------------------------------------------------------------


def chat(adapter, *lines, options=SHORT):
    return succeeded(qadapter("chat", adapter, *options, stdin="".join(f"{line}\n" for line in lines)))


def test_chat_answers_at_the_strength_of_the_dial(adapter, answers):
    out = chat(adapter, "/strength 0", PROMPT, "/reset", "/strength 1", PROMPT, "/exit")
    assert out.splitlines()[1:] == [f"[1] > [0] > {answers[0]}", f"[0] > [0] > [1] > {answers[1]}", "[1] > "]


def test_chat_remembers_what_was_said_until_reset(adapter, answers):
    out = chat(adapter, PROMPT, PROMPT, "/reset", PROMPT)
    first, second, third, _ = out.splitlines()[1:]
    assert first == f"[1] > {answers[1]}"
    assert second != first
    assert third == f"[1] > [1] > {answers[1]}"


def test_chat_begins_with_the_system_message_also_after_reset(adapter):
    system = ("--system", "Be brief.")
    out = chat(adapter, PROMPT, "/reset", PROMPT, options=(*SHORT, *system)).splitlines()
    assert out[2] == f"[1] > {out[1]}"
    assert out[1] != chat(adapter, PROMPT).splitlines()[1]


def test_chat_ends_with_its_input(adapter):
    assert chat(adapter).endswith("[1] > \n")


@pytest.mark.parametrize("line", ["/strength", "/strength x", "/strength nan", "/strength inf", "/strength 1e5"])
def test_chat_keeps_its_strength_when_given_none(adapter, line):
    out = chat(adapter, "/strength 0.5", line, "/exit")
    assert f"'{line}': write /strength and a number" in out
    assert out.endswith("[0.5] > ")


def test_chat_explains_unknown_commands(adapter):
    assert chat(adapter, "/hepl").count("/strength X sets the dial") == 2


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(capsys):
    heard = []

    def answer(messages, strength):
        heard.append([message["content"] for message in messages])
        yield "Because "
        raise KeyboardInterrupt

    lines = iter(["Why?", "And?", "/exit"])
    assert converse(answer, 1.0, None, read=lambda _: next(lines)) == 0
    assert capsys.readouterr().out == "Because \nBecause \n"
    assert heard == [["Why?"], ["Why?", "Because ", "And?"]]


def test_an_answer_that_fails_is_said_and_the_chat_goes_on(capsys):
    heard = []

    def answer(messages, strength):
        heard.append([message["content"] for message in messages])
        yield "Because"
        if messages[-1]["content"] == "Why?":
            raise RuntimeError("out of\nmemory")

    lines = iter(["Hi", "Why?", "And?", "/exit"])
    assert converse(answer, 1.0, None, read=lambda _: next(lines)) == 0
    assert heard == [["Hi"], ["Hi", "Because", "Why?"], ["Hi", "Because", "And?"]]
    assert "error: out of memory\nThe message was taken back" in capsys.readouterr().out


def test_ctrl_c_at_the_prompt_of_a_chat_exits_with_130(adapter, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qadapter.cli.chat.converse", press)
    outcome = qadapter("chat", adapter)
    assert (outcome.code, outcome.err) == (130, "error: interrupted.\n")


@pytest.mark.parametrize("option", [("--temperature", -1), ("--max-new-tokens", 0), ("--top-p", 2)])
def test_chat_refuses_impossible_sampling_before_it_loads_anything(tmp_path, option):
    assert_refused(qadapter("chat", tmp_path / "no-adapter", *option), f"{option[0][2:].replace('-', '_')} = ")


def test_a_line_with_bytes_that_are_no_text_does_not_end_the_chat(capsys):
    """A terminal's input has them as halves of surrogate pairs, or cannot be decoded."""
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    lines, heard = iter(["caf\udce9", undecodable, "Why?", "/exit"]), []

    def read(_):
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    def answer(messages, strength):
        heard.append([message["content"] for message in messages])
        yield "Because."

    assert converse(answer, 1.0, None, read=read) == 0
    assert heard == [["Why?"]]
    assert capsys.readouterr().out == 2 * "the line is no text in this terminal's encoding: nothing was sent\n" + (
        "Because.\n"
    )


def test_the_keys_that_edit_a_line_work_in_a_chat(tmp_path, monkeypatch):
    """`input` edits lines once readline is imported; an arrow put its escape code into the message."""
    pytest.importorskip("readline", reason="this Python edits no lines")
    monkeypatch.delitem(sys.modules, "readline")
    qadapter("chat", tmp_path / "no-adapter")
    assert "readline" in sys.modules


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_variables_of_the_chat_template_reach_the_prompt(adapter, monkeypatch, command):
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}{{ style | default('') }}"
    monkeypatch.setattr("qadapter.cli.policies.tokenizer_of", lambda *_: models.tiny_tokenizer(template))
    lengths = []
    monkeypatch.setattr("qadapter.generation._warn_beyond_context", lambda _, length: lengths.append(length))
    for options in ((), ("--chat-template-kwargs", '{"style": "abc"}')):
        outcome = qadapter(command, adapter, "--max-new-tokens", 1, *options, stdin="hi\n")
        assert outcome.code == 0, outcome.err
    assert lengths == [3, 6]
    refused = qadapter(command, adapter, "--chat-template-kwargs", '{"thinking": false}', stdin="hi\n")
    assert_refused(refused, "reads no variable 'thinking'")
