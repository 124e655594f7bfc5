"""`qadapter train`: YAML and command line to a run; the command line beats YAML, YAML beats preset and defaults."""

import argparse
import dataclasses
import difflib
import inspect
import logging
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from qadapter.cli import UsageError, did_you_mean, one_line, unknown_option
from qadapter.cli.options import require
from qadapter.cli.policies import quiet_datasets, quiet_libraries
from qadapter.cli.train_help import TEXTS, USAGE, TrainFormatter, help_text
from qadapter.config import QAdapterConfig
from qadapter.devices import default_device
from qadapter.errors import ConfigError, TrainingError
from qadapter.modeling.manifest import MAX_JSON_BYTES
from qadapter.program import called_as
from qadapter.run_settings import AdapterArguments, DataArguments, ModelArguments, Run, RunArguments
from qadapter.trainer import QAdapterTrainer
from qadapter.training import train
from qadapter.training_arguments import QAdapterTrainingArguments

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Train a Q-Adapter on preference pairs. The command line beats --config, which beats --preset and the defaults; "
    "dashes and underscores are the same in names."
)
GROUPS = {
    "base model": ModelArguments,
    "pairs": DataArguments,
    "run": RunArguments,
    "method": QAdapterConfig,
    "LoRA": AdapterArguments,
    "training": QAdapterTrainingArguments,
}
# What TRL's scripts call our options.
NAMES_IN_TRL = {
    "model_name_or_path": "model",
    "model_revision": "revision",
    "dataset_name": "dataset",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_split",
}

# Options of NAME=VALUE entries, for which a mapping in YAML says the same.
MAPPINGS = ("dataset", "columns")
NOT_PLAIN = bool | list | dict | None
# Numbers that are text to YAML 1.1, which wants a dot and a sign: 1e-5, 1.0e5.
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class TrainParser(HfArgumentParser):
    """The parser of all groups, and of --config; its errors are UsageErrors."""

    def __init__(self) -> None:
        super().__init__(
            list(GROUPS.values()), prog="qadapter train", usage=USAGE, description=DESCRIPTION,
            formatter_class=TrainFormatter, allow_abbrev=False,
        )  # fmt: skip
        self.add_argument("--config", type=Path, default=None, help="YAML file with any of these options")
        inherited = {field.name: field.metadata.get("help") for field in dataclasses.fields(TrainingArguments)}
        texts = inherited | documented_arguments(QAdapterConfig)
        for action in self._actions:
            action.help = TEXTS.get(action.dest) or action.help or texts.get(action.dest)

    @property
    def by_name(self) -> dict[str, argparse.Action]:
        """The options that a YAML file may hold; the first of those that set the same value."""
        named: dict[str, argparse.Action] = {}
        for action in self._actions:
            named.setdefault(action.dest, action)
        return {name: action for name, action in named.items() if name not in ("help", "config")}

    def format_help(self) -> str:
        """What --help prints."""
        own = {title: own_arguments(group) for title, group in GROUPS.items()}
        own["run"] = ["output_dir", "config", *own["run"], "help"]
        further = {name: self._option_string_actions[f"--{name}"] for name in ("config", "help")}
        return help_text(self, own, self.by_name | further)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        unknown = unknown_option(message)
        near = _nearest(unknown.strip("-").replace("-", "_"), self.by_name) if unknown else None
        recipe = re.match(r"unrecognized arguments: ([^\s-]\S*\.ya?ml)\b", message)
        meant = f"--config {recipe[1]}" if recipe else near and f"--{near.replace('_', '-')}"
        raise UsageError(f"{message}.{did_you_mean(meant)} See qadapter train --help.")


