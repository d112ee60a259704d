"""Compiled kernels: the hot loops, and what must not hold the GIL.

Leaves all: they take buffers and numbers and know nothing of asyncio, files' names or the plan. Every index is
checked once, in the thin ``def`` at the edge; the ``nogil`` bodies run unchecked. ``_core.pyi`` is their typed stub,
and each has a plain-Python reference in the tests.
"""

from asyncshard.errors import FormatError

include "_kernels/memory.pxi"
include "_kernels/reads.pxi"
include "_kernels/runs.pxi"
include "_kernels/names.pxi"
include "_kernels/kinds.pxi"
include "_kernels/json.pxi"
include "_kernels/header.pxi"
include "_kernels/take.pxi"
include "_kernels/weight_map.pxi"
include "_kernels/subtensors.pxi"
include "_kernels/assignment.pxi"
