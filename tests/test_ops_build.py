"""Building csrc/: caching, several processes at once, and what must not be more than one line: whatever goes wrong."""
import os
import shutil
import subprocess
from pathlib import Path

import processes
import pytest
import torch

from lib import ops
from lib.errors import UserError
from lib.ops import build

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
TINY = "int loaded = 1;\n"  # no kernels: PyTorch's headers alone take ten seconds


def start(folder: Path, code: str, **env) -> processes.Started:
    """The code as a script in ``folder``, in a process of its own."""
    file = folder / f"{len(list(folder.glob('*.py')))}.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    return processes.Started([str(file)], {**os.environ, **env})


def python(folder: Path, code: str, **env) -> subprocess.CompletedProcess:
    return start(folder, code, **env).wait(600)


@pytest.fixture
def tiny(tmp_path) -> tuple[str, dict]:
    """Code that builds and loads a tiny csrc/, and the environment for it."""
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/tiny.cpp").write_text(TINY)
    code = ("from pathlib import Path; import torch; from lib import ops; from lib.ops import build\n"
            f"build.CSRC = Path({str(tmp_path / 'csrc')!r})\n"
            "print(ops.backend(), ops.mutual_argmax(torch.eye(2), torch.eye(2))[0].tolist())\n")
    return code, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "SEGADAPT_OPS": "auto"}


def test_use_rejects_other_words():
    with pytest.raises(UserError, match="auto, compiled or reference"):
        ops.use("fast")


def test_reference_needs_no_build(monkeypatch):
    monkeypatch.setattr(build, "load", lambda device: pytest.fail("loaded"))
    before = ops.use("reference")
    try:
        assert ops.backend() == "reference"
        assert ops.mutual_argmax(torch.eye(2), torch.eye(2))[0].tolist() == [0, 1]
    finally:
        assert ops.use(before) == "reference"


def test_an_operator_without_a_kernel_runs_its_reference():
    twice = build.operator("twice(Tensor x) -> Tensor")(lambda x: 2 * x)
    twice.register_fake(torch.empty_like)
    assert torch.ops.segadapt.twice(torch.ones(2)).tolist() == twice.reference(torch.ones(2)).tolist() == [2, 2]
    torch.library.opcheck(torch.ops.segadapt.twice.default, (torch.ones(2),))


def test_no_compiler_is_one_warning_and_an_error_only_on_demand(tmp_path):
    code = ("import warnings, torch; from lib import ops; from lib.errors import UserError\n"
            "with warnings.catch_warnings(record=True) as seen:\n"
            "    warnings.simplefilter('always')\n"
            "    for _ in range(3): ops.mutual_argmax(torch.eye(2), torch.eye(2))\n"
            "assert len([w for w in seen if 'no compiled operators' in str(w.message)]) == 1, seen\n"
            "assert ops.backend() == 'reference'\n"
            "try: ops.use('compiled')\n"
            "except UserError as e: print(e)")
    done = python(tmp_path, code, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path), SEGADAPT_OPS="auto")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout and done.stdout.count("\n") == 1


@needs_compiler
def test_a_failed_build_says_where_and_why_in_one_line(tiny, tmp_path):
    code, env = tiny
    (tmp_path / "csrc/cpu/tiny.cpp").write_text("int x = undeclared_name;\n")
    done = python(tmp_path, code, **env)
    assert done.returncode == 0 and done.stdout == "reference [0, 1]\n", done.stderr
    told = [line for line in done.stderr.splitlines() if "compiled operators" in line]
    assert len(told) == 1 and "undeclared_name" in told[0] and "failed.log" in told[0]
    assert "undeclared_name" in (tmp_path / "cache/failed.log").read_text()


@needs_compiler
def test_the_cache(tiny, tmp_path):
    """Three processes start together: one compiles, all load. The next finds the cache; a truncated one and one that
    does not load are made again; in a read-only folder that is one line."""
    code, env = tiny
    together = [start(tmp_path, code, **env) for _ in range(3)]
    done = [process.wait(600) for process in together]
    good = "compiled [0, 1]\n"
    assert [process.stdout for process in done] == [good] * 3, done
    assert sum("compiling" in process.stderr for process in done) == 1
    library, = (tmp_path / "cache").glob("*.so")

    def run(expected, compiles, patch=""):
        done = python(tmp_path, patch + code, **env)
        assert done.returncode == 0 and done.stdout == expected, done.stderr
        assert ("compiling" in done.stderr) == compiles
        return done.stderr.splitlines()

    whole = library.read_bytes()
    assert run(good, False) == []
    library.write_bytes(whole[:len(whole) // 2])
    run(good, True)
    stranger = b"\x7fELF of another machine"
    library.write_bytes(stranger + build.hashlib.sha256(stranger).digest())
    run(good, True)
    library.write_bytes(whole[:100])
    read_only = ("import builtins; real = open\n"
                 "def forbid(file, mode='r', *more, **options):\n"
                 "    if str(file).endswith('lock'): raise OSError(30, 'Read-only file system')\n"
                 "    return real(file, mode, *more, **options)\n"
                 "builtins.open = forbid\n")
    told = [line for line in run("reference [0, 1]\n", False, read_only) if "UserWarning" in line]
    assert len(told) == 1 and "Read-only file system" in told[0] and "TORCH_EXTENSIONS_DIR" in told[0]


@needs_compiler
def test_one_process_builds_several_libraries(tiny, tmp_path):
    """As `python -m lib.ops --build --cuda` does on a new machine; PyTorch names the second one differently."""
    code, env = tiny
    code = code.partition("print(")[0] + (
        "for number in (1, 2):\n"
        "    (build.CSRC / 'cpu/tiny.cpp').write_text(f'int loaded = {number};')\n"
        "    build.load.cache_clear()\n"
        "    assert build.load('cpu') == '', build.load('cpu')\n")
    done = python(tmp_path, code, **env)
    assert done.returncode == 0 and done.stderr.count("compiling") == 2, done.stderr
    assert len(list((tmp_path / "cache").glob("segadapt-cpu-*.so"))) == 2


def test_the_key_tells_machines_apart(monkeypatch):
    """Two machines with one home folder must not take each other's library."""
    keys = {build._key("cpu"), build._key("cuda")}
    for target, name, value in (
            (build, "_version", lambda compiler: "another compiler"), (build, "_cpu", lambda: "another processor"),
            (build.platform, "libc_ver", lambda: ("musl", "1")), (torch, "__version__", "9.9")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.add(build._key("cpu"))
    monkeypatch.setenv("SEGADAPT_ARCH", "x86-64-v3")
    keys.add(build._key("cpu"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    keys.add(build._key("cuda"))
    assert len(keys) == 8


def test_a_cuda_build_that_fails_costs_no_cpu_kernel(monkeypatch):
    """The two are libraries of their own."""
    reasons = {"cpu": "", "cuda": "compiling csrc/cuda failed"}
    monkeypatch.setattr(build, "load", reasons.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setitem(build._state, "mode", "auto")
    build._load_all.cache_clear()
    with pytest.warns(UserWarning, match="no CUDA kernels.*: compiling csrc/cuda failed"):
        assert ops.backend() == "compiled"
    build._load_all.cache_clear()


def test_cuda_root_comes_from_nvcc_itself(tmp_path, monkeypatch):
    """nvcc on the PATH may be a wrapper elsewhere."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho '#$ TOP=/opt/toolkit/bin/..' >&2\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.cuda_root() == Path("/opt/toolkit")
