"""Pictures through a translator: a trained one, for translate.py, and one in training, for the trainers' panels."""
from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, tiling, visual
from lib.datasets.pictures import check_pictures, find_pictures, read_image, spread
from lib.datasets.unpaired import Domains, from_symmetric, short_side_size, to_symmetric
from lib.errors import UserError, listed
from lib.models import cyclegan, translation
from lib.models.translation import Generator, MunitGenerator
from lib.runtime import Run

MAX_SIDE = 16384  # pixels of a picture


@dataclass
class Translator:
    """One direction of a trained pair. encoder, decoder: one generator after another; styles: of MUNIT's domain."""

    method: str
    encoder: nn.Module
    decoder: nn.Module
    scale: tuple[str, object] | None = None   # ("width" | "short_side" | "size", value) of its training, where known
    styles: MunitGenerator | None = None
    stride: int = 4

    @classmethod
    def of_pair(cls, here: Generator, there: Generator, scale: tuple[str, object] | None = None) -> Translator:
        """From one domain of UNIT or MUNIT to the other."""
        if isinstance(there, MunitGenerator):
            return cls("MUNIT", here.enc_content, there.dec, scale, there, here.stride)
        return cls("UNIT", here.enc, there.dec, scale, stride=here.stride)

    def working_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) at which an image of ``size`` is translated."""
        kind, value = self.scale or (None, None)
        if kind == "width":
            return value, round(size[1] * value / size[0])
        return short_side_size(size, value) if kind == "short_side" else tuple(value) if kind == "size" else size

    def place(self, run: Run) -> Translator:
        """On the run's device, in eval mode."""
        for net in filter(None, (self.encoder, self.decoder, self.styles)):
            run.place_net(net.eval())
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor, style: Tensor | None = None, tile: int | None = None) -> Tensor:
        """x [1, 3, H, W] in -1..1 -> the same size; style [1, S, 1, 1]; tile: the side of tiles."""
        height, width = x.shape[2:]
        x = padded(x, self.stride)
        row = None if style is None else self.styles.mlp(style)
        if tile:
            layers = tiling.layers_of(self.encoder.model) + tiling.layers_of(self.decoder.model, row)
            y = tiling.apply(layers, x, tile)
        else:
            code = self.encoder(x)
            y = self.decoder(code) if row is None else self.decoder(code, row)
        return y[:, :, :height, :width]


def padded(x: Tensor, multiple: int) -> Tensor:
    """x [N, C, H, W] continued by reflection to the right and below, to sides that are multiples."""
    return F.pad(x, (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple), mode="reflect")


class Same(nn.Module):
    """The encoder of a generator that is not in two parts."""

    model = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return x


