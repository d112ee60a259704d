"""Typed stub of the compiled core; ``stubtest`` holds the two together."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

# --- memory

# --- reads

# --- names, json, header

# --- weight_map

# --- subtensors

# --- assignment and shapes
