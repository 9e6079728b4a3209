"""Renders views and writes them to disk in the layouts of GTA5 and Cityscapes."""
import json
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from tqdm import tqdm

from lib.demo.streets.look import CLASSES, SOURCE, TARGET
from lib.demo.streets.objects import compose
from lib.demo.streets.shading import fractal_noise, shade
from lib.errors import UserError
from lib.files import replaced_folder

VERSION = 7  # raise it when the pictures change: demos rendered before are then rendered again


def render_view(domain: str, seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """View `index` of "source", "train" or "val", size (width, height): uint8 [H, W, 3] and label ids, uint8 [H, W]."""
    look = SOURCE if domain == "source" else TARGET
    name = f"{domain}/{seed}/{index}"
    scene = compose(Random(name), look, *size)
    grain, stains = fractal_noise(seed, 1.1), fractal_noise(seed, 1.9)
    return shade(scene, np.random.default_rng(list(name.encode())), look, grain, stains)


def render_demo(root: Path, seed: int = 0, size: tuple[int, int] = (192, 96), n_source: int = 240, n_target: int = 160,
                n_val: int = 40) -> Path:
    """Renders the pair into root/gta5 and root/cityscapes and returns root; the same seed gives the same bytes.

    size is (width, height) in pixels, the counts are pictures. A pair rendered before with the same settings is kept,
    one with other settings is replaced as a whole; an interrupted rendering leaves what was there. Raises UserError
    where root holds anything else or cannot be written.
    """
    root = Path(root)
    counts = {"source": n_source, "train": n_target, "val": n_val}
    settings = json.dumps({"version": VERSION, "seed": seed, "size": list(size), **counts})

    def rendered() -> bool:
        return (root / "demo.json").is_file() and (root / "demo.json").read_bytes() == settings.encode()

    if rendered():
        return root
    ours = {"gta5", "cityscapes", "demo.json"}
    if root.exists() and not (root.is_dir() and {p.name for p in root.iterdir()} <= ours):
        raise UserError(f"{root}: holds other files than a demo; name a new or empty folder")
    palette = bytes(c for i in range(256) for c in CLASSES.get(i, (0, 0, 0)))
    with replaced_folder(root, rendered) as draft:
        for domain, count in counts.items():
            for index in tqdm(range(count), f"rendering {domain}", leave=False, disable=None):
                picture, label = render_view(domain, seed, index, size)
                label = Image.fromarray(label)
                if domain == "source":
                    label.putpalette(palette)
                    paths = [draft / "gta5" / kind / f"{index + 1:05}.png" for kind in ("images", "labels")]
                else:
                    city = "lakeside" if domain == "val" else ("millbrook", "northgate", "riverton")[index % 3]
                    stem = f"{domain}/{city}/{city}_{index:06}_000019"
                    paths = [draft / "cityscapes" / "leftImg8bit" / f"{stem}_leftImg8bit.png",
                             draft / "cityscapes" / "gtFine" / f"{stem}_gtFine_labelIds.png"]
                for image, path in zip((Image.fromarray(picture), label), paths, strict=True):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path, compress_level=1)
        (draft / "demo.json").write_text(settings)
    return root
