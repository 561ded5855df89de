"""The shift between the imagery of two years, as `tile --check` measures it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.geo.grid import Float64Array

LARGE = 2.0
"""A shift in pixels that is worth a warning."""
LEAST_ANSWERS, LEAST_SHARE = 3, 0.1
"""Number and share of places with an answer that a shift needs: fewer may be chance."""


@dataclass(frozen=True)
class YearPair:
    """The shift of the imagery of one year against that of an earlier one, at n places.

    Attributes:
        years: the earlier and the later one.
        side: of the windows that were compared, in pixels.
        lonlat: (n, 2) longitude and latitude of the places.
        xy: (n, 2) the same in the CRS of the grid; in a "utm" grid longitude and latitude.
        east_north: (n, 2) pixels by which the later year lies east and north of the earlier one,
            along the axes of the grid; NaN where a place gave no answer.
        flat: (n,) whether there is no answer because one of the years is flat there. Elsewhere too
            little looks alike: the ground changed, or the shift is beyond reach.
        gsd: metres per pixel; None where metres mean nothing.
    """

    years: tuple[str, str]
    side: int
    lonlat: Float64Array
    xy: Float64Array
    east_north: Float64Array
    flat: NDArray[np.bool_]
    gsd: float | None

    def __len__(self) -> int:
        return len(self.flat)

    @property
    def answered(self) -> NDArray[np.bool_]:
        """(n,) whether a place gave an answer."""
        return np.isfinite(self.east_north[:, 0])

    @property
    def changed(self) -> NDArray[np.bool_]:
        """(n,) whether a place gave no answer although it is not flat."""
        return ~(self.answered | self.flat)

    def shift(self) -> tuple[float, float] | None:
        """Median and 95th percentile of the lengths in pixels; None if too few places answered."""
        answers = self.east_north[self.answered]
        if len(answers) < max(LEAST_ANSWERS, LEAST_SHARE * len(self)):
            return None
        median, high = np.quantile(np.hypot(*answers.T), [0.5, 0.95]).tolist()
        return median, high

    def as_json(self) -> dict[str, Any]:
        """Counts, the shift (null where it is unknown) and the places that gave an answer."""
        shift = self.shift()
        answers = self.east_north[self.answered].tolist()
        direction = (None, None) if shift is None else np.median(answers, axis=0).tolist()
        metres = None if shift is None or self.gsd is None else [v * self.gsd for v in shift]
        return {
            "years": [*self.years],
            "window_px": self.side,
            "places": len(self),
            "answered": len(answers),
            "flat": int(self.flat.sum()),
            "changed": int(self.changed.sum()),
            **dict(zip(("median_px", "p95_px"), shift or (None, None), strict=True)),
            **dict(zip(("median_m", "p95_m"), metres or (None, None), strict=True)),
            **dict(zip(("east_px", "north_px"), direction, strict=True)),
            "at": [
                {"lon": lon, "lat": lat, "east_px": east, "north_px": north}
                for (lon, lat), (east, north) in zip(
                    self.lonlat[self.answered].tolist(), answers, strict=True
                )
            ],
        }
