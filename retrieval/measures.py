"""What the similarities of views with texts say of a result. Imports nothing heavy.

Source: R-precision with CLIP, Park et al., "Benchmark for compositional text-to-image synthesis" (NeurIPS 2021).
"""

from __future__ import annotations

import numpy as np

METRICS = {
    "clip_r": "CLIP R-prec",
    "clip_r_object": "of the object",
    "clip_similarity": "similarity",
    "clip_spread": "spread",
    "clip_lowest": "lowest view",
    "clip_highest": "highest view",
}


def measures(similarity: np.ndarray, own: int, elevations: np.ndarray) -> dict[str, float]:
    """Return what the similarities (n, m) of n views with m texts say, with the text at `own` asked for.

    clip_r is the share of views to which no other text is more similar, and clip_r_object is 1 where this holds for the
    mean over views. clip_similarity is that mean, a cosine. clip_spread is the standard deviation over the azimuth: of
    the views of each of the `elevations` (n,), then the root mean square.
    """
    mine, mean = similarity[:, own], similarity.mean(axis=0)
    rings = [mine[elevations == v] for v in np.unique(elevations)]
    return {
        "clip_r": float(np.mean(mine >= similarity.max(axis=1))),
        "clip_r_object": float(mean[own] >= mean.max()),
        "clip_similarity": float(mean[own]),
        "clip_spread": float(np.sqrt(np.mean([ring.var() for ring in rings]))),
        "clip_lowest": float(mine.min()),
        "clip_highest": float(mine.max()),
    }
