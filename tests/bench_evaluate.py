"""Forward passes of evaluate.py on this machine: the plain network against the forms that --amp and --compile choose.

    python tests/bench_evaluate.py [--size 1024,512] [--arch resnet101] [--repeats 3] [--compile] [--device cuda]

Prints one table: median seconds an image, the ratio to the plain forward pass of the same run, and the share of the
pixels whose class changes (random weights: the most sensitive case).
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.models.deeplab import build, logits_of  # noqa: E402
from lib.predict import prepare  # noqa: E402


def median_seconds(call, repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="1024,512")
    p.add_argument("--arch", default="resnet101")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--compile", action="store_true", help="also torch.compile (adds minutes)")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    width, height = (int(n) for n in args.size.split(","))
    torch.manual_seed(0)
    net = build("DeeplabMulti", 19, args.arch).to(args.device)
    net.train()
    for _ in range(2):  # running statistics of the order of the activations
        net(torch.randn(1, 3, 128, 128, device=args.device) * 60)
    net.eval()
    x = torch.randn(1, 3, height, width, device=args.device) * 60
    forms = {"plain": (net, x), "float32, BN folded, channels last": (prepare(net), x),
             "bf16 (--amp bf16)": (prepare(net, torch.bfloat16), x.bfloat16())}
    if args.compile:
        forms["float32, compiled (--compile)"] = (prepare(net, compiled=True), x)
        forms["bf16, compiled (--amp bf16 --compile)"] = (prepare(net, torch.bfloat16, compiled=True), x.bfloat16())
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.arch}, {width}x{height}, {name}, torch {torch.__version__}, median of {args.repeats}\n")
    print("| form | s an image | times plain | classes changed |\n|---|---|---|---|")
    plain = truth = None
    for form, (module, image) in forms.items():
        if form != "plain":
            image = image.contiguous(memory_format=torch.channels_last)
        label = logits_of(module(image)).argmax(1)  # also the warm-up
        seconds = median_seconds(lambda m=module, i=image: m(i), args.repeats, args.device)
        plain, truth = plain or seconds, label if truth is None else truth
        print(f"| {form} | {seconds:.2f} | {plain / seconds:.2f} | {100 * (label != truth).float().mean():.2f} % |",
              flush=True)


if __name__ == "__main__":
    main()
