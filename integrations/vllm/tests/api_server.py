"""vLLM's HTTP server on the V2 model runner, started by test_http.py with TRITON_INTERPRET=1.

The engine's process imports this file again, so that it has the stand-in, too.
"""

import runpy

import v2_stand_in  # noqa: F401 -- before anything of vLLM's

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
