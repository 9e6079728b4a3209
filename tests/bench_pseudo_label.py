"""Times the pseudo-label operators on one 19-class map against the original way and prints a Markdown table.
Second part of bench_ops.py; alone:

    taskset -c 1 python tests/bench_pseudo_label.py    one CPU thread: milliseconds of CPU time, best of several runs
    python tests/bench_pseudo_label.py --device cuda   the same on a GPU: wall-clock time
    taskset -c 1 python tests/bench_pseudo_label.py --images 500   a data set as train_cbst.py labels it, from the
                                                       network's output to PNG files, in seconds and MiB

The original way is what CBST's release does for each image: softmax, a transposed copy in NumPy, a Python list of
confidences per class, a sort, a division. The read bound is one sum over the full-size logits. "Maps kept": the passes
after the first use its maps of labels and confidences.
"""
import argparse
import ctypes
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import ops, visual  # noqa: E402

CLASSES, DS_RATE, PORTION = 19, 4, 0.2
COUNTING = {"ds_rate": DS_RATE, "return_maps": False}  # as train_cbst.py counts
KEEPING = {"ds_rate": DS_RATE, "return_maps": True}    # 10 MB an image, for the passes after the first


def original_confidences(logits, size):
    """Upsampling where necessary, softmax, prediction and one list of confidences per class."""
    if logits.shape[1:] != size:
        logits = F.interpolate(logits[None], size, mode="bilinear", align_corners=True)[0]
    p = logits.softmax(0).cpu().numpy().transpose(1, 2, 0)
    label, confidence = np.argmax(p, axis=2), np.amax(p, axis=2)
    lists = [[] for _ in range(CLASSES)]
    for c in range(CLASSES):
        lists[c].extend(confidence[label == c][::DS_RATE])
    return p, lists


def original_thresholds(lists):
    thresholds = np.ones(CLASSES, np.float32)
    for c in range(CLASSES):
        lists[c].sort(reverse=True)
        k = int(np.floor(len(lists[c]) * PORTION))
        if k:
            thresholds[c] = lists[c][k - 1]
    return thresholds


def original_labels(p, thresholds):
    ratio = p / thresholds
    label = np.argmax(ratio, axis=2).astype(np.uint8)
    label[np.amax(ratio, axis=2) < 1] = 255
    return label


def original_label_map(logits, size):
    logits = F.interpolate(logits[None], size, mode="bilinear", align_corners=True)[0]
    return np.argmax(logits.cpu().numpy().transpose(1, 2, 0), axis=2).astype(np.uint8)


def best_ms(function, device, repeats):
    """The first of repeats + 1 runs warms up."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(repeats + 1):
        start = clock()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 1e3 * min(times[1:])


def peak_mib(function):
    """Growth of the process's peak memory during one call."""
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier calls freed, or it would serve this one unseen
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the peak to the present size
    status = Path("/proc/self/status")

    def field(name):
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(name))

    before = field("VmRSS")
    function()
    return max(0.0, field("VmHWM") - before)


def original_data_set(images, size, ids, folder):
    """Softmax maps to disk, lists of confidences, sort; the maps again, labels, PNG."""
    everything = [[] for _ in range(CLASSES)]
    for n, logits in enumerate(images):
        p, lists = original_confidences(logits, size)
        np.save(folder / f"{n}.npy", p)
        for c in range(CLASSES):
            everything[c].extend(lists[c])
    thresholds = original_thresholds(everything)
    for n in range(len(images)):
        label = original_labels(np.load(folder / f"{n}.npy"), thresholds)
        Image.fromarray(ids[label]).save(folder / f"{n}.png")
    return thresholds


def our_data_set(images, size, ids, folder):
    """As train_cbst.py: three passes, nothing kept of an image but its PNG."""
    hist, fine = ops.new_histogram(CLASSES), ops.new_histogram(CLASSES, fine=True)
    for logits in images:
        ops.confidence_histogram_(hist, logits, size, **COUNTING)
    bins = ops.select_threshold(hist, PORTION).bins
    for logits in images:
        ops.refine_histogram_(fine, bins, logits, size, **COUNTING)
    thresholds = ops.select_threshold(hist, PORTION, fine=fine).value
    for n, logits in enumerate(images):
        label = ops.pseudo_label(logits, thresholds, size).numpy()
        visual.save(Image.fromarray(ids[label]), folder / f"{n}.png", compress_level=1)
    return thresholds.numpy()


