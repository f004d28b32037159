"""Draws the merge tree of the timesteps and the drift of every layer, with PIL."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..quant_core.calibration import Calibration
from ..quant_core.grouping import Grouping, step_shift
from ..quant_core.schemes import Shift

WIDTH, MARGIN, TREE, ROW, LABEL = 1000, 16, 260, 10, 230
INK, PAPER, FAINT = (40, 42, 54), (252, 252, 250), (190, 190, 190)
COLOURS = ((38, 98, 158), (214, 110, 40), (60, 140, 80), (170, 60, 110), (110, 90, 180), (140, 120, 40), (70, 150, 160))


def draw_grouping(calibration: Calibration, grouping: Grouping) -> torch.Tensor:
    """-> IMAGE [1, H, W, 3] in 0..1: dendrogram over sigma above, drift heat map (one row per layer) below."""
    names = list(calibration.layers)
    steps = len(calibration.sigmas)
    height = TREE + 3 * MARGIN + 30 + ROW * len(names) + 24
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image)
    left, right = LABEL, WIDTH - MARGIN
    pitch = (right - left) / steps
    centre = [left + (t + 0.5) * pitch for t in range(steps)]
    title = f"{len(grouping.groups)} timestep groups of {steps}, {grouping.linkage.value} linkage"
    draw.text((MARGIN, MARGIN), title, fill=INK)
    _tree(draw, grouping, centre, top=MARGIN + 20, bottom=TREE)
    _sigmas(draw, calibration.sigmas, centre, TREE + 6)
    top, font = TREE + 30, small_font()
    for row, name in enumerate(names):
        y = top + row * ROW
        draw.text((MARGIN, y - 1), name[-38:], fill=INK, font=font)
        for t, value in enumerate(_drift(calibration, name)):
            draw.rectangle((left + t * pitch, y, left + (t + 1) * pitch, y + ROW - 2), fill=_heat(value))
    _edges(draw, calibration, grouping, left, pitch, top, top + ROW * len(names))
    legend = "noisy  ->  clean; colour: distance of the mean input from its average"
    draw.text((left, top + ROW * len(names) + 6), legend, fill=INK)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def small_font():
    """PIL's built-in font at 8 pixels; older PIL has one size only."""
    try:
        return ImageFont.load_default(size=8)
    except TypeError:
        return ImageFont.load_default()


def _tree(draw, grouping: Grouping, centre: list[float], top: float, bottom: float) -> None:
    """Dendrogram; heights on a square-root scale, merges inside a group in the group's colour."""
    highest = max((merge.height for merge in grouping.tree.merges), default=0.0) ** 0.5 or 1.0
    level = {(t, t + 1): bottom for t in range(len(centre))}
    place = {(t, t + 1): centre[t] for t in range(len(centre))}
    inside = grouping.tree.timesteps - len(grouping.groups)
    starts = np.cumsum([0, *grouping.tree.sizes(len(grouping.groups))])
    for i, merge in enumerate(grouping.tree.merges):
        a, b = (merge.start, merge.middle), (merge.middle, merge.end)
        # centroid linkage can invert: a merge is never drawn below its parts
        y = min(bottom - (bottom - top) * merge.height**0.5 / highest, level[a], level[b])
        group = int(np.searchsorted(starts, merge.start, side="right")) - 1
        ink = COLOURS[group % len(COLOURS)] if i < inside else FAINT
        draw.line([(place[a], level[a]), (place[a], y), (place[b], y), (place[b], level[b])], fill=ink, width=2)
        whole = (merge.start, merge.end)
        level[whole], place[whole] = y, (place[a] + place[b]) / 2


def _sigmas(draw, sigmas: tuple[float, ...], centre: list[float], y: float) -> None:
    """Every few sigmas, written under the leaves."""
    every = max(1, len(sigmas) // 14)
    for t in range(0, len(sigmas), every):
        draw.text((centre[t] - 10, y), f"{sigmas[t]:.2f}", fill=INK)


def _drift(calibration: Calibration, name: str) -> np.ndarray:
    """Distance of each timestep's mean input from the average over timesteps, 0..1 within the layer."""
    z = step_shift(calibration.layers[name], Shift.MEAN)
    distance = np.linalg.norm(z - z.mean(axis=0), axis=1)
    return distance / (distance.max() or 1.0)


def _heat(value: float) -> tuple[int, int, int]:
    """0 pale, 1 dark blue."""
    low, high = np.array((238, 240, 245)), np.array((24, 54, 110))
    red, green, blue = (low + (high - low) * float(value)).astype(int)
    return int(red), int(green), int(blue)


def _edges(
    draw, calibration: Calibration, grouping: Grouping, left: float, pitch: float, top: float, bottom: float
) -> None:
    """Group borders over the heat map."""
    indices = [grouping.groups.index(sigma) for sigma in calibration.sigmas]
    for t in range(1, len(indices)):
        if indices[t] != indices[t - 1]:
            x = left + t * pitch - 1
            draw.line([(x, top - 4), (x, bottom + 2)], fill=(200, 40, 40), width=2)
