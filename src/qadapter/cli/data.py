"""`qadapter data check`: look at a preference dataset before training."""

from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from qadapter.cli import UsageError, command_parser, json_text
from qadapter.data import check_preferences, render
from qadapter.data.columns import parse_columns


def run(arguments: list[str]) -> int:
    """Run the command; its exit code: 0 if the dataset can be trained on, 1 if it has errors."""
    if not arguments or arguments[0] not in ("check", "-h", "--help"):
        raise UsageError("write qadapter data check FILE_OR_HUB_ID. See qadapter data check --help.")
    parser = command_parser("data check", "Say what a dataset holds, what training would see of it, and what is wrong.")
    parser.add_argument("dataset", help="file, hub id, or builtin")
    parser.add_argument("--model", help="base model, for token counts and the trained part of the examples")
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument(
        "--columns", nargs="*", action="extend", help="your column names: prompt=my_q chosen=good rejected=bad"
    )
    parser.add_argument("--max-length", type=int, default=1024, help="longest prompt and answer together, in tokens")
    parser.add_argument("--max-rows", type=int, help="look at the first rows only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments[1:] if arguments[0] == "check" else arguments)
    tokenizer = base_config = None
    quiet: AbstractContextManager[None] = nullcontext()
    if options.model:
        from qadapter.cli.policies import quiet_datasets
        from qadapter.modeling.bases import load_config, load_tokenizer, resolve_base

        base = resolve_base(options.model)
        tokenizer, base_config, quiet = load_tokenizer(base), load_config(base), quiet_datasets()
    with quiet:
        report = check_preferences(
            options.dataset,
            tokenizer,
            split=options.split,
            columns=parse_columns(options.columns),
            max_length=options.max_length if tokenizer else None,
            max_rows=options.max_rows,
            base_config=base_config,
        )
    if options.json:
        print(json_text(report.to_dict(), indent=2))
    else:
        render(report, Console())
    return 0 if report.ok else 1
