"""`qadapter wrap`: any PEFT LoRA as an adapter folder, without training."""

import shlex
from pathlib import Path

from qadapter.cli import command_parser
from qadapter.cli.policies import DTYPES, pick_dtype, quiet_libraries
from qadapter.export.folders import require_new_folder
from qadapter.modeling.wrapping import wrap


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser(
        "wrap", "Make any PEFT LoRA (trained by TRL, axolotl, ...) an adapter folder: dial, composition, audit, server."
    )
    parser.add_argument("lora", help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--output-dir", type=Path, required=True, help="the adapter folder to write")
    parser.add_argument("--base-model", default=None, help="base model instead of the one that the LoRA names")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
    options = parser.parse_args(arguments)
    require_new_folder(options.output_dir)
    with quiet_libraries():
        model, tokenizer = wrap(options.lora, options.base_model, dtype=pick_dtype(options.dtype))
        model.save_pretrained(options.output_dir, tokenizer=tokenizer)
    folder = shlex.quote(str(options.output_dir))
    print(f"adapter written to {options.output_dir}; try: qadapter chat {folder} --strength 0.5")
    return 0
