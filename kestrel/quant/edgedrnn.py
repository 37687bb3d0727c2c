"""Memory layout of EdgeDRNN (Gao et al., JETCAS 2020): dense weights streamed from DRAM, column by column.

Per layer one matrix [bias | W_x | 0 | W_h], its columns one after the other; zero columns pad the inputs to a multiple of
the number of processing elements. The machine is set up through 32 registers: 0 address of the weights, 1 and 2
thresholds of inputs and states as codes, 3 layers, 4 padded inputs of the first layer, 5 and on units of each layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

REGISTERS = 32
BLOCK = 8  # rows of a block of stimuli
SIGMOID_REACH, TANH_REACH = 8.0, 4.0


def padded(inputs: int, pes: int) -> int:
    """Inputs of a layer, rounded up to a multiple of `pes`."""
    return -(-inputs // pes) * pes


def layer_matrix(bias: npt.ArrayLike, w_x: npt.ArrayLike, w_h: npt.ArrayLike, pes: int) -> np.ndarray:
    """[bias | W_x | 0 | W_h], int64 [G H, 1 + padded inputs + H]; stream it with `.reshape(-1, order="F")`.

    Raises ValueError where the parts do not fit together.
    """
    column, inputs, hidden = (np.asarray(part).astype(np.int64) for part in (bias, w_x, w_h))
    if column.ndim != 1 or not len(column) == len(inputs) == len(hidden):
        raise ValueError(f"rows differ: bias {column.shape}, W_x {inputs.shape}, W_h {hidden.shape}")
    zeros = np.zeros((len(column), padded(inputs.shape[1], pes) - inputs.shape[1]), np.int64)
    return np.concatenate([column[:, None], inputs, zeros, hidden], axis=1)


def split_layer(matrix: npt.ArrayLike, inputs: int, pes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bias, W_x and W_h of a layer of `inputs` inputs, the inverse of `layer_matrix`."""
    array = np.asarray(matrix)
    return array[:, 0], array[:, 1 : 1 + inputs], array[:, 1 + padded(inputs, pes) :]


def registers(address: int, thx: int, thh: int, inputs: int, hidden: Sequence[int], pes: int) -> np.ndarray:
    """The configuration, uint32 [32]. Raises ValueError for more layers than there are registers, or negative numbers."""
    values = [address, thx, thh, len(hidden), padded(inputs, pes), *hidden]
    if len(values) > REGISTERS or min(values) < 0 or max(values) >= 1 << 32:
        raise ValueError(f"{len(hidden)} layers do not fit in {REGISTERS} registers of 32 bits without sign")
    made = np.zeros(REGISTERS, np.uint32)
    made[: len(values)] = values
    return made


def stimuli(codes: npt.ArrayLike, pes: int) -> np.ndarray:
    """Input codes [T, I] in the blocks that the simulation reads: int64 [T, blocks, 8], inputs padded with zeros to a
    multiple of `pes` and of 8."""
    array = np.asarray(codes).astype(np.int64)
    width = padded(padded(array.shape[1], pes), BLOCK)
    made = np.zeros((len(array), width), np.int64)
    made[:, : array.shape[1]] = array
    return made.reshape(len(array), -1, BLOCK)


def activation_tables(qi: int, qf: int, out_qf: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of sigmoid over -8..8 and of tanh over -4..4 for every input code of Q(qi.qf), outputs of step 2^-out_qf.

    Inputs that the format cannot hold are left out; the last input of a table is the one below its reach.
    """
    tables = []
    for reach, curve in ((SIGMOID_REACH, lambda x: 1 / (1 + np.exp(-x))), (TANH_REACH, np.tanh)):
        limit = int(min(reach, 2.0 ** (qi - 1)) * 2**qf)
        x = np.arange(-limit, limit) * 2.0**-qf
        tables.append(np.rint(curve(x) * 2**out_qf).astype(np.int64))
    return tables[0], tables[1]
