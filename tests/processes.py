"""Scripts as processes that start in a moment: forks of one process that has imported torch, and nothing of ours."""
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What every script imports, or causes to be imported by its first optimiser step.
IMPORTED = ["torch", "torch._dynamo", "torch.distributed", "torch.utils.data", "numpy", "PIL.Image", "scipy.ndimage",
            "tqdm"]


def _become(argv: list[str], cwd: str, environment: dict[str, str], files: tuple[str, str], method: str) -> None:
    """Run the script argv[0] in this process, as `python argv[0] ...` would."""
    import torch

    multiprocessing.set_start_method(method, force=True)  # of loaders: forkserver's children would use that
    os.setsid()
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    ours = {"", str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH")}
    sys.path[:] = [str(Path(argv[0]).parent), *(path for path in sys.path if path not in ours)]
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


class Started:
    """A script that runs."""

    def __init__(self, argv: list[str], environment: dict[str, str], cwd: Path | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.argv, self.folder = argv, tempfile.TemporaryDirectory()
        self.files = tuple(str(Path(self.folder.name, name)) for name in ("stdout", "stderr"))
        for file in self.files:
            Path(file).touch()
        self.process = context.Process(target=_become, args=(argv, str(cwd or os.getcwd()), environment, self.files,
                                                             multiprocessing.get_start_method()))
        self.process.start()

    def wait(self, seconds: float) -> subprocess.CompletedProcess:
        """Its end, which must come in time."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.argv, seconds, *(Path(file).read_bytes() for file in self.files))
        texts = [Path(file).read_text() for file in self.files]
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.argv, self.process.exitcode, *texts)


def run(argv: list[str], environment: dict[str, str], cwd: Path | None = None,
        seconds: float = 600) -> subprocess.CompletedProcess:
    """What subprocess.run() would return."""
    return Started(argv, environment, cwd).wait(seconds)


def run_together(argv: list[str], environment: dict[str, str], number: int = 2,
                 seconds: float = 600) -> list[subprocess.CompletedProcess]:
    """The script in several processes that torch.distributed joins, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {**environment, "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(port)}
    started = [Started(argv, {**shared, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(number)]
    return [process.wait(seconds) for process in started]
