"""torch.compile for training: each decoder layer by itself, and the reductions of the head's chunks.

Layers of a kind share one compiled graph for each stream, so that compiling takes seconds, whatever the depth; a whole
decoder would be compiled anew for each pass of the step. Shapes are dynamic: batches have ever new lengths.
"""

from dataclasses import replace

import torch

from qadapter.errors import ConfigError
from qadapter.modeling.policy import QAdapterForCausalLM
from qadapter.modeling.trunk import decoder_layers

# Graphs of one layer's code: for each stream, kind of layer and training mode, with and without adapter.
MOST_GRAPHS = 64


def compile_layers(model: QAdapterForCausalLM) -> None:
    """Let the layers and the head of `model` run compiled from now on; results differ by rounding only.

    Raises:
        ConfigError: the decoder has no single list of layers.
    """
    layers = decoder_layers(model.base)
    if layers is None:
        raise ConfigError(
            f"torch_compile: the decoder of {type(model.base).__name__} is no single list of layers. Leave it out."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for layer in layers:
        layer.compile(dynamic=True)
    model.head = replace(model.head, compiled=True)
