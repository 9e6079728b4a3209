"""What one iteration of a translator costs, beside the plain formulation with separate passes.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/bench_translation.py [--side 128] [--dim 32] [--device cuda]

Random crops, float32, batch 1; each form in a process of its own. Times are processor seconds of an iteration on a CPU
(wall-clock seconds on a GPU), the median of --repeats; memory is what the process (the GPU's allocator) needs at most,
beyond what it held before the first iteration. Both forms compute the same losses, which is checked.

plain: every picture and every code passes alone, codes are computed for D and again for G, D's turn builds the graph of
the generators, G's turn computes the gradients of D's weights, layer norm is written out of elementary operations, and
pictures are enlarged before the convolution.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_munit  # noqa: E402
from lib.models import translation  # noqa: E402
from lib.runtime import Run, peak_memory  # noqa: E402


def plain_layer_norm(self, x):
    flat = x.reshape(x.shape[0], -1)
    mean, std = flat.mean(1).view(-1, 1, 1, 1), flat.std(1).view(-1, 1, 1, 1)
    x = (x - mean) / (std + self.eps)
    return x * self.gamma.view(1, -1, 1, 1) + self.beta.view(1, -1, 1, 1)


def plain_munit_step(trainer, gen, dis, x, draw, w, update, *, gan_type, run):
    """train_munit.step, one thing at a time."""
    s = train_munit
    gen_a, gen_b, dis_a, dis_b = gen["a"], gen["b"], dis["a"], dis["b"]
    x_a, x_b = x["a"], x["b"]
    shape = len(x_a), gen_a.style_dim, 1, 1

    def encode(net, x):
        return net.encode(x), net.style(x)

    s_a, s_b = draw(shape), draw(shape)
    (c_a, _), (c_b, _) = encode(gen_a, x_a), encode(gen_b, x_b)
    x_ba, x_ab = gen_a.decode(c_b, s_a), gen_b.decode(c_a, s_b)
    losses = {f"loss_dis_{d}": s.loss_gan(net(fake.detach()), 0.0, gan_type) + s.loss_gan(net(real), 1.0, gan_type)
              for d, net, fake, real in (("a", dis_a, x_ba, x_a), ("b", dis_b, x_ab, x_b))}
    update("dis", losses["loss_dis_a"] + losses["loss_dis_b"])

    s_a, s_b = draw(shape), draw(shape)
    (c_a, s_a_prime), (c_b, s_b_prime) = encode(gen_a, x_a), encode(gen_b, x_b)
    x_a_recon, x_b_recon = gen_a.decode(c_a, s_a_prime), gen_b.decode(c_b, s_b_prime)
    x_ba, x_ab = gen_a.decode(c_b, s_a), gen_b.decode(c_a, s_b)
    (c_b_recon, s_a_recon), (c_a_recon, s_b_recon) = encode(gen_a, x_ba), encode(gen_b, x_ab)
    total = w.recon_x_w * (F.l1_loss(x_a_recon, x_a) + F.l1_loss(x_b_recon, x_b))
    total = total + w.recon_s_w * (F.l1_loss(s_a_recon, s_a) + F.l1_loss(s_b_recon, s_b))
    total = total + w.recon_c_w * ((c_a_recon - c_a).abs().mean() + (c_b_recon - c_b).abs().mean())
    if w.recon_x_cyc_w > 0:
        total = total + w.recon_x_cyc_w * (F.l1_loss(gen_a.decode(c_a_recon, s_a_prime), x_a)
                                           + F.l1_loss(gen_b.decode(c_b_recon, s_b_prime), x_b))
    total = total + w.gan_w * (s.loss_gan(dis_a(x_ba), 1.0, gan_type) + s.loss_gan(dis_b(x_ab), 1.0, gan_type))
    update("gen", total)
    return {**losses, "loss_gen_total": total.detach()}


def munit(form: str, side: int, dim: int, run: Run):
    """A function of the iteration's number that computes one iteration of MUNIT and returns its losses."""
    args = train_munit.parse_args(["--gen-dim", str(dim), "--dis-dim", str(dim), "--recon-x-cyc-w", "10"])
    modules = {name: run.place_net(nets) for name, nets in train_munit.build(args).items()}
    optimizers = {name: torch.optim.Adam(nets.parameters(), 1e-4) for name, nets in modules.items()}
    update = train_munit.GuardedStep(run, modules, optimizers, run.scaler(), 1e6)
    x = {d: run.place(torch.rand(1, 3, side, side) * 2 - 1) for d in "ab"}
    step = train_munit.step
    if form == "plain":
        step, translation.LayerNorm.forward = plain_munit_step, plain_layer_norm
        translation.enlarged_conv = lambda x, conv: conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    w = train_munit.Weights(recon_x_cyc_w=10.0)
    return lambda i: step("MUNIT", modules["gen"], modules["dis"], x, train_munit.draws(0, i, run, 1), w, update,
                          gan_type="lsgan", run=run)


METHODS = {"MUNIT": munit}


def measure(method: str, form: str, side: int, dim: int, device: str, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    run = Run(torch.device(device), 0, 1, "off")
    iterate = METHODS[method](form, side, dim, run)
    clock, before = time.perf_counter if device == "cuda" else time.process_time, peak_memory(run.device)
    seconds, losses = [], {}
    for i in range(repeats + 1):
        start = clock()
        losses = iterate(i)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
        if i == 0:
            first = {key: float(loss) for key, loss in losses.items()}
    return {"seconds": statistics.median(seconds[1:]), "memory": peak_memory(run.device) - before, "losses": first}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    p.add_argument("--side", type=int, default=128)
    p.add_argument("--dim", type=int, default=32)
    p.add_argument("--device", default="cpu")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--form", choices=["ours", "plain"], help="print one form of the first method as JSON")
    args = p.parse_args()
    if args.form:
        print(json.dumps(measure(args.methods[0], args.form, args.side, args.dim, args.device, args.repeats)))
        return
    print(f"{args.side}x{args.side}, {args.dim} channels, {torch.get_num_threads()} threads\n"
          "| | plain, s | ours, s | ratio | plain, GiB | ours, GiB | ratio |\n|---|---|---|---|---|---|---|")
    for method in args.methods:
        results = []
        for form in ("plain", "ours"):
            done = subprocess.run([sys.executable, __file__, "--methods", method, "--form", form, "--side",
                                   str(args.side), "--dim", str(args.dim), "--device", args.device, "--repeats",
                                   str(args.repeats)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{method}, {form}: {done.stderr}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
        plain, ours = results
        for key, value in plain["losses"].items():
            assert abs(ours["losses"][key] - value) <= 1e-4 * abs(value), (key, value, ours["losses"][key])
        print(f"| {method} | " + " | ".join(f"{plain[k]:.2f} | {ours[k]:.2f} | {ours[k] / plain[k]:.2f}"
                                            for k in ("seconds", "memory")) + " |")


if __name__ == "__main__":
    main()
