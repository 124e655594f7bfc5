"""A base from a GGUF file (`load_gguf` makes the built-in one, too): its dtype, and a template where there is none."""

import copy

import models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import gguf_base


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_the_folder_holds_the_model_in_bfloat16_and_a_template(monkeypatch, tmp_path, template):
    base, tokenizer = models.tiny_base(), models.tiny_tokenizer(template)
    monkeypatch.setattr(gguf_base, "load_gguf", lambda file: (copy.deepcopy(base), tokenizer))
    gguf_base.write_base(tmp_path / "model.gguf", tmp_path / "base")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert written.dtype == torch.bfloat16
    for name, weight in base.state_dict().items():
        assert torch.equal(written.state_dict()[name], weight.bfloat16()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "base").chat_template == (template or gguf_base.PLAIN_CHAT)


def test_the_plain_template_ends_answers_and_opens_the_next():
    tokenizer = models.tiny_tokenizer(gguf_base.PLAIN_CHAT)
    turns = [{"role": "user", "content": " why? "}, {"role": "assistant", "content": "so "}]
    text = tokenizer.apply_chat_template([*turns, turns[0]], tokenize=False, add_generation_prompt=True)
    start, end = tokenizer.bos_token or "", tokenizer.eos_token
    assert text == f"{start}User: why?\nAssistant: so{end}\nUser: why?\nAssistant:"
    assert tokenizer.apply_chat_template(turns, tokenize=False).endswith(f"so{end}\n")
