"""Where a model runs, and in which precision, as far as this machine decides it."""

import pytest
import torch

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