def own_arguments(group: type) -> list[str]:
    """The arguments that transformers' do not hold."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    return [field.name for field in dataclasses.fields(group) if field.name not in inherited]


def documented_arguments(described: type) -> dict[str, str]:
    """{argument: description} from the Args section of a docstring."""
    section = inspect.getdoc(described).partition("Args:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    with quiet_libraries(), quiet_datasets():
        described = parse(arguments)
        trainer = train(described)
        folder = described.training.output_dir
        metrics = None if trainer.eval_dataset is None else evaluated(trainer)
        if not trainer.is_world_process_zero():
            return 0
        if metrics is not None:
            print(
                f"held out: accuracy {metrics['eval_rewards/accuracies']:.3f}, "
                f"KL from the base {metrics['eval_qadapter/kl']:.4f} per token"
            )
        command = "chat" if trainer.processing_class.chat_template else "generate"
        print(f"adapter written to {folder}; try: {called_as()} {command} {shlex.quote(str(folder))}")
    return 0


def evaluated(trainer: QAdapterTrainer) -> dict[str, float]:
    """Metrics on the held-out pairs, measured once the adapter has been saved unless the last step's are known.

    Raises:
        TrainingError: they cannot be measured; it says that the adapter is there, as KeyboardInterrupt does.
    """
    # The best checkpoint's weights may be another step's.
    if not trainer.args.load_best_model_at_end:
        for entry in trainer.state.log_history:
            if entry["step"] == trainer.state.global_step and "eval_loss" in entry:
                return entry
    written = f"the adapter is written to {trainer.args.output_dir}, but"
    try:
        return trainer.evaluate()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {written} not evaluated.") from None
    except Exception as error:
        raise TrainingError(f"{written} its evaluation failed: {one_line(error)}") from error


def parse(arguments: list[str]) -> Run:
    """The run that the arguments (and the YAML file among them) describe.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or something needed that is missing.
    """
    parser = TrainParser()
    for name, action in parser.by_name.items():
        if action.nargs in ("*", "+") and (count := _times_given(arguments, name)) > 1:
            option = f"--{name.replace('_', '-')}"
            logger.warning("%s is given %d times and the last one counts: write all values behind one.", option, count)
    first = parser.parse_known_args(arguments)[0]
    from_yaml = read_yaml(first.config, parser) if first.config else {}
    preset = first.preset if _times_given(arguments, "preset") else from_yaml.get("preset", "default")
    method = QAdapterConfig.preset(preset).to_dict()
    # Pinning elsewhere, torch would warn that it cannot.
    machine = {"dataloader_pin_memory": default_device() == "cuda", "disable_tqdm": not sys.stderr.isatty()}
    parser.set_defaults(**{**machine, **method, **from_yaml})
    values = parser.parse_args(arguments)
    require(values.model, "--model", "ID_OR_PATH (or builtin)")
    require(values.dataset, "--dataset", "FILE_OR_HUB_ID (or builtin)")
    require(values.output_dir, "--output-dir", "DIR")
    evaluates = values.eval_dataset or values.eval_fraction
    if evaluates and "eval_strategy" not in from_yaml and not _times_given(arguments, "eval_strategy"):
        parser.set_defaults(eval_strategy="steps" if values.eval_steps else "epoch")
    try:
        groups = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, ImportError) as error:  # transformers' own checks of its arguments
        raise ConfigError(f"{error} See qadapter train --help.") from error
    model, data, run_arguments, method, adapter, training = groups[:6]
    return Run(model, data, adapter, method, training, run_arguments.overwrite)


def _times_given(arguments: list[str], name: str) -> int:
    spellings = (f"--{name}", f"--{name.replace('_', '-')}")
    return sum(argument.split("=", 1)[0] in spellings for argument in arguments)


def read_yaml(path: Path, parser: TrainParser) -> dict[str, Any]:
    """The options in a YAML file, unknown keys refused with the nearest known one."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read.")
        text = path.read_text(encoding="utf-8")
        values, entries = yaml.safe_load(text), _entries(yaml.compose(text, yaml.SafeLoader))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold options as `name: value` lines.")
    known = parser.by_name
    names = [key.replace("-", "_") for key, _ in entries]
    for name in names:
        if name not in known:
            near = _nearest(name, known)
            hint = did_you_mean(near and repr(near))
            raise ConfigError(f"{path}: unknown key {name!r}.{hint} See qadapter train --help.")
    _refuse_repeated(names, str(path))
    for name, (_, node) in zip(names, entries, strict=True):
        if name in MAPPINGS:
            _refuse_repeated([key for key, _ in _entries(node)], f"{path}: {name}")
    kinds = {name: kind for group in GROUPS.values() for name, kind in get_type_hints(group).items()}
    options = {str(key).replace("-", "_"): value for key, value in values.items()}
    return {name: _typed(path, name, value, known[name], kinds[name]) for name, value in options.items()}


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The option that is meant, our own before those of transformers; None if nothing is near."""
    if name in NAMES_IN_TRL:
        return NAMES_IN_TRL[name]
    own = [name for group in GROUPS.values() for name in own_arguments(group)]
    near = difflib.get_close_matches(name, own, n=1) or difflib.get_close_matches(name, known, n=1)
    return near[0] if near else None


def _entries(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    """The keys and values of a YAML mapping, with the keys that are repeated."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [(str(key.value), value) for key, value in pairs]


def _refuse_repeated(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: {name!r} is there {names.count(name)} times: keep one.")


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _with_numbers(value: Any) -> Any:
    """The value with the numbers in it as numbers."""
    if isinstance(value, dict):
        return {name: _with_numbers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_with_numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _typed(path: Path, name: str, value: Any, action: argparse.Action, kind: Any) -> Any:
    """A YAML value as the option's type; text goes through the option's own parser.

    Raises:
        ConfigError: a value of another type, or none of the option's choices.
    """
    members = {get_origin(member) or member for member in (get_args(kind) if _is_union(kind) else (kind,))}
    if value is False and "no" in (action.choices or ()):
        value = "no"  # YAML reads a bare `no` as false
    if name in MAPPINGS and isinstance(value, dict) and not any(isinstance(v, NOT_PLAIN) for v in value.values()):
        value = [f"{key}={entry}" for key, entry in value.items()]
    allowed = members & {NoneType, bool, list, dict}
    if type(value) in allowed and not (isinstance(value, list) and action.nargs):
        return _with_numbers(value)
    items = value if isinstance(value, list) and list in members else [value]
    if any(isinstance(item, NOT_PLAIN) for item in items):
        raise ConfigError(f"{path}: {name} = {value!r} has the wrong type. See qadapter train --help.")
    parse: Any = action.type or str
    try:
        parsed = [parse(str(item)) for item in items]
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"{path}: {name} = {value!r} has the wrong type ({error}).") from error
    if action.choices is not None and parsed[0] not in action.choices:
        raise ConfigError(f"{path}: {name} = {value!r}: choose one of {', '.join(map(str, action.choices))}.")
    return parsed if action.nargs in ("*", "+") else parsed[0]
