"""What an iteration of train_spgan.py and a picture through translate.py cost, beside the plain formulation.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/bench_cyclegan.py [--side 256] [--ngf 64] [--size 1024,512] [--device D]

Random pictures, float32, batch 1; each form in a process of its own. Times are processor seconds on a CPU (wall-clock
seconds on a GPU), the median of --repeats; memory is what the process (the GPU's allocator) needs at most, beyond what
it held before. All forms of a part compute the same, which is checked.

plain: every picture passes alone, the graph of both directions is held until one backward pass for all losses.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_spgan as script  # noqa: E402
from lib import tiling  # noqa: E402
from lib.models.cyclegan import ResnetGenerator, init_normal  # noqa: E402
from lib.runtime import Run, peak_memory  # noqa: E402

FORMS = {"iteration": ("plain", "ours"), "picture": ("whole", "tiles of 512", "tiles of 256")}


def plain_step(nets, pool_a, pool_b, x_a, x_b, w, run, update, **_) -> dict[str, torch.Tensor]:
    """train_spgan.step for CycleGAN, one thing at a time."""
    g_ab, g_ba, d_a, d_b, _ = nets
    d_a.requires_grad_(False), d_b.requires_grad_(False)
    x_ab, x_ba = g_ab(x_a), g_ba(x_b)
    x_aba, x_bab = g_ba(x_ab), g_ab(x_ba)
    same_b, same_a = g_ab(x_b), g_ba(x_a)
    losses = {"G": F.mse_loss(score := d_b(x_ab), torch.ones_like(score))
              + F.mse_loss(score := d_a(x_ba), torch.ones_like(score))
              + w.lambda_A * F.l1_loss(x_aba, x_a) + w.lambda_B * F.l1_loss(x_bab, x_b)
              + w.lambda_identity * (w.lambda_B * F.l1_loss(same_b, x_b) + w.lambda_A * F.l1_loss(same_a, x_a))}
    update.backward("G", losses["G"])
    update.step("G")
    d_a.requires_grad_(True), d_b.requires_grad_(True)
    for name, d, real, fake in (("D_A", d_b, x_b, pool_b.query(x_ab)), ("D_B", d_a, x_a, pool_a.query(x_ba))):
        losses[name] = (F.mse_loss(score := d(real), torch.ones_like(score))
                        + F.mse_loss(score := d(fake.detach()), torch.zeros_like(score))) / 2
        update.backward("D", losses[name])
    update.step("D")
    return losses


class Update:
    """The optimisers, without a guard."""

    def __init__(self, nets: script.Networks):
        groups = {"G": (nets.g_ab, nets.g_ba), "D": (nets.d_a, nets.d_b)}
        self.optimizers = {name: torch.optim.Adam([p for net in group for p in net.parameters()], 2e-4, (0.5, 0.999))
                           for name, group in groups.items()}

    def backward(self, name: str, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, name: str) -> None:
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()


def measure(part: str, form: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds, GiB, and a number that is the same in all forms."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    run = Run(device, 0, 1, "off")
    if part == "iteration":
        nets = script.build("cyclegan", args.ngf, args.ngf)
        for net in nets[:4]:
            run.place_net(init_normal(net))
        pools = [script.ImagePool(50, np.random.default_rng(0), run) for _ in range(2)]
        x_a, x_b = (run.place(torch.rand(1, 3, args.side, args.side) * 2 - 1) for _ in range(2))
        function, update = (plain_step if form == "plain" else script.step), Update(nets)

        def once() -> float:
            return float(function(nets, *pools, x_a, x_b, script.Weights(), run, update)["G"])
    else:
        net = run.place_net(ResnetGenerator(args.ngf))
        width, height = (int(n) for n in args.size.split(","))
        x = run.place(torch.rand(1, 3, height, width) * 2 - 1)

        @torch.no_grad()
        def once() -> float:
            if form == "whole":
                return float(net(x).abs().sum())
            return float(tiling.apply(tiling.layers_of(net.model), x.clone(), int(form.split()[-1])).abs().sum())

    clock = time.perf_counter if device.type == "cuda" else time.process_time
    before, seconds = 0.0 if device.type == "cuda" else peak_memory(device), []
    for _ in range(args.repeats):
        start = clock()
        value = once()
        seconds.append(clock() - start)
    return {"seconds": statistics.median(seconds), "GiB": peak_memory(device) - before, "value": value}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--side", type=int, default=256)
    p.add_argument("--ngf", type=int, default=64)
    p.add_argument("--size", default="1024,512")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--device", default="cpu")
    p.add_argument("--form", nargs=2, help="print one part and form as JSON")
    args = p.parse_args()
    if args.form:
        print(json.dumps(measure(*args.form, args)))
        return
    print(f"{torch.get_num_threads()} threads, {args.ngf} filters; iterations at {args.side}x{args.side}, pictures of "
          f"{args.size}\n| | seconds | ratio | GiB | ratio |\n|---|---|---|---|---|")
    for part, forms in FORMS.items():
        first = None
        for form in forms:
            flags = [f"--{name}={getattr(args, name)}" for name in ("side", "ngf", "size", "repeats", "device")]
            done = subprocess.run([sys.executable, __file__, "--form", part, form, *flags], capture_output=True,
                                  text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            first = first or found
            assert abs(found["value"] - first["value"]) <= 1e-3 * abs(first["value"]), (part, form, found, first)
            print(f"| {part}, {form} | {found['seconds']:.2f} | {found['seconds'] / first['seconds']:.2f} | "
                  f"{found['GiB']:.2f} | {found['GiB'] / first['GiB']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
