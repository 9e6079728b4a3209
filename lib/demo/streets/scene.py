"""One street view: the camera, and planar faces painted far to near into one image of face numbers."""
import math
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from lib.demo.streets.look import SKY, Colour, Look

FLAT, ASPHALT, PAVING, GRASS, FACADE, LEAVES, BRICK, BARS, COACH, HEAVENS = range(10)  # materials
PLANE, LABEL, MATERIAL, SUN, COLOUR, SECOND, AXIS, SIZES = 0, 3, 4, 5, 6, 9, 12, 15  # first columns of a face record
WHEEL = [(math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)]
NEAR, FAR = 1.0, 140.0  # metres: clipping plane and the end of the street
SUPERSAMPLING = 2  # four samples vote on a pixel's label

Point = tuple[float, float, float]  # X right of the camera, Y above the ground, Z ahead; metres


class Scene:
    """One street view: camera, image of face numbers, mask of cast shadows, and one record per face."""

    def __init__(self, rng: Random, look: Look, width: int, height: int):
        self.width, self.height = width * SUPERSAMPLING, height * SUPERSAMPLING
        self.eye = rng.uniform(*look.eye)  # metres above the road
        self.focal = rng.uniform(*look.focal) * self.width
        self.u0 = self.width * rng.uniform(.40, .60)  # vanishing point of the straight road
        self.v0 = self.height * rng.uniform(*look.horizon)
        self.curve = rng.uniform(-.0016, .0016)  # the road's middle is at X = middle + curve Z^2
        self.lanes, self.lane = rng.choice((2, 2, 2, 3, 4)), rng.uniform(2.8, 3.4)
        self.half = self.lanes * self.lane / 2  # of the road without its parking strips
        self.middle = -self.half * rng.uniform(.15, .6)
        azimuth, elevation = rng.uniform(0, 2 * math.pi), rng.uniform(.45, 1.1)
        level = math.cos(elevation)
        self.sun = (level * math.sin(azimuth), math.sin(elevation), level * math.cos(azimuth))  # unit vector towards it
        self.ids = Image.new("I", (self.width, self.height), 0)
        self.draw = ImageDraw.Draw(self.ids)
        self.shade = Image.new("L", (self.width, self.height), 0)
        self.draw_shade = ImageDraw.Draw(self.shade)
        self.faces = [(0, 0, 1 / 400, SKY, HEAVENS, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0)]

    def at(self, lateral: float, z: float) -> float:
        """X of the point `lateral` metres right of the road's middle at distance z."""
        return self.middle + lateral + self.curve * z * z

    def project(self, points: Sequence[Point]) -> list[tuple[float, float]]:
        """Pixel positions of a polygon, cut at the near plane."""
        if min(p[2] for p in points) < NEAR:
            kept = []
            for a, b in zip(points, [*points[1:], points[0]], strict=True):
                if a[2] >= NEAR:
                    kept.append(a)
                if (a[2] >= NEAR) != (b[2] >= NEAR):
                    t = (NEAR - a[2]) / (b[2] - a[2])
                    kept.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), NEAR))
            points = kept
        return [(self.u0 + self.focal * x / z, self.v0 - self.focal * (y - self.eye) / z) for x, y, z in points]

    def face(self, points: Sequence[Point], label: int, colour: Colour, material: int = FLAT,
             second: Colour = (0, 0, 0), p: float = 0, q: float = 0) -> None:
        """Paints a planar polygon; `second`, p and q are the material's other colour and its two sizes in metres."""
        (x0, y0, z0), (x1, y1, z1), (x2, y2, z2) = points[:3]
        ax, ay, az, bx, by, bz = x1 - x0, y1 - y0, z1 - z0, x2 - x0, y2 - y0, z2 - z0
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        d = nx * x0 + ny * (y0 - self.eye) + nz * z0
        size = math.sqrt(nx * nx + ny * ny + nz * nz)
        pixels = self.project(points)
        if abs(d) < 1e-6 * size or len(pixels) < 3:
            return  # seen edge-on, or behind the camera
        # On a plane n.P = d, 1/z is linear in the pixel position: the face needs three numbers for exact depth.
        a, b = nx / (self.focal * d), -ny / (self.focal * d)
        c = nz / d - a * self.u0 - b * self.v0
        sun = max(0.0, (nx * self.sun[0] + ny * self.sun[1] + nz * self.sun[2]) / (size if d < 0 else -size))
        along = math.hypot(nx, nz)
        tx, tz = (nz / along, -nx / along) if along > 1e-3 * size else (1.0, 0.0)
        self.faces.append((a, b, c, label, material, sun, *colour, *second, tx, tz, x0 * tx + z0 * tz, p, q))
        self.draw.polygon(pixels, fill=len(self.faces) - 1)

    def disc(self, x: float, y: float, z: float, rx: float, ry: float, label: int, colour: Colour,
             material: int = FLAT) -> None:
        """Paints an upright ellipse that faces the camera."""
        (left, top), (right, bottom) = self.project([(x - rx, y + ry, z), (x + rx, y - ry, z)])
        sun = .5 + .5 * self.sun[1] * (1 if material == LEAVES else 0)
        self.faces.append((0, 0, 1 / z, label, material, sun, *colour, 0, 0, 0, 1, 0, x, rx, 0))
        self.draw.ellipse((left, top, right, bottom), fill=len(self.faces) - 1)

    def upright(self, x0: float, x1: float, y0: float, y1: float, z: float, label: int, colour: Colour, *more) -> None:
        """Paints an upright rectangle that faces the camera."""
        self.face([(x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)], label, colour, *more)

    def cast(self, points: Sequence[Point]) -> None:
        """Darkens the ground where the sun's rays through a polygon meet it."""
        k = [y / self.sun[1] for _, y, _ in points]
        flat = [(x - self.sun[0] * t, 0.0, z - self.sun[2] * t) for (x, _, z), t in zip(points, k, strict=True)]
        pixels = self.project(flat)
        if len(pixels) > 2:
            self.draw_shade.polygon(pixels, fill=255)
