"""Where a model runs, and in which precision, as far as this machine decides it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from qadapter import devices


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags : avx2 avx512f avx512_bf16 amx_bf16", torch.bfloat16),
        ("flags : avx2 avx512f avx512_vnni", torch.float32),
        (None, torch.float32),  # not Linux
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions_for_it(tmp_path, monkeypatch, flags, dtype):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(devices, "CPU_FLAGS", tmp_path / "cpuinfo")
    assert devices.cpu_dtype() == dtype


def test_the_cpu_has_float64():
    assert devices.widest_float(torch.device("cpu")) == torch.float64


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch makes no devices in Python",
)
def test_everything_runs_on_a_device_that_has_no_float64_and_mixes_with_no_cpu_tensors():
    program = [sys.executable, Path(__file__).with_name("toy_device.py")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["toy"]["answers"] == found["cpu"]["answers"]
    assert found["toy"]["numbers"] == pytest.approx(found["cpu"]["numbers"], rel=1e-3, abs=1e-6)
    assert found["widest"] == "torch.float32"
