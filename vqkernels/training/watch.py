"""Early warnings from the curves of a run: a codebook that collapses, a loss that diverges.

Called by :mod:`vqkernels.training.loop` after every point; looks at the history only, so a resumed run says the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["warnings_of"]

POINTS = 5


def warnings_of(lines: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Warnings that the newest points give rise to; each kind once per run.

    Args:
        lines: of the training curve, oldest first.
        known: warnings given before.

    Returns:
        ``kind`` ("collapse" or "divergence"), ``step`` and ``message`` of each new one. Collapse: over the last five
        points usage has never risen, is below 20 %, and below half of its most. Divergence: the reconstruction loss
        was more than three times its least at each of the last five points.

    Example:
        >>> falling = [{"step": i, "usage": 0.9 / 2**i, "reconstruction": 1.0} for i in range(8)]
        >>> warnings_of(falling)[0]["message"]
        'codebook usage has fallen from 90% to 1%: raise the dead-code ratio or lower the learning rate'
    """
    given, found = {w["kind"] for w in known}, []
    last = lines[-POINTS:]
    if len(last) < POINTS:
        return []
    usage = [float(line["usage"]) for line in last]
    most = max(float(line["usage"]) for line in lines)
    falls = all(a >= b for a, b in itertools.pairwise(usage)) and usage[0] > usage[-1]
    if "collapse" not in given and falls and usage[-1] < min(0.2, most / 2):
        found.append({"kind": "collapse", "step": last[-1]["step"], "message": (
            f"codebook usage has fallen from {most:.0%} to {usage[-1]:.0%}: "
            "raise the dead-code ratio or lower the learning rate")})  # fmt: skip
    loss = [float(line["reconstruction"]) for line in last]
    least = min(float(line["reconstruction"]) for line in lines)
    if "divergence" not in given and min(loss) > 3 * least > 0:
        found.append({"kind": "divergence", "step": last[-1]["step"], "message": (
            f"the reconstruction loss is {loss[-1] / least:.1f} times its least: lower the learning rate, "
            "clip the gradient or start the discriminator later")})  # fmt: skip
    return found
