"""Names for types that many rooms use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
"""Offsets, lengths, sizes, ranks or indexes: signed, of 64 bits, as the compiled core takes them."""
