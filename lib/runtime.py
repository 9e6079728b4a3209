"""Where and how a process computes: device, seeds, processes, precision, signals, the header it prints."""
from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from lib.errors import UserError

NOT_FINITE = "hold NaN or infinite values"  # in every message of lib.ops and csrc/ about such an input
NO_MEMORY = "can't allocate memory"  # in PyTorch's message on a CPU
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def cli(main: Callable[[list[str] | None], int | None]) -> None:
    """Call main(); a UserError becomes one message on stderr and exit code 2."""
    try:
        code = main(None)
    except UserError as error:
        # what a loader process raises comes here with that process's traceback before it
        text = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]
        print(f"{Path(sys.argv[0]).name}: {text.rstrip()}", file=sys.stderr, flush=True)
        code = 2
    except ValueError as error:
        if NOT_FINITE not in str(error):
            raise
        print(f"{Path(sys.argv[0]).name}: {error}. The weights are spoilt, or --amp fp16 overflows: go on from an "
              "older checkpoint with a lower --learning-rate, or with --amp off", file=sys.stderr, flush=True)
        code = 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and NO_MEMORY not in str(error):
            raise
        print(f"{Path(sys.argv[0]).name}: out of memory: choose a smaller network, smaller images or a smaller batch",
              file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    finally:
        end_loaders()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


def end_loaders() -> None:
    """Kill loader processes that an error left: they outlive SIGTERM, and an ending interpreter would wait for them."""
    if children := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the end of a loader for an error
        for child in children:
            child.kill()


def as_float32(x: Tensor) -> Tensor:
    """Losses are taken in at least float32, also under autocast."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True)
class Run:
    """Where and how this process computes; ``world`` processes with ranks 0 .. world - 1 share every batch."""

    device: torch.device
    rank: int
    world: int
    amp: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        dtype = AMP_DTYPES[self.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16; passes losses through unchanged otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

    @property
    def memory_format(self) -> torch.memory_format:
        """Of networks and images in training: channels last pays on GPUs, and costs up to a fifth on a CPU."""
        return torch.channels_last if self.device.type == "cuda" else torch.contiguous_format

    def place(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] on the device in the memory format of training."""
        return x.to(self.device, memory_format=self.memory_format, non_blocking=True)

    def place_net(self, net: nn.Module, sync_bn: bool = True, compiled: bool = False) -> nn.Module:
        """``net`` on the device in the memory format of training; with ``sync_bn``, BN over all GPUs of a run."""
        net = net.to(self.device, memory_format=self.memory_format)
        if sync_bn and self.world > 1 and self.device.type == "cuda":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        if compiled:
            net.compile()
        return net

    def sum(self, value: Tensor) -> Tensor:
        """``value`` added up over all processes (detached)."""
        value = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def gather(self, x: Tensor) -> Tensor:
        """Rows of x [N, ...] (detached) of all processes, in the order of their ranks: [N * world, ...]."""
        if self.world == 1:
            return x.detach()
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of those of all processes, [N * world, ...] -> [N, ...]; gather's inverse."""
        n = len(rows) // self.world
        return rows[self.rank * n:(self.rank + 1) * n]

    def average_gradients(self, modules: Iterable[nn.Module]) -> None:
        """Mean over processes of every gradient, in place."""
        if self.world == 1:
            return
        grads = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.world
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def mean_values(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Scalars averaged over all processes, as numbers."""
        return dict(zip(losses, (self.sum(torch.stack(list(losses.values()))) / self.world).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """True where any process says so; all processes must call it together."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0) if self.world > 1 else flag

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        """Print on the first process, above a progress bar if there is one."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def start(*, cpu: bool, gpu: int = 0, amp: str, seed: int, deterministic: bool) -> Run:
    """Choose the device, join the processes that torchrun started, and seed everything.

    Raises UserError when a GPU number does not exist.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    on_gpu = torch.cuda.is_available() and not cpu
    index = int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else gpu
    if (on_gpu or gpu and not cpu) and index >= torch.cuda.device_count():
        raise UserError(f"GPU {index} was asked for, but PyTorch sees {torch.cuda.device_count()}: choose another "
                        "--gpu, fewer processes, or --cpu")
    device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        # Bilinear up-sampling and 2-d NLL have CUDA kernels without a deterministic twin; those only warn.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = on_gpu and not deterministic
    return Run(device, rank, world, amp)


def header(run: Run, rows: Mapping[str, object]) -> None:
    """Print what this run is, one line a fact."""
    facts = {"device": _device_name(run), "precision": {"off": "float32"}.get(run.amp, f"{run.amp} (autocast)"), **rows}
    width = max(map(len, facts))
    run.say("\n".join(f"{key:<{width}}  {value}" for key, value in facts.items()))


def _device_name(run: Run) -> str:
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else \
        f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return name if run.world == 1 else f"{run.world} processes, each on {name}"


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class StopRequest:
    """Inside ``with StopRequest() as stop``, SIGINT and SIGTERM set ``stop.signal`` instead of ending the process.

    A second Ctrl-C interrupts at once.
    """

    signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
