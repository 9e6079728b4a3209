"""The CPU kernels as other processors than this one get them: python -m pytest -m slow."""
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64")
@pytest.mark.parametrize("arch, needed, tests", [
    ("x86-64", "sse2", "not (pseudo_label and test_cuda)"),  # without fused products last bits differ from CUDA's
    ("x86-64-v3", "avx2", ""), ("x86-64-v4", "avx512f", "")], ids=["plain", "AVX2", "AVX-512"])
def test_kernels_of_another_processor(compiled, arch, needed, tests):
    """csrc/cpu/vec.h has three forms; each equals the reference and, bit for bit, the CUDA kernels."""
    if f" {needed} " not in FLAGS:
        pytest.skip(f"needs {needed}")
    environment = {**os.environ, "SEGADAPT_ARCH": arch, "SEGADAPT_OPS": "auto"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-k", tests,
                           "tests/test_ops_association.py", "tests/test_ops_pseudo_label.py",
                           "tests/test_ops_retrieval.py"],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]
    assert "not compiled" not in done.stdout
