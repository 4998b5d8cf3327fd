"""A trellis of eight states says which of two union quantizers each code of a row uses.

Marcellin and Fischer 1990; the unions as in JPEG 2000, part 2. A half-step is half the stored step. In even states a
code k stands for 2k half-steps, in odd states for 2k - sgn(k); both hold zero. The parity of k moves a feedback shift
register of three bits s0 s1 s2 whose parity check is (1 + D + D**3, D**2), Ungerboeck's code of eight states:
s0' = s0 + s1, s1' = s2 + k, s2' = s0, modulo 2. s0, the lowest bit of a state, is what makes it odd. Imports no torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STATES = 8

NEXT_STATE: NDArray[np.uint8] = np.array(
    [[(s & 1 ^ s >> 1 & 1) | (s >> 2 ^ parity) << 1 | (s & 1) << 2 for parity in (0, 1)] for s in range(STATES)],
    np.uint8,
)
"""uint8 [state, parity of the code] -> the state of the next column."""


def trellis_states(codes: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The state in which each code was chosen, uint8 [rows, columns]; every row starts in state 0.

    codes  int32 [rows, columns]
    """
    # The register over GF(2), column by column: memory runs along the columns.
    parities = np.ascontiguousarray((codes & 1).astype(np.uint8).T)
    states = np.empty_like(parities)
    state = np.zeros(codes.shape[0], np.uint8)
    following = NEXT_STATE.reshape(-1)
    for column, parity in enumerate(parities):
        states[column] = state
        state = following.take(state << 1 | parity, mode="clip")
    return states.T
