"""The checks and the data are those of tests/gpu_free."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu_free"))
