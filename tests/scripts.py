"""What the tests of the scripts share: a tiny rendered pair, and the scripts as processes of their own."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import torch
from conftest import ROOT
from PIL import Image

from lib import checkpoint
from lib.demo.streets import render_demo

WIDTH, HEIGHT = 64, 48
# One thread gives the same bits in every process; the kernels of csrc/ have tests of their own.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "SEGADAPT_OPS": "reference", "CUDA_VISIBLE_DEVICES": ""}


def render(root: Path, n_source: int = 5, n_target: int = 4, n_val: int = 2) -> Path:
    """A rendered pair under root/gta5 and root/cityscapes."""
    return render_demo(root, seed=1, size=(WIDTH, HEIGHT), n_source=n_source, n_target=n_target, n_val=n_val)


def training(pair: Path, folder: Path, *more: str) -> list[str]:
    """Arguments of train_adaptsegnet.py for a few steps on a rendered pair."""
    size = f"{WIDTH},{HEIGHT}"
    return ["--target", "demo", "--data-dir", str(pair / "gta5"), "--data-dir-target", str(pair / "cityscapes"),
            "--arch", "resnet18", "--input-size", size, "--input-size-target", size, "--num-steps", "2",
            "--num-workers", "0", "--log-every", "1", "--save-num-images", "0", "--cpu",
            "--ops", "reference", "--snapshot-dir", str(folder), *more]


def execute(script: str, *arguments: str, code: int = 0, cwd: Path | None = None,
            seconds: float = 600) -> subprocess.CompletedProcess:
    """Run a script to its end, which must come in time and with the exit code ``code``."""
    done = processes.run([str(ROOT / script), *arguments], ENVIRONMENT, cwd, seconds)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def execute_alone(script: str, folder: Path, *arguments: str) -> str:
    """Run a script that was copied with lib/, and without csrc/, into ``folder``, from folder/elsewhere; its output."""
    (folder / "elsewhere").mkdir(parents=True)
    shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    done = processes.run([str(folder / script), *arguments], {**ENVIRONMENT, "SEGADAPT_OPS": "auto"},
                         folder / "elsewhere")
    assert done.returncode == 0, done.stderr
    return done.stdout


def message(done: subprocess.CompletedProcess, script: str) -> str:
    """The one message that a user's mistake gives on stderr."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith(f"{script}: "), done.stderr
    return done.stderr


def logged(folder: Path, key: str | None = None) -> list[dict]:
    """The lines of log.jsonl, or those with a key."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key is None or key in line]


def interrupted(script: str, *arguments: str, at: str = "never:0", by: str = "SIGKILL", code: int = 0) -> str:
    """Run a script's loop with the networks of interrupted.py; what it printed."""
    done = processes.run([str(ROOT / "tests/interrupted.py"), script.removesuffix(".py"), at, by, *arguments],
                         ENVIRONMENT)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def same(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def tree(folder: Path) -> dict[str, object]:
    """Everything a run wrote, to be compared: weights as tensors, texts without the folder's own path."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix in (".pth", ".pt", ".tar"):
            state = dict(checkpoint.load(path))
            state.pop("arguments", None)
            found[name] = state
        elif path.suffix in (".json", ".jsonl", ".txt"):
            found[name] = path.read_text().replace(str(folder), "HERE")
        else:
            found[name] = path.read_bytes()
    return found


def assert_same_tree(folder: Path, theirs: dict[str, object]) -> None:
    """theirs: the tree of a run that nothing disturbed."""
    ours = tree(folder)
    assert ours.keys() == theirs.keys()
    for name, content in theirs.items():
        assert same(ours[name], content), name


def with_voids(pair: Path, copy: Path) -> Path:
    """A copy of a rendered pair whose source labels hold different shares of void, so that batches split unevenly."""
    shutil.copytree(pair, copy)
    for n in (1, 3, 4):
        path = copy / f"gta5/labels/{n:05}.png"
        label = Image.open(path)
        label.paste(0, (0, 0, WIDTH, 12 * n - 8))
        label.save(path)
    return copy


def torchrun(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script in two processes to its end."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(ROOT / script), *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def in_two_processes(script: str, *arguments: str) -> str:
    """The same without torchrun, whose own start takes longer than such a run; what the first process printed."""
    done = processes.run_together([str(ROOT / script), *arguments], ENVIRONMENT)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    return done[0].stdout
