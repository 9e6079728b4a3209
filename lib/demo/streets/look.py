"""What separates the two domains: a game on a summer's day, and a car's camera on an autumn evening.

Each class has other colours, often those of another class in the other domain: leaves are as warm as the game's
facades, the sky as warm as its walls. Mean and deviation of each colour channel over a domain agree.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN = 7, 8, 11, 12, 13, 17, 19, 20
VEGETATION, TERRAIN, SKY, PERSON, CAR, BUS, VOID = 21, 22, 23, 24, 26, 28, 0
CLASSES = {ROAD: (128, 64, 128), SIDEWALK: (244, 35, 232), BUILDING: (70, 70, 70), WALL: (102, 102, 156),
           FENCE: (190, 153, 153), POLE: (153, 153, 153), LIGHT: (250, 170, 30), SIGN: (220, 220, 0),
           VEGETATION: (107, 142, 35), TERRAIN: (152, 251, 152), SKY: (70, 130, 180), PERSON: (220, 20, 60),
           CAR: (0, 0, 142), BUS: (0, 60, 100)}

Colour = tuple[float, float, float]  # red, green, blue in 0..1


@dataclass(frozen=True)
class Look:
    """Everything that separates the domains; strengths are fractions of the full range unless they say otherwise."""
    # surfaces
    asphalt: Sequence[Colour]
    paving: Sequence[Colour]
    facades: Sequence[Colour]
    windows: Sequence[Colour]
    walls: Sequence[Colour]
    fences: Sequence[Colour]
    leaves: Sequence[Colour]
    grass: Sequence[Colour]
    poles: Sequence[Colour]
    cars: Sequence[Colour]
    clothes: Sequence[Colour]
    sky: tuple[Colour, Colour]  # zenith, horizon
    clouds: float
    texture: float  # multi-octave noise on every surface
    dirt: float  # large stains and repairs
    # light and camera
    eye: tuple[float, float]  # from and to, as the next two: metres above the road
    horizon: tuple[float, float]  # from the top, in heights of the picture
    focal: tuple[float, float]  # in widths of the picture
    illumination: Colour
    ambient: float  # the share of light that does not come from the sun
    shadow: float  # how much light a cast shadow takes away
    haze: float  # per metre
    haze_colour: Colour
    gamma: float
    contrast: float
    saturation: float
    brightness: float
    exposure: float  # spread of brightness from picture to picture
    vignette: float
    blur: float  # pixels at the height BLUR_HEIGHT
    noise: float
    white: Colour  # gain of each channel; TARGET's and its `black` give it the mean and deviation of SOURCE
    black: Colour  # what is added to each channel
    # shares of what stands in the street
    traffic: float  # mean number of moving cars
    parked: float  # how likely a kerb is full of parked cars
    people: float  # mean number of people
    buses: float  # mean number of buses
    trees: float  # how likely a side has a row of trees
    frontage: tuple[float, float, float, float, float]  # weights of building, wall, fence, hedge, open ground
    bonnet: float  # how likely the camera car's bonnet shows (void)


BLUR_HEIGHT = 96
SOURCE = Look(
    asphalt=[(.36, .36, .40), (.31, .31, .36), (.40, .40, .43)],
    paving=[(.72, .68, .60), (.66, .64, .60), (.76, .70, .62)],
    facades=[(.86, .75, .50), (.84, .66, .40), (.90, .86, .70), (.80, .66, .44), (.74, .64, .46), (.88, .76, .58)],
    windows=[(.22, .34, .50), (.16, .26, .42), (.30, .44, .58)],
    walls=[(.74, .68, .60), (.66, .50, .42)], fences=[(.52, .38, .26), (.40, .44, .50)],
    leaves=[(.20, .46, .12), (.28, .50, .14), (.16, .40, .12)], grass=[(.48, .62, .24), (.56, .60, .28)],
    poles=[(.34, .36, .38), (.26, .28, .30)],
    cars=[(.80, .12, .10), (.14, .26, .66), (.92, .92, .92), (.12, .12, .14), (.86, .66, .12), (.16, .46, .30)],
    clothes=[(.80, .22, .20), (.20, .36, .72), (.88, .84, .78), (.24, .52, .34), (.82, .62, .20)],
    sky=((.30, .54, .90), (.70, .84, .97)), clouds=.35, texture=.05, dirt=.03,
    eye=(1.8, 2.6), horizon=(.36, .46), focal=(.74, .90),
    illumination=(1.06, 1.0, .92), ambient=.52, shadow=.0, haze=.001, haze_colour=(.74, .84, .95),
    gamma=1.0, contrast=1.0, saturation=1.1, brightness=.0, exposure=.05, vignette=.0, blur=.0, noise=.004,
    white=(1, 1, 1), black=(0, 0, 0),
    traffic=1.6, parked=.33, people=6.0, buses=.7, trees=.45, frontage=(.36, .23, .24, .10, .07), bonnet=.0)
TARGET = Look(
    asphalt=[(.55, .53, .51), (.51, .49, .47), (.60, .57, .55)],
    paving=[(.68, .46, .42), (.62, .42, .39), (.73, .51, .46)],
    facades=[(.74, .52, .62), (.64, .46, .56), (.82, .64, .72), (.68, .56, .64), (.60, .46, .58), (.78, .64, .74)],
    windows=[(.24, .34, .34), (.18, .26, .26), (.32, .42, .40)],
    walls=[(.62, .50, .58), (.54, .42, .50)], fences=[(.70, .66, .58), (.30, .26, .22)],
    leaves=[(.66, .32, .09), (.72, .40, .10), (.56, .24, .09)], grass=[(.64, .46, .32), (.58, .42, .32)],
    poles=[(.58, .56, .54), (.50, .48, .46)],
    cars=[(.12, .12, .13), (.56, .57, .59), (.78, .78, .78), (.30, .31, .34), (.20, .26, .42), (.52, .13, .12)],
    clothes=[(.14, .15, .19), (.22, .25, .36), (.46, .40, .35), (.54, .17, .16), (.60, .60, .60)],
    sky=((.90, .64, .42), (.95, .80, .56)), clouds=.45, texture=.10, dirt=.06,
    eye=(1.4, 2.0), horizon=(.40, .50), focal=(.84, 1.0),
    illumination=(1.0, 1.0, 1.0), ambient=.60, shadow=.30, haze=.002, haze_colour=(.92, .82, .70),
    gamma=1.0, contrast=1.0, saturation=1.0, brightness=.0, exposure=.08, vignette=.15, blur=.35, noise=.010,
    white=(.957, 1.066, 1.317), black=(-.077, -.028, -.117),
    traffic=2.2, parked=.45, people=7.0, buses=.7, trees=.55, frontage=(.42, .18, .23, .10, .07), bonnet=.0)


def tone(rng: Random, colours: Sequence[Colour], spread: float = .12) -> Colour:
    """One of the colours, a little lighter or darker."""
    gain = 1 + rng.uniform(-spread, spread)
    return tuple(c * gain for c in rng.choice(colours))


def scale(colour: Colour, gain: float) -> Colour:
    return tuple(c * gain for c in colour)
