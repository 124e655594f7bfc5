"""llama.cpp's own converters on what `qadapter export` writes; its programs and its package xllamacpp where they are.

QADAPTER_LLAMA_CPP names a checkout of llama.cpp (the source distribution of llama-cpp-python holds one under
vendor/llama.cpp), QADAPTER_LLAMA_CPP_PYTHON an interpreter with the converters' requirements, if not this one. The
programs are looked for in the checkout's build/bin, then on PATH.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import qadapter, succeeded
from models import lora, tiny_base, train_randomly
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import QAdapterError, QAdapterForCausalLM
from qadapter.modeling.bases import load_tokenizer, resolve_base

CONVERTERS = os.environ.get("QADAPTER_LLAMA_CPP")
PYTHON = os.environ.get("QADAPTER_LLAMA_CPP_PYTHON", sys.executable)
PROMPT = "Why is the sky blue?"
GREEDY = {"do_sample": False, "max_new_tokens": 24}

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.slow,
    pytest.mark.skipif(not CONVERTERS, reason="QADAPTER_LLAMA_CPP names no folder with convert_hf_to_gguf.py"),
]


@pytest.fixture(scope="module", params=["tied", "untied"])
def adapter(request, tmp_path_factory):
    """An adapter folder on a tiny Llama with SmolLM2's tokenizer: the converter knows tokenizers by what they do."""
    try:
        tokenizer = load_tokenizer(resolve_base("builtin"))
    except QAdapterError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp(request.param)
    base = tiny_base(
        vocab_size=len(tokenizer),
        hidden_size=64,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=request.param == "tied",
    )
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    policy = QAdapterForCausalLM.from_base(root / "base", peft_config=lora()).eval()
    train_randomly(policy).save_pretrained(root / "adapter", tokenizer=tokenizer)
    return root / "adapter"


def run_converter(script, *arguments, folder):
    """Run one of llama.cpp's scripts in `folder`."""
    command = [PYTHON, str(Path(CONVERTERS) / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def run_program(name, *arguments, folder):
    """What one of llama.cpp's programs prints, run in `folder`."""
    path = os.pathsep.join([str(Path(CONVERTERS) / "build/bin"), os.environ.get("PATH", os.defpath)])
    if not (program := shutil.which(name, path=path)):
        pytest.skip(f"{name} is neither in build/bin of QADAPTER_LLAMA_CPP nor on PATH")
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, stdin=subprocess.DEVNULL, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(errors="replace")


def command_in(readme, program):
    """The arguments of the only command in a README that calls `program`."""
    lines = [line for line in readme.read_text().splitlines() if line.startswith(f"    {program} ")]
    (arguments,) = (shlex.split(line.removeprefix(f"    {program}")) for line in lines)
    return arguments


def converted(adapter, folder, dtype="float32"):
    """Export the policy into folder/"ready" and convert it with the command in its README; the GGUF file."""
    succeeded(qadapter("export", adapter, "--format", "gguf", "--dtype", dtype, "--output-dir", folder / "ready"))
    arguments = command_in(folder / "ready/README.md", "python llama.cpp/convert_hf_to_gguf.py")
    run_converter("convert_hf_to_gguf.py", *arguments, folder=folder)
    return folder / "ready.gguf"


def prompt_ids(folder, **options):
    """The chat prompt's token ids by the tokenizer in a folder, or in a GGUF file of it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_converted_file_is_the_checkpoint(adapter, dtype, tmp_path):
    """The same token ids, logits and greedy tokens, as transformers reads both; in float32 they are the policy's."""
    file = converted(adapter, tmp_path, dtype)
    ids = prompt_ids(adapter)
    assert torch.equal(prompt_ids(tmp_path, gguf_file=file.name), ids)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "ready", dtype=torch.float32).eval()
    if dtype == "float32":
        expected = QAdapterForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(read, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(read.generate(ids, **GREEDY), expected.generate(ids, **GREEDY))


def test_the_plain_lora_converts_too(adapter, tmp_path):
    """Each of its tensors; those of queries and keys are stored in another order of rows."""
    gguf = pytest.importorskip("gguf", reason="the extra `builtin` brings gguf")
    succeeded(qadapter("export", adapter, "--format", "lora", "--output-dir", tmp_path / "lora"))
    base = ("--base", adapter.parent / "base")
    run_converter(
        "convert_lora_to_gguf.py", "lora", *base, "--outfile", "lora.gguf", "--outtype", "f32", folder=tmp_path
    )
    file = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert file.fields["adapter.lora.alpha"].contents() == 6
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert len(stored) == len(tensors) == 28
    for part in ("A", "B"):
        ours = tensors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{part}.weight"]
        assert torch.equal(stored[f"blk.1.ffn_down.weight.lora_{part.lower()}"], ours)


def test_llama_cpp_writes_what_the_policy_writes_token_for_token(adapter, tmp_path):
    """From the converted checkpoint, and from the converted base with the converted LoRA."""
    pytest.importorskip("xllamacpp", reason="the package xllamacpp, which runs llama.cpp, is not installed")
    merged = converted(adapter, tmp_path)
    run_converter(
        "convert_hf_to_gguf.py", adapter.parent / "base", "--outfile", "base.gguf", "--outtype", "f32", folder=tmp_path
    )
    succeeded(qadapter("export", adapter, "--format", "lora", "--output-dir", tmp_path / "lora"))
    base = ("--base", adapter.parent / "base")
    run_converter(
        "convert_lora_to_gguf.py", "lora", *base, "--outfile", "lora.gguf", "--outtype", "f32", folder=tmp_path
    )
    ids = prompt_ids(adapter)
    policy = QAdapterForCausalLM.from_pretrained(adapter)
    expected = policy.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist()
    assert llama_cpp_tokens(merged, ids) == expected
    assert llama_cpp_tokens(tmp_path / "base.gguf", ids, tmp_path / "lora.gguf") == expected
    assert llama_cpp_tokens(tmp_path / "base.gguf", ids) != expected


def test_the_readme_s_programs_quantise_and_answer(adapter, tmp_path):
    """As they are called there; before quantising, what the policy answers, with the cache in float32 as ours.

    llama-completion says it: llama-cli refuses the broken characters that a random model may write.
    """
    file, readme = converted(adapter, tmp_path), tmp_path / "ready/README.md"
    once = ("-st", "-p", PROMPT, "-n", "24", "--temp", "0", "-t", "1")
    exact = ("--jinja", "-ctk", "f32", "-ctv", "f32", "-fa", "off")
    out = run_program("llama-completion", "-m", file.name, *once, *exact, folder=tmp_path)
    ids = prompt_ids(adapter)
    answer = QAdapterForCausalLM.from_pretrained(adapter).generate(ids, **GREEDY)[0, ids.shape[1] :]
    assert load_tokenizer(adapter).decode(answer, skip_special_tokens=True).strip() in out
    _, quantised, _ = arguments = command_in(readme, "llama-quantize")
    run_program("llama-quantize", *arguments, folder=tmp_path)
    assert (tmp_path / quantised).stat().st_size < file.stat().st_size / 2
    assert PROMPT in run_program("llama-cli", *command_in(readme, "llama-cli"), *once, folder=tmp_path)


def llama_cpp_tokens(file, ids, adapter=None):
    """The greedy tokens of llama.cpp itself, with its cache in float32 as ours."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(settings)
    length = GREEDY["max_new_tokens"]
    options = {"max_tokens": length, "temperature": 0.0, "logprobs": 1, "repeat_penalty": 1.0}
    answer = server.handle_completions({"prompt": ids[0].tolist(), **options})
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
