"""Importing this lets vLLM's V2 model runner start on a CPU, in a process with TRITON_INTERPRET=1.

That runner's kernels need Triton, whose wheels have no backend for CPUs: its interpreter runs them instead, and the
stand-in below says so to vLLM.
"""

from types import SimpleNamespace

import triton.backends

triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
