"""What checks share that run a model to see what it can do."""

from torch import nn

# What code raises that is run with something it may not be made for.
UNFIT = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)


def can_run(model: nn.Module) -> bool:
    """Whether the model's weights are here: not of one that is sharded or not loaded yet."""
    parameter = next(model.parameters())
    return parameter.device.type != "meta" and parameter.numel() > 0
