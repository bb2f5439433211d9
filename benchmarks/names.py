"""Names beside the points of a plot: near, and over nothing else where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

Array = npt.NDArray[np.float64]
Line = Sequence[tuple[float, float]]

_DISTANCES = (7, 11, 16, 24, 36, 50, 66, 84, 104)  # pixels, of a name's edge from its point
_DIRECTIONS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_MARKER = 7  # pixels, half of its size and a bit
#: What it costs to lie over something or nearer to another point, beside a pixel of distance.
_OVER_NAME, _OVER_MARKER, _OVER_LINE, _UNCLEAR = 1000.0, 200.0, 40.0, 40.0


def place_names(axis: Axes, names: Sequence[str], points: Line, lines: Sequence[Line]) -> None:
    """Writes each name where it costs least, one after the other: the same plot every time.

    Args:
        axis (Axes): with its final limits and place in the figure.
        names (Sequence[str]): what to write.
        points (Sequence[tuple[float, float]]): what they name.
        lines (Sequence[Sequence[tuple[float, float]]]): what else is drawn, as corners.
    """
    to_pixels, to_data = axis.transData.transform, axis.transData.inverted().transform
    markers = to_pixels(points)
    drawn = np.concatenate([_along(to_pixels(line)) for line in lines])
    frame, written = axis.get_window_extent().padded(-4), list[Bbox]()
    for name, point in zip(names, markers, strict=True):
        label = axis.text(0, 0, name, size=8, ha="center", va="center")
        extent = label.get_window_extent()
        half = np.array([extent.width, extent.height]) / 2
        boxes = []
        for distance, direction in product(_DISTANCES, _DIRECTIONS):
            middle = point + np.array([np.cos(direction), np.sin(direction)]) * (half + distance)
            boxes.append(Bbox([middle - half, middle + half]))
        box = min(boxes, key=lambda box: _cost(box, point, markers, drawn, written, frame))
        label.set_position(to_data((box.min + box.max) / 2))
        written.append(box.padded(2))
        leader = np.array([point, _nearest(box, point)])
        drawn = np.concatenate([drawn, _along(leader)])
        if np.hypot(*(leader[1] - point)) > _DISTANCES[1]:
            axis.plot(*to_data(leader).T, color="gray", lw=0.5, scalex=False, scaley=False)


def _cost(
    box: Bbox, point: Array, markers: Array, drawn: Array, written: Sequence[Bbox], frame: Bbox
) -> float:
    """Pixels between a name and its point, and what else speaks against the place."""
    distance = float(np.hypot(*(_nearest(box, point) - point)))
    leader = _along(np.array([point, _nearest(box, point)]))
    cost = distance + _OVER_NAME * (not (frame.contains(*box.min) and frame.contains(*box.max)))
    for other in written:
        cost += _OVER_NAME * (box.overlaps(other) or _inside(leader, other))
    for other in markers:
        around = Bbox([other - _MARKER, other + _MARKER])
        cost += _OVER_MARKER * box.overlaps(around)
        if (other != point).any():
            cost += _UNCLEAR * (np.hypot(*(_nearest(box, other) - other)) < distance + 3)
            cost += _UNCLEAR * _inside(leader[np.abs(leader - point).max(axis=1) > _MARKER], around)
    return float(cost + _OVER_LINE * _inside(drawn, box))


def _nearest(box: Bbox, point: Array) -> Array:
    return np.clip(point, box.min, box.max)


def _along(corners: Array) -> Array:
    """Points along a line, some two pixels apart."""
    pieces = [
        np.linspace(start, end, 2 + int(np.hypot(*(end - start)) / 2))
        for start, end in zip(corners[:-1], corners[1:], strict=True)
    ]
    return np.concatenate([corners, *pieces])


def _inside(points: Array, box: Bbox) -> bool:
    return bool(((points > box.min) & (points < box.max)).all(axis=1).any())
