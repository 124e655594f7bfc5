"""`qadapter wrap`: any PEFT LoRA as an adapter folder, without training."""

import os
import shlex
from contextlib import ExitStack
from pathlib import Path

from qadapter.cli import command_parser
from qadapter.cli.options import DTYPES
from qadapter.errors import ConfigError
from qadapter.new_folders import removed_on_error, require_new_folder
from qadapter.program import called_as


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser(
        "wrap", "Make any PEFT LoRA (trained by TRL, axolotl, ...) an adapter folder: dial, composition, audit, server."
    )
    parser.add_argument("lora", help="folder or hub id with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--output-dir", type=Path, required=True, help="the adapter folder to write")
    parser.add_argument("--base-model", default=None, help="base model instead of the one that the LoRA names")
    parser.add_argument(
        "--new-base",
        type=Path,
        default=None,
        help="where embeddings were trained or resized along with the LoRA: folder to write a base model with them to",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
    options = parser.parse_args(arguments)
    for folder in filter(None, (options.output_dir, options.new_base)):
        require_new_folder(folder)
    if options.new_base is not None and options.new_base.resolve() == options.output_dir.resolve():
        raise ConfigError(f"--new-base {options.new_base} is --output-dir too: a base and an adapter need one each.")

    from qadapter.cli.policies import quiet_libraries
    from qadapter.devices import pick_dtype
    from qadapter.modeling.wrapping import wrap

    there = options.new_base is not None and options.new_base.exists()
    with quiet_libraries(), ExitStack() as on_error:
        dtype = pick_dtype(options.dtype)
        model, tokenizer = wrap(options.lora, options.base_model, new_base=options.new_base, dtype=dtype)
        new = options.new_base is not None and model.base_source.path == os.path.abspath(options.new_base)
        if new:
            on_error.enter_context(removed_on_error(options.new_base, keep=there))
        model.save_pretrained(options.output_dir, tokenizer=tokenizer)
    if options.new_base is not None:
        written = "a base model with the LoRA's own embeddings" if new else "not needed: nothing"
        print(f"{written} written to {options.new_base}")
    folder = shlex.quote(str(options.output_dir))
    command = "chat" if tokenizer is not None and tokenizer.chat_template else "generate"
    print(f"adapter written to {options.output_dir}; try: {called_as()} {command} {folder} --strength 0.5")
    return 0
