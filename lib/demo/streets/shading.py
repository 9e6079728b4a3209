"""From a scene's faces to a picture and its labels: shading per pixel, the surfaces' patterns, and the camera."""
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from lib.demo.streets.look import BLUR_HEIGHT, Look
from lib.demo.streets.scene import (
    ASPHALT,
    AXIS,
    BARS,
    BRICK,
    COACH,
    COLOUR,
    FACADE,
    GRASS,
    HEAVENS,
    LABEL,
    LEAVES,
    MATERIAL,
    PAVING,
    PLANE,
    SECOND,
    SIZES,
    SUN,
    SUPERSAMPLING,
    Scene,
)


@cache
def fractal_noise(seed: int, slope: float, size: int = 256) -> np.ndarray:
    """Tileable multi-octave noise, float32 [size, size], mean 0, standard deviation 1; a larger slope is smoother."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    f[0, 0] = np.inf
    spectrum = np.fft.rfft2(np.random.default_rng(list(str(seed).encode())).standard_normal((size, size))) / f ** slope
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return (noise / noise.std()).astype(np.float32)


def shade(s: Scene, rng: np.random.Generator, look: Look, grain: np.ndarray,
          stains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [H, W, 3], and its label ids, uint8 [H, W], of a painted scene."""
    n = SUPERSAMPLING
    h, w = s.height // n, s.width // n

    def by_pixel(samples: np.ndarray) -> np.ndarray:  # [pixels, n * n]
        return samples.reshape(h, n, w, n).swapaxes(1, 2).reshape(h * w, n * n)

    ids = by_pixel(np.asarray(s.ids))
    edge = (ids != ids[:, :1]).any(1)  # shaded from all their samples, the pixels inside one face from the first
    where = by_pixel(np.arange(s.height * s.width))
    ids, where = (np.concatenate([a[~edge, 0], a[edge].ravel()]).astype(np.intp) for a in (ids, where))
    inside = h * w - np.count_nonzero(edge)
    faces = np.array(s.faces, np.float32).T.copy()  # [17, faces]

    def column(i: int, k: np.ndarray | slice = slice(None)) -> np.ndarray:
        return faces[i].take(ids[k])

    u, v = (where % s.width).astype(np.float32), (where // s.width).astype(np.float32)
    z = 1 / np.maximum(column(PLANE) * u + column(PLANE + 1) * v + column(PLANE + 2), 1 / 400)
    x, y = (u - s.u0) / s.focal * z, s.eye - (v - s.v0) / s.focal * z
    material = faces[MATERIAL].astype(np.uint8).take(ids)
    flat = (material >= ASPHALT) & (material <= GRASS)
    along = np.where(flat, x, column(AXIS) * x + column(AXIS + 1) * z - column(AXIS + 2))
    up = np.where(flat, z, y)
    rgb = np.stack([column(COLOUR + i) for i in range(3)])  # [3, pixels]

    light = 1 + look.texture * .6 * lookup(grain, up * 23, along * 23) + look.dirt * lookup(stains, up * 7, along * 7)
    for kind, pattern in PATTERNS.items():
        k = np.flatnonzero(material == kind)
        if k.size:
            surface = Surface(x[k], z[k], along[k], up[k], column(SIZES, k), column(SIZES + 1, k))
            mask, gain = pattern(s, look, grain, surface)
            light[k] += gain
            painted = k[mask]
            for i in range(3):
                rgb[i, painted] = column(SECOND + i, painted)
    lit = 1 - look.shadow * ((np.asarray(s.shade).ravel().take(where) > 0) & flat)
    sun = np.where(flat, s.sun[1] * lit, column(SUN))
    light *= look.ambient * (.55 + .45 * lit) + (1 - look.ambient) * 1.45 * sun
    clear = np.exp(-look.haze * np.minimum(z, 200))
    sky = material == HEAVENS
    light[sky], clear[sky] = 1, 1
    height = np.clip(1 - v[sky] / s.v0, 0, 1)
    cloud = lookup(stains, v[sky] * (120 / s.height) + s.v0 * 7, u[sky] * (90 / s.width) + s.u0 * 7)
    cloud = np.clip(cloud * .5 + look.clouds - .3, 0, 1) * .8
    for i in range(3):
        rgb[i, sky] = (look.sky[0][i] * height + look.sky[1][i] * (1 - height)) * (1 - cloud) + cloud * .93
        rgb[i] = rgb[i] * light * (look.illumination[i] * clear) + look.haze_colour[i] * (1 - clear)
    picture, label = np.empty((h * w, 3), np.float32), np.empty(h * w, np.uint8)
    picture[~edge], picture[edge] = rgb[:, :inside].T, rgb[:, inside:].reshape(3, -1, n * n).mean(2).T
    known = faces[LABEL].astype(np.uint8).take(ids)
    # On an edge the commonest of the four samples; of two and two the larger id (poles, people before surfaces).
    a, b, c, d = np.sort(known[inside:].reshape(-1, n * n), 1).T
    label[~edge], label[edge] = known[:inside], np.where(c == d, d, np.where(b == c, c, np.where(a == b, a, d)))
    return develop(picture.reshape(h, w, 3), rng, look), label.reshape(h, w)


def lookup(noise: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The tileable noise at whole-numbered positions."""
    return noise.ravel().take(((row.astype(np.int32) & 255) << 8) + (column.astype(np.int32) & 255))


def wrap(x: np.ndarray, period: float | np.ndarray) -> np.ndarray:
    """x modulo period (numpy's own operator is many times slower)."""
    return x - np.floor(x / period) * period


class Surface(NamedTuple):
    """What a pattern sees of its pixels, each float32 [pixels], in metres."""
    x: np.ndarray  # in the world
    z: np.ndarray
    along: np.ndarray  # on the face
    up: np.ndarray
    p: np.ndarray  # the face's sizes
    q: np.ndarray


Pattern = tuple[np.ndarray, np.ndarray]  # which pixels show the face's second colour; what is added to the light


def asphalt_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    lateral = f.x - s.middle - s.curve * f.z * f.z
    lane = lateral + s.half
    nearest = np.round(lane / s.lane)
    dashes = (wrap(f.z, 7) < 3.2) | (np.abs(lateral) < .5) if s.lanes == 4 else wrap(f.z, 7) < 3.2
    mark = (nearest > 0) & (nearest < s.lanes) & (np.abs(lane - nearest * s.lane) < .09) & dashes
    mark |= np.abs(np.abs(lateral) - s.half) < .07
    mark |= (f.z > f.p) & (f.z < f.p + 3) & (wrap(lane, 1.0) < .5)  # pedestrian crossing
    return mark, np.where(mark, 0, .03 * np.cos(lane * (4 * np.pi / s.lane)))


def paving_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    joint = ((wrap(f.z, 1.2) < .10) | (wrap(f.x - s.curve * f.z * f.z, 1.2) < .10)) & (f.z < 16)
    return np.zeros(f.z.shape, bool), -.16 * joint


def grass_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    return np.zeros(f.z.shape, bool), (.05 + look.texture * .8) * lookup(grain, f.z * 9, f.x * 9)


def facade_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    i, j = np.floor(f.up / f.p), np.floor(f.along / f.q)
    across, above = f.along / f.q - j, f.up / f.p - i
    shop = (i < 1) & (f.p > 3.2)
    window = (across > .25) & (across < .75) & (above > .28) & (above < .80)
    frame = (across > .20) & (across < .80) & (above > .22) & (above < .86) & ~window & ~shop
    window = np.where(shop, (across > .08) & (across < .92) & (above > .12) & (above < .78), window)
    pane = .35 * np.clip(lookup(grain, i * 37, j * 91 + f.q * 1000), -1.5, 2)
    return window, np.where(window, pane, .14 * frame - .10 * ((above < .05) & (i > 0)))


def leaves_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    return np.zeros(f.z.shape, bool), (.10 + look.texture * .8) * lookup(grain, f.up * 21, f.along * 21)


def brick_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    course = np.floor(f.up / .3)
    joint = (f.up / .3 - course < .16) | (wrap(f.along / .8 + .5 * course, 1) < .08)
    cap = (f.q > 0) & (f.up > f.q - .22)
    return np.zeros(f.z.shape, bool), .12 * cap - .14 * joint * (f.z < 14) - .12 * (wrap(f.along, 3) < .12)


def bars_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    bar = (wrap(f.along, f.p) < .15) | (f.up > f.q - .16) | ((f.up > .2) & (f.up < .34))
    return ~bar, np.zeros(f.z.shape)


def coach_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    pane = (f.up > 1.35) & (f.up < 2.5) & (wrap(f.along, f.p) > .14)
    return pane, -.25 * ((f.up > .8) & (f.up < .95))


PATTERNS = {ASPHALT: asphalt_pattern, PAVING: paving_pattern, GRASS: grass_pattern, FACADE: facade_pattern,
            LEAVES: leaves_pattern, BRICK: brick_pattern, BARS: bars_pattern, COACH: coach_pattern}


def develop(rgb: np.ndarray, rng: np.random.Generator, look: Look) -> np.ndarray:
    """The camera: exposure, colour, blur, vignette and noise; float32 [H, W, 3] to uint8."""
    h, w = rgb.shape[:2]
    rgb = np.clip(rgb * (1 + look.exposure * rng.uniform(-1, 1)), 0, 1.2) ** look.gamma
    grey = rgb.mean(2, keepdims=True)
    rgb = grey + (rgb - grey) * look.saturation
    rgb = (rgb - .5) * look.contrast + .5 + look.brightness
    rgb = rgb * np.float32(look.white) + np.float32(look.black)
    if look.blur:
        rgb = gaussian_filter(rgb, (look.blur * h / BLUR_HEIGHT,) * 2 + (0,), truncate=2.5)
    if look.vignette:
        y, x = np.linspace(-1, 1, h, dtype=np.float32)[:, None], np.linspace(-1, 1, w, dtype=np.float32)
        rgb *= (1 - look.vignette * (x * x + y * y) / 2)[..., None]
    rgb += look.noise * rng.standard_normal(rgb.shape, dtype=np.float32)
    return (np.clip(rgb, 0, 1) * 255 + .5).astype(np.uint8)
