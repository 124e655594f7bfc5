"""`qadapter export`: a policy for tools that know nothing of streams."""

import shlex
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qadapter.cli import command_parser
from qadapter.cli.options import add_dial_options, add_policy_options, dial_of, require
from qadapter.data.texts import read_prompts
from qadapter.errors import ConfigError
from qadapter.evaluation.progress import progress_bar
from qadapter.new_folders import into_new_folder, require_new_folder, set_mode_of_weights

if TYPE_CHECKING:
    from qadapter.modeling import QAdapterForCausalLM

EXACT = ("merged", "lora", "gguf")
FORMATS = (*EXACT, "distilled", "vllm")
# Settings of the dial besides the strength, and the options that give them.
OPTIONS = {
    "adapter_weights": "--adapter-weights",
    "max_kl": "--cap",
    "min_kl": "--threshold",
    "decay": "--decay",
    "interpolation": "--interpolation",
}


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser("export", "Write a policy as a merged checkpoint, a plain LoRA, GGUF-ready, or for vLLM.")
    add_policy_options(parser)
    add_dial_options(parser)
    parser.add_argument("--output-dir", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="merged",
        help="merged, lora and gguf are the policy at strength 1, or with --interpolation weights at any strength and "
        "weights of a composition, but for rounding; distilled approximates any setting of the dial on your prompts; "
        "vllm is exact at any strength and needs the plugin qadapter-vllm",
    )
    parser.add_argument("--prompts-file", type=Path, help="prompts to distil on (text, one a line, or JSONL)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the prompts' answers when distilling")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer when distilling")
    options = parser.parse_args(arguments)
    dial = dial_of(options)
    # Interpolated weights are one LoRA, at any strength and of any composition.
    interpolated = options.format in EXACT and dial.get("interpolation") == "weights"
    if options.format in EXACT and options.strength != 1.0 and not interpolated:
        raise ConfigError(
            f"--strength {options.strength} cannot be exported exactly: add --interpolation weights, or use --format "
            "distilled (or vllm, to serve it)."
        )
    from qadapter.evaluation.columns import Column

    column = Column("policy", options.strength, **dial)
    further = column.settings().keys() - {"strength", *(("interpolation", "adapter_weights") if interpolated else ())}
    if further and options.format != "distilled":
        raise ConfigError(
            f"{', '.join(sorted(OPTIONS[name] for name in further))} cannot be exported as {options.format}: use "
            "--format distilled."
        )
    if options.epochs < 1:
        raise ConfigError(f"--epochs {options.epochs}: must be at least 1.")
    if options.prompts_file and options.format != "distilled":
        raise ConfigError(f"--prompts-file is for --format distilled, not for {options.format}: drop one of the two.")
    require_new_folder(options.output_dir)
    prompts = []
    if options.format == "distilled":
        file = require(options.prompts_file, "--prompts-file", "FILE (distilling needs your prompts)")
        prompts = [prompt for prompt, _ in read_prompts(file)]

    from qadapter.cli.policies import load_policy, quiet_libraries
    from qadapter.export import export_gguf_ready, export_lora, export_merged, export_vllm

    with quiet_libraries():
        model, tokenizer = load_policy(options)
        strength = options.strength if interpolated else None
        if options.format == "lora":
            export_lora(model, options.output_dir, tokenizer, strength)
            print(f"plain PEFT LoRA written to {options.output_dir}: the policy at strength {options.strength:g}")
        elif options.format == "vllm":
            export_vllm(model, options.output_dir, tokenizer, options.strength)
            print(
                f"folder for vLLM written to {options.output_dir}: vllm serve {shlex.quote(str(options.output_dir))} "
                "--generation-config vllm"
            )
        elif options.format == "distilled":
            _distilled(model, tokenizer, prompts, options, column.settings())
        else:
            export = export_gguf_ready if options.format == "gguf" else export_merged
            difference = export(model, options.output_dir, tokenizer, strength)
            print(f"checkpoint written to {options.output_dir}; largest logit difference {difference:.3g}")
    return 0


def _distilled(
    model: "QAdapterForCausalLM", tokenizer: Any, prompts: list[str], options: Namespace, settings: dict[str, Any]
) -> None:
    from qadapter.evaluation.columns import dial_title
    from qadapter.export import distil

    dial = {name: value for name, value in settings.items() if name != "strength"}
    with progress_bar(Console()) as progress:
        task = progress.add_task("Distilling", total=None)
        result = distil(
            model,
            tokenizer,
            prompts,
            options.strength,
            options.epochs,
            max_new_tokens=options.max_new_tokens,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            dial=dial,
        )
    figures = (
        f"KL(policy ‖ LoRA) on {result.held_out_prompts} held-out prompts: {result.kl_after:.4f} nats a token "
        f"(before distilling {result.kl_before:.4f}, the bare base {result.kl_base:.4f})"
    )
    card = (
        f"# Distilled LoRA\n\nA plain LoRA on {model.base_source.name} that imitates a Q-Adapter policy at "
        f"strength {dial_title(settings)}, distilled on {result.train_prompts} prompts.\n\n{figures}.\n"
    )

    def write(folder: Path) -> None:
        result.student.save_pretrained(folder, save_embedding_layers=False)
        set_mode_of_weights(folder / "adapter_config.json")
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    into_new_folder(options.output_dir, write)
    print(f"plain PEFT LoRA written to {options.output_dir}; {figures}")