class Shifted:
    """As many different images as wanted from one map of logits, without memory for them."""

    def __init__(self, logits, count):
        self.logits, self.count = logits, count

    def __len__(self):
        return self.count

    def __iter__(self):
        return (torch.roll(self.logits, (7 * n, 13 * n), (1, 2)) for n in range(self.count))


def bench_data_set(coarse, size, count, few):
    """Both ways on ``few`` images (equal results), then ours on ``count``."""
    ids = np.arange(7, 7 + 256).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("original", "ours", "many")]
        for path in folders:
            path.mkdir()

        def timed(function, *arguments):
            start = time.process_time()
            result = function(*arguments)
            return time.process_time() - start, result

        our_data_set(Shifted(coarse, 1), size, ids, folders[1])  # warms up
        seconds, expected = timed(original_data_set, Shifted(coarse, few), size, ids, folders[0])
        small, found = timed(our_data_set, Shifted(coarse, few), size, ids, folders[1])
        assert np.array_equal(found, expected)
        for n in range(few):
            same = np.asarray(Image.open(folders[0] / f"{n}.png")) == np.asarray(Image.open(folders[1] / f"{n}.png"))
            assert same.mean() > 1 - 1e-6, same.mean()
        disk = sum(p.stat().st_size for p in folders[0].glob("*.npy")) / few / 2**20
        many = []
        memory = peak_mib(lambda: many.append(timed(our_data_set, Shifted(coarse, count), size, ids, folders[2])[0]))
        assert len(list(folders[2].iterdir())) == count
        pngs = sum(p.stat().st_size for p in folders[2].iterdir()) / count / 2**20
    print(f"{CLASSES} x {size[0]} x {size[1]} from logits at {tuple(coarse.shape[1:])}, PNG files included\n")
    print("| | images | s CPU an image | ratio | temporary files, MiB an image | peak memory, MiB |")
    print("|---|---|---|---|---|---|")
    print(f"| original way | {few} | {seconds / few:.3f} | {seconds / few / (many[0] / count):.1f} | {disk:.0f} | |")
    print(f"| ours | {few} | {small / few:.3f} | | 0 | |")
    print(f"| ours | {count} | {many[0] / count:.3f} | 1 | 0 (PNG: {pngs:.2f}) | {memory:.0f} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--images", type=int, help="label a data set of so many images instead")
    parser.add_argument("--few", type=int, default=3, help="images for the original way then")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    size, device = tuple(args.size), args.device
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.randn(1, CLASSES, 17, 33, generator=generator), (65, 129), mode="bicubic")[0]
    coarse = 3 * coarse + 0.3 * torch.randn(coarse.shape, generator=generator)  # regions with noisy borders
    full = F.interpolate(coarse[None], size, mode="bilinear", align_corners=True)[0].contiguous()
    coarse, full = coarse.to(device), full.to(device)
    if args.images:
        del full
        return bench_data_set(coarse, size, args.images, args.few)

    def ms(function, repeats=args.repeats):
        return best_ms(function, device, repeats)

    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU, one thread'}, torch {torch.__version__}, "
          f"{ops.backend()} operators, {CLASSES} x {size[0]} x {size[1]} float32\n")
    bound = ms(full.sum)
    print(f"Read bound: {bound:.1f} ms.\n")
    print("| from | step | original | ours | ratio | x read bound |\n|---|---|---|---|---|---|")

    def row(source, step, theirs, mine):
        print(f"| {source} | {step} | {theirs:.1f} | {mine:.1f} | {theirs / mine:.1f} | {mine / bound:.2f} |",
              flush=True)

    few = max(1, args.repeats // 5)
    ours = ms(lambda: ops.upsample_argmax(coarse, size))
    row("65 x 129", "label map (upsample_argmax)", ms(lambda: original_label_map(coarse, size), few), ours)
    theirs = ms(lambda: F.interpolate(coarse[None], size, mode="bilinear", align_corners=True).argmax(1), few)
    row("65 x 129", "label map, against torch.argmax", theirs, ours)
    compiled = torch.compile(lambda x: F.interpolate(x, size, mode="bilinear", align_corners=True).argmax(1))
    row("65 x 129", "label map, against torch.compile of that", ms(lambda: compiled(coarse[None]), few), ours)
    hist, fine = ops.new_histogram(CLASSES, device), ops.new_histogram(CLASSES, device, fine=True)

    def compare(name, logits):
        hist.zero_(), fine.zero_()
        ops.confidence_histogram_(hist, logits, size, **COUNTING)
        bins = ops.select_threshold(hist, PORTION).bins
        ops.refine_histogram_(fine, bins, logits, size, **COUNTING)
        exact = ops.select_threshold(hist, PORTION, fine=fine).value
        p, lists = original_confidences(logits, size)
        thresholds = original_thresholds([list(x) for x in lists])
        found = ops.pseudo_label(logits, exact, size).cpu().numpy()
        expected = original_labels(p, thresholds)
        maps = ops.confidence_histogram_(ops.new_histogram(CLASSES, device), logits, size, **KEEPING)
        assert np.array_equal(ops.pseudo_label(logits, exact, size, maps=maps).cpu().numpy(), found)
        print(f"{name}: thresholds differ by at most {np.abs(exact.cpu().numpy() / thresholds - 1).max():.1e} "
              f"(relative), labels in {np.mean(found != expected):.1e} of the pixels", file=sys.stderr)

        unsorted = iter([[list(x) for x in lists] for _ in range(few + 1)])
        theirs = [ms(lambda: original_confidences(logits, size), few),
                  ms(lambda: original_thresholds(next(unsorted)), few),
                  ms(lambda: original_labels(p, thresholds), few)]
        mine = [ms(lambda: ops.confidence_histogram_(hist, logits, size, **COUNTING)),
                ms(lambda: ops.refine_histogram_(fine, bins, logits, size, **COUNTING)),
                ms(lambda: ops.pseudo_label(logits, exact, size))]
        row(name, "confidences (softmax, maximum, lists or histogram)", theirs[0], mine[0])
        row(name, "thresholds (sort; or a second pass)", theirs[1], mine[1])
        row(name, "labels", theirs[2], mine[2])
        row(name, "**all, exact thresholds**", sum(theirs), sum(mine))
        row(name, "all, thresholds within 2^-11 (no refining)", sum(theirs), mine[0] + mine[2])
        mine = [ms(lambda: ops.confidence_histogram_(hist, logits, size, **KEEPING)),
                ms(lambda: ops.refine_from_maps_(fine, bins, *maps, ds_rate=DS_RATE)),
                ms(lambda: ops.pseudo_label(logits, exact, size, maps=maps))]
        row(name, "maps kept: confidences", theirs[0], mine[0])
        row(name, "maps kept: thresholds, a second pass over the maps", theirs[1], mine[1])
        row(name, "maps kept: labels", theirs[2], mine[2])
        row(name, "**maps kept: all, exact thresholds**", sum(theirs), sum(mine))
        if device == "cpu":
            del p, lists
            memory = [peak_mib(lambda: original_labels(original_confidences(logits, size)[0], thresholds)),
                      peak_mib(lambda: (ops.confidence_histogram_(hist, logits, size, **COUNTING),
                                        ops.pseudo_label(logits, exact, size)))]
            histograms = (hist.nbytes + fine.nbytes) >> 20
            print(f"| {name} | peak memory beside the logits and {histograms} MiB of histograms, MiB "
                  f"| {memory[0]:.0f} | {memory[1]:.0f} | {memory[0] / max(memory[1], 1):.0f} | - |")

    compare("full size", full)
    compare("65 x 129", coarse)
    select = ms(lambda: ops.select_threshold(hist, PORTION), few)
    print(f"\nselect_threshold takes {select:.0f} ms, once for a data set.")


if __name__ == "__main__":
    main()
