"""What an iteration of the translators costs, beside the plain formulation, and a picture through translate.py.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/bench_translation.py [--side 128] [--dim 32] [--size 1024,512]

Random pictures, float32, batch 1, networks of --dim channels (the methods': 64); each form in a process of its own.
Times are processor seconds on a CPU (wall-clock seconds on a GPU), the median of --repeats; memory is what the process
(the GPU's allocator) needs at most, beyond what it held before. All forms of a row compute the same, which is checked.

plain: every picture and every code passes alone, as in the releases. MUNIT: codes are computed for D and again for G,
D's turn builds the graph of the generators, G's turn computes the gradients of D's weights, layer norm is written out
of elementary operations, and pictures are enlarged before the convolution. CycleGAN: the graph of both directions is
held until one backward pass for all losses. Pictures: read, translated and written by translate.py, whole or in tiles.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_munit  # noqa: E402
import train_spgan  # noqa: E402
from lib import flags  # noqa: E402
from lib.models import translation  # noqa: E402
from lib.models.cyclegan import ResnetGenerator, init_normal  # noqa: E402
from lib.models.translation import MunitGenerator  # noqa: E402
from lib.optim import GuardedStep  # noqa: E402
from lib.predict_translation import Same, Translator  # noqa: E402
from lib.runtime import Run, peak_memory  # noqa: E402
from translate import translate_file  # noqa: E402

Iterate = Callable[[int], Mapping[str, float]]  # number of the iteration -> what must be the same in every form

# --- MUNIT ------------------------------------------------------------------------------------------------------------


def plain_layer_norm(self, x: Tensor) -> Tensor:
    flat = x.reshape(x.shape[0], -1)
    mean, std = flat.mean(1).view(-1, 1, 1, 1), flat.std(1).view(-1, 1, 1, 1)
    x = (x - mean) / (std + self.eps)
    return x * self.gamma.view(1, -1, 1, 1) + self.beta.view(1, -1, 1, 1)


def plain_munit_step(trainer, gen, dis, x, draw, w, update, *, gan_type, run) -> dict[str, Tensor]:
    """train_munit.step, one thing at a time."""
    loss_gan = train_munit.loss_gan
    gen_a, gen_b, dis_a, dis_b = gen["a"], gen["b"], dis["a"], dis["b"]
    x_a, x_b = x["a"], x["b"]
    shape = len(x_a), gen_a.style_dim, 1, 1

    def encode(net, x):
        return net.encode(x), net.style(x)

    s_a, s_b = draw(shape), draw(shape)
    (c_a, _), (c_b, _) = encode(gen_a, x_a), encode(gen_b, x_b)
    x_ba, x_ab = gen_a.decode(c_b, s_a), gen_b.decode(c_a, s_b)
    losses = {f"loss_dis_{d}": loss_gan(net(fake.detach()), 0.0, gan_type) + loss_gan(net(real), 1.0, gan_type)
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
    total = total + w.recon_x_cyc_w * (F.l1_loss(gen_a.decode(c_a_recon, s_a_prime), x_a)
                                       + F.l1_loss(gen_b.decode(c_b_recon, s_b_prime), x_b))
    total = total + w.gan_w * (loss_gan(dis_a(x_ba), 1.0, gan_type) + loss_gan(dis_b(x_ab), 1.0, gan_type))
    update("gen", total)
    return {"loss_gen_total": total, **losses}


def munit(form: str, args: argparse.Namespace, run: Run) -> Iterate:
    """MUNIT with the cycle."""
    given = train_munit.parse_args(["--gen-dim", str(args.dim), "--dis-dim", str(args.dim)])
    modules = {name: run.place_net(nets) for name, nets in train_munit.build(given).items()}
    optimizers = {name: torch.optim.Adam(nets.parameters(), 1e-4) for name, nets in modules.items()}
    update = GuardedStep(run, modules, optimizers, run.scaler(), 1e6)
    x = {d: run.place(torch.rand(1, 3, args.side, args.side) * 2 - 1) for d in "ab"}
    step, w = train_munit.step, train_munit.Weights(recon_x_cyc_w=10.0)
    if form == "plain":
        step, translation.LayerNorm.forward = plain_munit_step, plain_layer_norm
        translation.enlarged_conv = lambda x, conv: conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    return lambda i: step("MUNIT", modules["gen"], modules["dis"], x, train_munit.draws(0, i, run, 1), w, update,
                          gan_type="lsgan", run=run)


# --- CycleGAN ---------------------------------------------------------------------------------------------------------


def plain_cyclegan_step(nets, pool_a, pool_b, x_a, x_b, w, run, update) -> dict[str, Tensor]:
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
    update("G", losses["G"])
    d_a.requires_grad_(True), d_b.requires_grad_(True)
    for name, d, real, fake in (("D_A", d_b, x_b, pool_b.query(x_ab)), ("D_B", d_a, x_a, pool_a.query(x_ba))):
        losses[name] = (F.mse_loss(score := d(real), torch.ones_like(score))
                        + F.mse_loss(score := d(fake.detach()), torch.zeros_like(score))) / 2
        update.backward("D", losses[name])
    update.step("D")
    return losses


def cyclegan(form: str, args: argparse.Namespace, run: Run) -> Iterate:
    nets = train_spgan.build("cyclegan", args.dim, args.dim)
    for net in nets[:4]:
        run.place_net(init_normal(net))
    parts = {"G": torch.nn.ModuleList(nets[:2]), "D": torch.nn.ModuleList(nets[2:4])}
    optimizers = {name: torch.optim.Adam(part.parameters(), 2e-4, (0.5, 0.999)) for name, part in parts.items()}
    update = GuardedStep(run, parts, optimizers, run.scaler(), 1e6)
    pools = [train_spgan.ImagePool(50, np.random.default_rng(0), run) for _ in range(2)]
    x_a, x_b = (run.place(torch.rand(1, 3, args.side, args.side) * 2 - 1) for _ in range(2))
    step = plain_cyclegan_step if form == "plain" else train_spgan.step
    return lambda i: step(nets, *pools, x_a, x_b, train_spgan.Weights(), run, update)


# --- translate.py -----------------------------------------------------------------------------------------------------


def picture(method: str, form: str, args: argparse.Namespace, run: Run) -> Iterate:
    """One file of --size through translate.py; form: "whole", or "tiles of N"."""
    if method == "MUNIT":
        translator = Translator.of_pair(MunitGenerator(dim=args.dim), MunitGenerator(dim=args.dim)).place(run)
        style = torch.randn(1, translator.styles.style_dim, 1, 1, device=run.device)
    else:
        translator, style = Translator(method, Same(), init_normal(ResnetGenerator(args.dim))).place(run), None
    folder = Path(tempfile.mkdtemp())
    pixels = np.random.default_rng(0).integers(0, 256, (args.size[1] // 16, args.size[0] // 16, 3), np.uint8)
    Image.fromarray(pixels).resize(args.size, Image.Resampling.BICUBIC).save(folder / "x.png")
    tile = None if form == "whole" else int(form.split()[-1])

    def translate(i: int) -> dict[str, float]:
        translate_file(translator, folder / "x.png", folder / "y.png", run, style, tile, compress_level=1)
        return {"mean": float(np.asarray(Image.open(folder / "y.png")).mean())}
    return translate


# --- measuring --------------------------------------------------------------------------------------------------------

TILES = ("whole", "tiles of 512", "tiles of 256")
ROWS = {"MUNIT, iteration": (munit, ("plain", "ours")), "CycleGAN, iteration": (cyclegan, ("plain", "ours")),
        "MUNIT, picture": (lambda *rest: picture("MUNIT", *rest), TILES),
        "CycleGAN, picture": (lambda *rest: picture("CycleGAN", *rest), TILES)}


def measure(row: str, form: str, args: argparse.Namespace) -> dict[str, object]:
    """Seconds, GiB, and what must be the same in all forms, of the first time."""
    torch.manual_seed(0)
    run = Run(torch.device(args.device), 0, 1, "off")
    iterate = ROWS[row][0](form, args, run)
    on_gpu = run.device.type == "cuda"
    clock, before = time.perf_counter if on_gpu else time.process_time, peak_memory(run.device)
    seconds = []
    for i in range(args.repeats if "iteration" in row else args.repeats_pictures):
        start = clock()
        values = iterate(i)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
        if i == 0:
            first = {key: float(torch.as_tensor(value).detach()) for key, value in values.items()}
    return {"seconds": statistics.median(seconds), "GiB": peak_memory(run.device) - before, "values": first}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--side", type=int, default=128, help="of the crops of an iteration")
    p.add_argument("--dim", type=int, default=32, help="channels of the first layers")
    p.add_argument("--size", type=flags.size, default=(1024, 512), help="width,height of a picture")
    p.add_argument("--device", default="cpu")
    p.add_argument("--repeats", type=int, default=7, help="of an iteration")
    p.add_argument("--repeats-pictures", type=int, default=2)
    p.add_argument("--form", nargs=2, help="print one row and form as JSON")
    args = p.parse_args()
    if args.form:
        print(json.dumps(measure(*args.form, args)))
        return
    print(f"{torch.get_num_threads()} threads, {args.dim} channels; iterations at {args.side} x {args.side}, pictures "
          "of {} x {}\n\n| | seconds | ratio | GiB | ratio |\n|---|---|---|---|---|".format(*args.size), flush=True)
    for row, (_, forms) in ROWS.items():
        base = None
        for form in forms:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--form", row, form], capture_output=True,
                                  text=True)
            if done.returncode:
                raise SystemExit(f"{row}, {form}: {done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            base = base or found
            for key, value in base["values"].items():
                assert abs(found["values"][key] - value) <= 1e-3 * abs(value), (row, form, key, value, found)
            print(f"| {row}, {form} | {found['seconds']:.2f} | {found['seconds'] / base['seconds']:.2f} | "
                  f"{found['GiB']:.2f} | {found['GiB'] / base['GiB']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
