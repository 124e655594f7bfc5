"""The policy model: streams, head, cache, mixing and the adapter folder."""

from qadapter.modeling.policy import DEFAULT_ADAPTER, QAdapterForCausalLM

__all__ = ["DEFAULT_ADAPTER", "QAdapterForCausalLM"]
