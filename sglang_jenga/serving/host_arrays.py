"""SGLang's tensors on the host, as arrays.

It keeps the lengths and rows of a batch twice, on the device and, under names that end in ``_cpu``,
on the host. Reading the latter waits for nobody. No other module here reads a tensor's values.
"""

from __future__ import annotations

import numpy as np
import torch


def host_array(tensor: torch.Tensor) -> np.ndarray:
    """The values of a host tensor, which share its memory. ``tensor`` is called ``*_cpu``: on the
    CPU engine a device tensor could not be told from it."""
    return tensor.numpy()
