"""What a checkpointed training step allocates at its peak as on a GPU, ours and TRL's DPO, counted on a CPU.

    python benchmarks/checkpoint_memory.py                       # an 8B Llama at an eighth of its width, bfloat16
    python benchmarks/checkpoint_memory.py --compile --layers 16 # with compiled layers and head, some minutes
    python benchmarks/checkpoint_memory.py --check --layers 4    # fails where ours is more than TRL's

Width, vocabulary, and what the heads take at a time are divided by `SHRUNK`, rows and layers are not: but for the
adapters, figures are multiplied by it. Kernels that a CPU lacks have stand-ins of the same memory: FlashAttention over
packed rows, and the Triton kernels of TRL's head, which work in place. Weights are not counted.
A CPU without bfloat16 makes its products in float32, which an eager count does not see.
"""

import argparse
import gc
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import trl
from allocations import PeakAllocations
from contenders import our_step, trl_step
from decode import LLAMA_8B
from experiments.bfloat16 import multiply_in_float32
from results_file import installed, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from train import random_pairs
from transformers import LlamaConfig, LlamaForCausalLM
from trl.kernels import chunked_logprob

from qadapter import fused
from qadapter.devices import cpu_has_bfloat16
from qadapter.modeling import varlen

SHRUNK = 8
LAYERED = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")


def attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """What `torch_attn::_varlen_attn` returns: output, log-sum-exps, state of the random numbers."""
    output, bounds = torch.empty_like(query), starts.tolist()
    for start, end in itertools.pairwise(bounds):
        q, k, v = (states[start:end].transpose(0, 1).unsqueeze(0) for states in (query, key, value))
        answer = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        output[start:end] = answer.squeeze(0).transpose(0, 1)
    return output, query.new_zeros(query.shape[1::-1], dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def attention_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Tensors of the gradients' shapes: only their memory matters here."""
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def nothing(*arguments: Any, **kwargs: Any) -> None:
    """A kernel that allocates nothing."""


def always(*arguments: Any) -> bool:
    """True. A mock with this return value would remember its arguments and so keep every tensor."""
    return True


def kernels_of_a_gpu() -> None:
    """Stand-ins for what runs on a GPU only, and heads that take as much at a time as there, `SHRUNK`."""
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", attention)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", attention_gradients)
    mock.patch.object(varlen, "fits", always).start()
    mock.patch.object(fused, "CPU_CHUNK_BYTES", 2 * fused.ACCELERATOR_CHUNK_ELEMENTS // SHRUNK).start()
    mock.patch.object(fused, "CPU_WIDENED_ELEMENTS", fused.ACCELERATOR_WIDENED_ELEMENTS // SHRUNK).start()
    mock.patch.object(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32_768 // SHRUNK).start()
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        mock.patch.object(chunked_logprob, name, nothing).start()


def tag_outer_nodes_only() -> None:
    """What a checkpoint in compiled code recomputes, as torch up to 2.11 decides it (pytorch/pytorch#177396)."""
    from torch._higher_order_ops import wrap
    from torch.fx import Interpreter
    from torch.fx.traceback import preserve_node_meta
    from torch.utils.checkpoint import CheckpointPolicy

    def tagged(graph: torch.fx.GraphModule, *arguments: Any, **kwargs: Any) -> Any:
        number = next(wrap.uid)
        for node in graph.graph.nodes:
            if node.op.startswith("call_"):
                node.meta |= {"ac_graph_id": number, "recompute": CheckpointPolicy.PREFER_RECOMPUTE}
        with preserve_node_meta():
            return Interpreter(graph).run(*arguments)

    mock.patch.object(wrap, "tag_activation_checkpoint_impl", tagged).start()


def allocations(events: Any) -> Iterator[tuple[int, int, int]]:
    """Time, address and size, negative where it is given back, of all allocations below the profiler's events."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from allocations(event.children)


def profiled_peak(step: Callable[[], Any]) -> int:
    """As `PeakAllocations`, of compiled code too; what kernels take within one operation counts as well."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    known: dict[int, int] = {}
    held = peak = 0
    for _, address, size in sorted(allocations(profiler.profiler.kineto_results.experimental_event_tree())):
        if size > 0:
            known[address] = size
            held += size
        else:
            held -= known.pop(address, 0)
        peak = max(peak, held)
    return peak


def counted_peak(step: Callable[[], Any], compiled: bool) -> int:
    """Bytes at the peak of a step that has run before."""
    step()
    gc.collect()
    if compiled:
        step()  # a second shape of the compiled code, perhaps
        return profiled_peak(step)
    with PeakAllocations() as counted:
        step()
    return counted.peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--old-tags", action="store_true", help="compiled checkpoints as in torch 2.11")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    options.device, options.dtype, options.targets = "cpu", torch.bfloat16, ["q_proj", "v_proj"]
    options.checkpoint_every = 1
    kernels_of_a_gpu()
    if not (options.compile or cpu_has_bfloat16()):  # the profiler of compiled code would count the casts
        multiply_in_float32()
    if options.old_tags:
        tag_outer_nodes_only()
    torch.manual_seed(0)
    shape = LLAMA_8B | {name: LLAMA_8B[name] // SHRUNK for name in LAYERED} | {"num_hidden_layers": options.layers}
    base = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    pairs = random_pairs(options.pairs, options.length, options.prompt)
    makers = {
        "TRL DPO": lambda: trl_step(base, options, None, options.compile),
        "ours": lambda: our_step(base, options, None, True, True, compiled=options.compile),
    }
    peaks = {}
    for name, make in makers.items():
        step = make()
        peaks[name] = round(SHRUNK * counted_peak(lambda step=step: step(pairs), options.compile) / 2**20)
        print(f"{name:<10} {peaks[name]:>6} MiB besides the weights")
        del step
    if options.check:
        if peaks["ours"] > peaks["TRL DPO"]:
            print("worse than allowed: a checkpointed step of ours takes more than TRL's")
            return 1
        return 0
    write(
        options.output,
        "checkpoint_memory_compiled" if options.compile else "checkpoint_memory",
        "cpu",
        "bfloat16",
        installed("torch", "transformers", "peft", "trl"),
        layers=options.layers,
        pairs=options.pairs,
        length=options.length,
        prompt=options.prompt,
        old_tags=options.old_tags,
        peak_mib=peaks,
    )
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main())
