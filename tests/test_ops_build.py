"""Building csrc/: caching, several processes at once, missing compilers."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import ops
from lib.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = """
#include <torch/library.h>
TORCH_LIBRARY(segadapt, m) { m.def("mutual_argmax(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, Tensor)"); }
"""


def python(code: str, **env) -> subprocess.CompletedProcess:
    environment = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def modes():
    yield
    ops._state["mode"] = "auto"


def test_use_rejects_other_words(modes):
    with pytest.raises(UserError, match="auto, compiled or reference"):
        ops.use("fast")


def test_reference_needs_no_build(modes, monkeypatch):
    monkeypatch.setattr(ops, "_load", lambda: pytest.fail("loaded"))
    ops.use("reference")
    assert ops.backend() == "reference"
    assert ops.mutual_argmax(torch.eye(2), torch.eye(2))[0].tolist() == [0, 1]


def test_no_compiler_is_one_warning_and_an_error_only_on_demand(tmp_path):
    code = ("import warnings, torch; from lib import ops; from lib.errors import UserError\n"
            "with warnings.catch_warnings(record=True) as seen:\n"
            "    warnings.simplefilter('always')\n"
            "    for _ in range(3): ops.mutual_argmax(torch.eye(2), torch.eye(2))\n"
            "assert len([w for w in seen if 'no compiled operators' in str(w.message)]) == 1, seen\n"
            "assert ops.backend() == 'reference'\n"
            "try: ops.use('compiled')\n"
            "except UserError as e: print(e)")
    done = python(code, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout


def test_failed_build_says_where_and_why(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/ops.cpp").write_text("int x = undeclared_name;\n")
    monkeypatch.setattr(ops, "CSRC", tmp_path / "csrc")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    if not ops.shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no compiler")
    with pytest.raises(UserError, match=r"undeclared_name.*failed\.log"):
        ops.build()
    assert "undeclared_name" in (tmp_path / "cache/failed.log").read_text()


def test_processes_build_once_and_reuse(tmp_path):
    """Three processes start together: one compiles, all load; the next one finds the cache."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/ops.cpp").write_text(TINY)
    code = ("from pathlib import Path; from lib import ops; import torch\n"
            f"ops.CSRC = Path({str(tmp_path / 'csrc')!r})\n"
            "torch.ops.load_library(ops.build()); print(torch.ops.segadapt.mutual_argmax.default)")
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    if not ops.shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no compiler")
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for _ in range(3)]
    outputs = [p.communicate() for p in running]
    assert all(p.returncode == 0 for p in running) and all("segadapt.mutual_argmax" in out for out, _ in outputs)
    assert sum("compiling" in err for _, err in outputs) == 1
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    again = python(code, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert again.returncode == 0 and "compiling" not in again.stderr


def test_cuda_root_comes_from_nvcc_itself(tmp_path, monkeypatch):
    """nvcc on the PATH may be a wrapper elsewhere."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho '#$ TOP=/opt/toolkit/bin/..' >&2\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert ops.cuda_root() == Path("/opt/toolkit")
