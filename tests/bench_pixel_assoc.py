"""What each part of one full step of train_pixel_assoc.py costs, with the fused and with the direct association.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/bench_pixel_assoc.py [--size 730,730] [--arch resnet101] [--device cuda]

One pair of random images, float32, 19 classes; each form in a process of its own. Times are processor seconds on a CPU
(wall-clock seconds on a GPU), memory is the peak of the process (of the allocator on a GPU).
"""
from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_pixel_assoc as script  # noqa: E402
from lib import ops  # noqa: E402
from lib.models.deeplab import build  # noqa: E402
from lib.runtime import Run, peak_memory  # noqa: E402


def step(form: str, size: tuple[int, int], arch: str, device: str) -> dict[str, float]:
    """Seconds of each part, and the peak memory in GiB."""
    seconds: dict[str, float] = {}

    def timed(name, function):
        @functools.wraps(function)
        def call(*args, **named):
            torch.cuda.synchronize() if device == "cuda" else None
            clock = time.perf_counter if device == "cuda" else time.process_time
            start = clock()
            result = function(*args, **named)
            torch.cuda.synchronize() if device == "cuda" else None
            label = f"{name}, {named['metric']}" if "metric" in named else name
            seconds[label] = seconds.get(label, 0.0) + clock() - start
            return result
        return call

    torch.manual_seed(0)
    net = build("DeeplabPixelAssoc", 19, arch).to(device, memory_format=torch.channels_last).train()
    x_s, x_t = (torch.randn(1, 3, *size[::-1], device=device).mul(60).to(memory_format=torch.channels_last)
                for _ in range(2))
    y_s = torch.randint(19, (1, size[1] // 32 + 1, size[0] // 32 + 1), device=device)
    y_s = y_s.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :size[1], :size[0]]
    association = timed("association", script.ASSOCIATION[form])
    script.loss_ce, script.loss_lovasz = timed("L_ce", script.loss_ce), timed("L_lovasz", script.loss_lovasz)
    net.forward = timed("network forward, two images", net.forward)
    run = Run(torch.device(device), 0, 1, "off")
    total, _ = timed("all of the forward pass", script.objective)(
        net, x_s, y_s, x_t, script.Weights(), run, loss_asso=association)
    timed("backward pass", total.backward)()
    return {**seconds, "peak memory, GiB": peak_memory(run.device)}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--size", default="730,730")
    p.add_argument("--arch", default="resnet101")
    p.add_argument("--device", default="cpu")
    p.add_argument("--form", choices=["fused", "direct"], help="print one form as JSON")
    args = p.parse_args()
    if args.form:
        print(json.dumps(step(args.form, tuple(int(n) for n in args.size.split(",")), args.arch, args.device)))
        return
    results = {}
    for form in ("fused", "direct"):
        done = subprocess.run([sys.executable, __file__, "--form", form, "--size", args.size, "--arch", args.arch,
                               "--device", args.device], capture_output=True, text=True)
        results[form] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        if done.returncode:
            print(f"{form}: exit code {done.returncode}: {done.stderr.splitlines()[-1:]}")
    print(f"kernels {ops.backend()}, {torch.get_num_threads()} threads\n| part | fused | direct |\n|---|---|---|")
    for part in next(r for r in results.values() if r):
        print(f"| {part} | " + " | ".join(f"{r[part]:.2f}" if r else "-" for r in results.values()) + " |")


if __name__ == "__main__":
    main()
