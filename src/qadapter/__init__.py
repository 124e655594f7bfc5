"""Customise a language model to new preferences without losing what it can do."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public names and where they live; resolved on first use so that `import qadapter` does not import torch.
_EXPORTS = {
    "AdapterFormatError": "qadapter.errors",
    "ConfigError": "qadapter.errors",
    "DataError": "qadapter.errors",
    "OffInside": "qadapter.modeling.conditions",
    "QAdapterConfig": "qadapter.config",
    "QAdapterError": "qadapter.errors",
    "QAdapterForCausalLM": "qadapter.modeling",
    "QAdapterTrainer": "qadapter.trainer",
    "QAdapterTrainingArguments": "qadapter.training_arguments",
    "StepState": "qadapter.modeling.mixing",
    "TrainingError": "qadapter.errors",
    "load_preference_dataset": "qadapter.data",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from qadapter.config import QAdapterConfig as QAdapterConfig
    from qadapter.data import load_preference_dataset as load_preference_dataset
    from qadapter.errors import AdapterFormatError as AdapterFormatError
    from qadapter.errors import ConfigError as ConfigError
    from qadapter.errors import DataError as DataError
    from qadapter.errors import QAdapterError as QAdapterError
    from qadapter.errors import TrainingError as TrainingError
    from qadapter.modeling import QAdapterForCausalLM as QAdapterForCausalLM
    from qadapter.modeling.conditions import OffInside as OffInside
    from qadapter.modeling.mixing import StepState as StepState
    from qadapter.trainer import QAdapterTrainer as QAdapterTrainer
    from qadapter.training_arguments import QAdapterTrainingArguments as QAdapterTrainingArguments


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'qadapter' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
