"""The emulated CUDA kernels under the address, undefined-behaviour and thread sanitizers: python -m pytest -m slow."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest

ROOT = Path(__file__).resolve().parent.parent
SELECTED = {"address,undefined": "indices or panel or what_has_failed or bits_of_the_cpu or thresholds_and_labels",
            "thread": "indices or panel or (thresholds_and_labels and rare)"}  # a fiber for each thread takes its time


def library_file(name: str) -> str:
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(bool(cuda_emulation.reason_against()), reason=cuda_emulation.reason_against() or "-")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_no_access_out_of_bounds_and_no_race(sanitizer):
    """Each CUDA thread is a fiber that the sanitizer knows; tensors lie on the heap, where it sees their ends."""
    runtime = {"address,undefined": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    libraries = [library_file(runtime), library_file("libstdc++.so.6")]  # it wants __cxa_throw at once
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"no {runtime}")
    # The address space's layout at random can collide with what the thread sanitizer has reserved.
    fixed = [shutil.which("setarch"), "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    environment = {**os.environ, "SEGADAPT_SANITIZER": sanitizer, "LD_PRELOAD": " ".join(libraries),
                   "OMP_NUM_THREADS": "1",
                   "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1",
                   "TSAN_OPTIONS": "report_bugs=1:halt_on_error=1:ignore_noninstrumented_modules=1"}
    done = subprocess.run([*fixed, sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider",
                           "tests/test_ops_association.py", "tests/test_ops_pseudo_label.py", "-k",
                           f"emulated and ({SELECTED[sanitizer]})"],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and "Sanitizer" not in report and "runtime error" not in report, report[-4000:]
    assert " passed" in done.stdout
