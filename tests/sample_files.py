"""Files of samples as ADM's evaluator reads them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def save_samples(
    path: Path, images: NDArray[np.uint8], label: NDArray[np.integer[Any]] | None = None
) -> Path:
    """Write arr_0 u8[N,H,W,C], and label i32[N] where there is any; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"arr_0": images} | ({} if label is None else {"label": label.astype(np.int32)})
    np.savez(path, allow_pickle=False, **arrays)
    return path
