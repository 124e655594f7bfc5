"""The suite runs each engine in its own process: vLLM is imported once, and an engine starts in seconds.

Models and adapters are those of the package's own tests (tests/models.py), the reference is its transformers path.
"""

import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

import torch._dynamo

# The sampler's small compiled functions would cost the compiler's time in every engine; the model is compiled, in the
# test that is about it.
torch._dynamo.config.disable = True
