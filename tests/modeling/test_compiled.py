"""Layers and head compiled for training: the same loss, gradients and weights as eager ones."""

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from models import FAST_PATHS, losses_and_gradients, tiny_base, tiny_policy, tiny_trainer, token_pairs
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops import wrap
from torch.fx import Interpreter
from torch.fx.traceback import preserve_node_meta
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from qadapter import QAdapterTrainingArguments
from qadapter.data import PackedCollator
from qadapter.errors import ConfigError
from qadapter.fused import TokenStatistics, compiled_reduce_rows, reduce_chunk, token_statistics
from qadapter.modeling import compiled, varlen
from qadapter.modeling.packed import enable_packing
from qadapter.modeling.trunk import decoder_layers

# What the compiler itself warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def backend(request, monkeypatch):
    """Traced but mostly run eagerly, without a compiler's minutes: tracing, shapes and streams may go wrong here."""
    chosen, compile_module = getattr(request, "param", "aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend=chosen, **kw))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "backend", "layers", "sizes"),
    [
        ("llama", "aot_eager", 1, (4, 3)),
        ("llama", "inductor", 1, (4,)),  # what users' runs are compiled by
        # What differs is the forward pass; tracing the backward one, too, would take minutes.
        *((name, "eager", 1 + (name == "gemma3"), (4,)) for name in FAST_PATHS if name != "llama"),
    ],
    indirect=["backend"],
)
def test_compiled_layers_give_the_loss_and_gradients_of_eager_ones(architecture, layers, sizes):
    policy = tiny_policy(tiny_base(architecture, num_hidden_layers=layers)).train()
    assert enable_packing(policy.base)
    batches = [PackedCollator()(token_pairs(count)) for count in sizes]
    masks = [batch["completion_mask"] for batch in batches]
    expected = [losses_and_gradients(policy, *both) for both in zip(batches, masks, strict=True)]
    compiled.compile_layers(policy)
    for batch, mask, (losses, gradients) in zip(batches, masks, expected, strict=True):
        ours, our_gradients = losses_and_gradients(policy, batch, mask)
        torch.testing.assert_close(ours, losses, rtol=1e-4, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                our_gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
            )


def test_reductions_of_a_chunk_equal_the_definition_compiled_or_not():
    logits, base_logits = torch.randn(2, 5, 31, generator=torch.Generator().manual_seed(0))
    targets, scaled = torch.arange(5), (0.5 * logits).requires_grad_()
    expected = token_statistics(scaled, 0.5 * base_logits, targets)
    (slopes,) = torch.autograd.grad(expected.kl.sum(), scaled)
    for reduce in (reduce_chunk, compiled_reduce_rows()):
        for with_kl in (False, True):
            probabilities, base = logits.clone(), base_logits.clone()
            statistics = reduce(probabilities, base, targets, 0.5, with_kl)
            torch.testing.assert_close(
                statistics, TokenStatistics(*map(torch.Tensor.detach, expected)), rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(probabilities, (0.5 * logits).softmax(-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(base, slopes, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=["this torch", "torch 2.11"])
def tags_for_recomputation(request, monkeypatch):
    """torch up to 2.11 marks the outer graph's operations only, not what an autograd Function holds inside."""
    if request.param == "this torch":
        return

    def tagged(graph, *arguments, **_):
        number = next(wrap.uid)
        for node in graph.graph.nodes:
            if node.op.startswith("call_"):
                node.meta |= {"ac_graph_id": number, "recompute": CheckpointPolicy.PREFER_RECOMPUTE}
        with preserve_node_meta():
            return Interpreter(graph).run(*arguments)

    monkeypatch.setattr(wrap, "tag_activation_checkpoint_impl", tagged)


def test_a_compiled_checkpoint_keeps_nothing_of_packed_attentions_gathers(tags_for_recomputation):
    batch = PackedCollator()(token_pairs(4))
    gather, restore, repeated = (batch[f"{name}_indices"] for name in ("gather", "restore", "repeated"))
    weight = torch.randn(3, 3, requires_grad=True)
    graphs, kept = [], []

    def layer(states):
        packed = varlen.gather(states @ weight, gather, restore, repeated)
        return varlen.restore(packed.sin().square(), restore)

    def capture(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=capture, partition_fn=min_cut_rematerialization_partition)
    compiled_layer = torch.compile(lambda states: checkpoint(layer, states, use_reentrant=False), backend=backend)
    states = torch.randn(len(restore), 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = compiled_layer(states)
    known = {tensor.data_ptr() for tensor in (states, weight, gather, restore, repeated)}
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= known
    result.sum().backward()
    # The compiler sees what they are made of, and can melt it into its neighbours.
    assert len(graphs) == 2
    assert all(
        "aten.index_select.default" in graph and not any("qadapter" in name for name in graph) for graph in graphs
    )


@pytest.mark.parametrize("torch_compile", [True, False])
def test_the_trainer_compiles_the_layers_and_the_head_where_it_is_told_to(tmp_path, torch_compile):
    model = tiny_trainer(tiny_policy(), tmp_path, torch_compile=torch_compile).model
    assert model.head.compiled == torch_compile
    assert all((layer._compiled_call_impl is not None) == torch_compile for layer in decoder_layers(model.base))
    assert model._compiled_call_impl is None  # not the whole model, as transformers' own trainer does it


@pytest.mark.parametrize("option", ["torch_compile_mode", "torch_compile_backend"])
def test_other_ways_to_compile_are_refused(tmp_path, option):
    with pytest.raises(ConfigError, match=f"{option} = 'eager': use torch_compile = true"):
        QAdapterTrainingArguments(output_dir=str(tmp_path), **{option: "eager"})


def test_a_decoder_without_a_list_of_layers_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "decoder_layers", lambda base: None)
    with pytest.raises(ConfigError, match="is no single list of layers"):
        compiled.compile_layers(tiny_policy())