def load_translator(path: str | Path, a2b: bool) -> Translator:
    """The translator of any of the four methods' files, recognised by its keys. Raises UserError."""
    path = Path(path)
    state = checkpoint.load(path)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} holds no networks")
    if isinstance(state.get("a"), Mapping) and isinstance(state.get("b"), Mapping):  # UNIT, MUNIT: both domains
        pair, meta = translation.read_pair(path)
        how = {key: meta[key] for key in ("activ", "pad_type") if key in meta}
        gen = {d: translation.build_generator(pair[d], **how, source=f"{path} ({d})") for d in "ab"}
        sizes = meta.get("new_size")
        if sizes and not (isinstance(sizes, (list, tuple)) and len(sizes) == 2
                          and all(type(n) is int and 0 < n <= MAX_SIDE for n in sizes)):
            raise UserError(f"{path} says new_size = {sizes!r} of its training, which makes no sense")
        here, there = "ab" if a2b else "ba"
        return Translator.of_pair(gen[here], gen[there], ("short_side", sizes["ab".index(here)]) if sizes else None)
    if isinstance(state.get("Ga"), Mapping) and isinstance(state.get("Gb"), Mapping):  # SPGAN's port: Gb maps A to B
        weights, meta = state["Gb" if a2b else "Ga"], {}
    else:
        if not a2b:
            if "_net_G_A" not in path.name:
                raise UserError(f"{path} is one direction only: name the file of the other one, without --a2b 0")
            path = path.with_name(path.name.replace("_net_G_A", "_net_G_B"))
            state = checkpoint.load(path)
        weights, meta = state, getattr(state, "segadapt", {})
    if not any(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{path} holds no generator: its keys are {listed(list(weights))}")
    net = cyclegan.build_generator(cyclegan.from_release(weights), str(path))
    scale = meta.get("scale")
    if scale and not (isinstance(scale, (list, tuple)) and len(scale) == 2 and scale[0] in ("width", "size")):
        raise UserError(f"{path} says scale = {scale!r} of its training, which makes no sense")
    method = "CycleGAN" if "model.1.bias" in net.state_dict() else "SPGAN"
    return Translator(method, Same(), net, tuple(scale) if scale else None)


class Scale(nn.Module):
    """The decoder that scales and shifts each channel."""

    def __init__(self, factor: Tensor, shift: Tensor):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(len(factor), len(factor), 1))
        self.model[0].weight.data.copy_(factor.diag()[:, :, None, None])
        self.model[0].bias.data.copy_(shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def to_bytes(self) -> bytes:
        """What tells two of them apart."""
        return b"".join(p.detach().cpu().numpy().tobytes() for p in self.parameters())


def match_statistics(source: Sequence[Path], target: Sequence[Path], max_images: int = 500) -> Translator:
    """The translation without a network: each channel's mean and deviation over the source become the target's.

    They are measured on up to ``max_images`` pictures of each, spread over the lists.
    """
    (mean_s, std_s), (mean_t, std_t) = (channel_statistics([paths[i] for i in spread(len(paths), max_images)])
                                        for paths in (source, target))
    factor = std_t / std_s.clamp(min=1e-6)
    return Translator("mean and deviation", Same(), Scale(factor, mean_t - mean_s * factor), stride=1)


def channel_statistics(images: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation), float64 [3] each, of all pixels of the pictures, in -1..1."""
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for path in images:
        x = to_symmetric(read_image(path)).flatten(1).double()
        count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


class Styles:
    """MUNIT's k styles of each file, drawn from N(0, I), or of pictures. A file's do not depend on the others.

    pictures: a file or a folder; synchronized: all files have the same styles. Raises UserError for bad pictures.
    """

    def __init__(self, translator: Translator, run: Run, seed: int, pictures: str | Path | None = None,
                 synchronized: bool = False):
        self.translator, self.run, self.seed, self.synchronized = translator, run, seed, synchronized
        self.pictures = []
        if pictures:
            self.pictures = find_pictures(pictures) if Path(pictures).is_dir() else [Path(pictures)]
            check_pictures(self.pictures)

    def __call__(self, name: str, k: int) -> Tensor | None:
        """[1, S, 1, 1], the k-th of the file ``name``; None for the methods without styles."""
        net = self.translator.styles
        if net is None:
            return None
        key = 0 if self.synchronized else zlib.crc32(name.encode())
        rng = np.random.default_rng([self.seed, key, k])
        if not self.pictures:
            return torch.from_numpy(rng.standard_normal((1, net.style_dim, 1, 1), np.float32)).to(self.run.device)
        image = read_image(self.pictures[rng.integers(len(self.pictures))])
        image = image.resize(self.translator.working_size(image.size), Image.Resampling.BICUBIC)
        with torch.no_grad():
            return net.style(to_symmetric(image)[None].to(self.run.device))


# --- in training ------------------------------------------------------------------------------------------------------


class Panels:
    """Pictures of what a translator in training does, in the place of a Session's validation.

    show: (a test picture of A, one of B), [1, 3, H, W] in -1..1 at the scale of training -> rows of such pictures, one
    for each of ``captions``. count: pairs of test pictures. file: a panel's name in ``folder``, from its iteration.
    """

    def __init__(self, data: Domains, show: Callable[[Tensor, Tensor], Sequence[Sequence[Tensor]]],
                 captions: Sequence[str], folder: Path, run: Run, count: int, file: str = "{}.png"):
        self.show, self.captions, self.folder, self.run, self.file = show, captions, folder, run, file
        count = min(count, len(data.test_a), len(data.test_b))
        self.pairs = list(zip(*([paths[i] for i in spread(len(paths), count)] for paths in (data.test_a, data.test_b)),
                              strict=True))
        self.transforms = data.train_a.transform, data.train_b.transform
        self.iteration: int | None = None

    def state_dict(self) -> dict[str, object]:
        return {"iteration": self.iteration}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.iteration = state["iteration"]

    def __call__(self, net: nn.Module, iteration: int, meta: Mapping[str, object], log: object) -> None:
        self.iteration = iteration
        self.write(self.file.format(iteration))

    @torch.no_grad()
    def write(self, name: str) -> None:
        """One panel, of the networks as they are."""
        if not self.pairs or not self.run.is_main:
            return
        rows = []
        for pair in self.pairs:
            pictures = (self.run.place(transform.whole(read_image(path))[None])
                        for transform, path in zip(self.transforms, pair, strict=True))
            rows += [[from_symmetric(cell[0]) for cell in cells] for cells in self.show(*pictures)]
        picture = visual.panel(rows, self.captions, min(max(rows[0][0].width, 128), 320))
        visual.save(picture, self.folder / name)

    def report(self) -> None:
        if self.pairs:
            self.run.say(f"pictures: {self.folder}")


def show_codes(gen: Mapping[str, Generator], styles: Sequence[Tensor]) -> tuple[Callable, list[str]]:
    """``show`` and ``captions`` of Panels for the generators "a" and "b" of UNIT or MUNIT.

    A row: x, its translations, its reconstruction, the way there and back. styles: MUNIT's, each of which gives a
    translation, as does the style of the other domain's picture.
    """
    def row(here: Generator, there: Generator, x: Tensor, other: Tensor) -> list[Tensor]:
        size, x, other = x.shape[2:], padded(x, here.stride), padded(other, there.stride)
        code = here.encode(x)
        if isinstance(here, MunitGenerator):
            own = here.style(x)
            fakes = [there.decode(code, s) for s in (*styles, there.style(other))]
            cells = [x, *fakes, here.decode(code, own), here.decode(there.encode(fakes[0]), own)]
        else:
            fake = there.decode(code)
            cells = [x, fake, here.decode(code), here.decode(there.encode(fake))]
        return [cell[:, :, :size[0], :size[1]] for cell in cells]

    def show(x_a: Tensor, x_b: Tensor) -> list[list[Tensor]]:
        return [row(gen["a"], gen["b"], x_a, x_b), row(gen["b"], gen["a"], x_b, x_a)]

    translations = [f"style {n + 1}" for n in range(len(styles))] + ["style of a picture" if styles else "translated"]
    return show, ["x", *translations, "reconstructed", "there and back"]
