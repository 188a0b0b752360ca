"""Virtual time: how long a GPU would take for a step, by a roofline with explicit constants.

    step = max(bytes moved / bandwidth, FLOPs / peak) + fixed + per request (+ without overlap)

Bytes moved: the weights once (of a mixture of experts the experts that so many tokens are expected
to wake), the KV that attention reads (full layers every token, window layers what the window shows,
a state once, cross-attention layers their image), and what the step writes. FLOPs: two per active
parameter and token, and attention's two matrix products. A step with images that no cache has also
reads the encoder's weights and computes what the encoder, its projector and the cross-attention
layers' K and V take (`Weights.encoder_flops`). Not in it: the scan of state layers, activations,
communication between GPUs, kernels' inefficiency beyond one share of each peak. It orders
schedules; it predicts no server.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sglang_jenga.plan.spec import LayerGroup


class Hardware(NamedTuple):
    """One GPU's published peaks: bytes/s, dense 16-bit FLOP/s, bytes of memory."""

    bandwidth: float
    flops: float
    memory_bytes: float


# NVIDIA's data sheets; FLOPs without sparsity.
HARDWARE = {
    "h100": Hardware(3.35e12, 989.4e12, 80e9),  # H100 SXM5 80 GB
    "a100": Hardware(2.039e12, 312e12, 80e9),  # A100 SXM4 80 GB
    "l4": Hardware(300e9, 121e12, 24e9),
}


class Weights(NamedTuple):
    """A real model's parameters as the GPU reads them.

    `query_width` is query heads x head width: attention does 4 FLOPs per token pair and unit of it,
    in every layer. `experts` and `experts_per_token` are of one layer; 0 for a dense model.
    `encoder_bytes` are read where images are encoded, which takes `encoder_flops` per token of
    theirs; 0 for a model without an encoder.
    """

    dense_bytes: float
    active_parameters: float
    query_width: int
    expert_bytes: float = 0.0
    experts: int = 0
    experts_per_token: int = 0
    encoder_bytes: float = 0.0
    encoder_flops: float = 0.0

    @property
    def total_bytes(self) -> float:
        return self.dense_bytes + self.expert_bytes + self.encoder_bytes

    def bytes_read(self, tokens: int) -> float:
        """Expected bytes of one pass over `tokens` tokens that choose their experts evenly."""
        if not self.experts:
            return self.dense_bytes
        asleep = (1 - self.experts_per_token / self.experts) ** tokens
        return self.dense_bytes + self.expert_bytes * (1 - asleep)


class Images(NamedTuple):
    """What a step's requests see: tokens of each one's images, and how many of them are encoded in
    this step; int64, ``[requests]``."""

    lengths: np.ndarray
    new: np.ndarray


class Clock(NamedTuple):
    """The constants of a step. The shares say how much of a peak a good kernel reaches, and the
    overheads what a scheduler leaves uncovered; all five are assumptions, not measurements.
    `serial_seconds` are added where SGLang does not overlap scheduling with the forward."""

    hardware: str = "h100"
    gpus: int = 1
    """Ideal tensor parallelism: bandwidth and FLOPs times so many."""
    bandwidth_share: float = 0.8
    flops_share: float = 0.6
    fixed_seconds: float = 1e-3
    request_seconds: float = 5e-6
    serial_seconds: float = 2e-3

    def step_seconds(
        self,
        weights: Weights,
        groups: tuple[LayerGroup, ...],
        starts: np.ndarray,
        counts: np.ndarray,
        images: Images | None = None,
        *,
        overlap: bool = True,
    ) -> float:
        """Seconds of a step in which request i computes ``counts[i]`` tokens behind ``starts[i]``.

        Both are of text; `images` are what stands before it. `groups` have the real model's bytes.
        Decoding is a count of 1. A page of a shared prefix is read once per request, as SGLang's
        kernels do.
        """
        peaks = HARDWARE[self.hardware]
        seconds = max(
            bytes_moved(weights, groups, starts, counts, images)
            / (self.gpus * peaks.bandwidth * self.bandwidth_share),
            flops(weights, groups, starts, counts, images)
            / (self.gpus * peaks.flops * self.flops_share),
        )
        seconds += self.fixed_seconds + self.request_seconds * starts.size
        return seconds if overlap else seconds + self.serial_seconds


def bytes_moved(
    weights: Weights,
    groups: tuple[LayerGroup, ...],
    starts: np.ndarray,
    counts: np.ndarray,
    images: Images | None = None,
) -> float:
    tokens = int(counts.sum())
    moved = weights.bytes_read(tokens)
    if images is not None and images.new.any():
        moved += weights.encoder_bytes
    for group in groups:
        if group.kind.name == "cross":
            if images is not None:
                moved += float(group.entry_bytes) * int((images.lengths + images.new).sum())
            continue
        if group.kind.name == "state":
            moved += 2.0 * group.entry_bytes * starts.size  # read and written back
            continue
        seen = starts
        if group.window is not None:
            seen = np.minimum(starts, group.window - 1)  # of what lies before the first new token
        moved += float(group.entry_bytes) * (int((seen + counts).sum()) + tokens)
    return moved


def flops(
    weights: Weights,
    groups: tuple[LayerGroup, ...],
    starts: np.ndarray,
    counts: np.ndarray,
    images: Images | None = None,
) -> float:
    total = 2.0 * weights.active_parameters * int(counts.sum())
    if images is not None:
        total += weights.encoder_flops * int(images.new.sum())
    for group in groups:
        if group.kind.name == "state":
            continue
        if group.kind.name == "cross":
            pairs = np.zeros(1) if images is None else counts * images.lengths
        else:
            pairs = _pairs(starts + counts, group.window) - _pairs(starts, group.window)
        total += 4.0 * weights.query_width * len(group.layer_ids) * float(pairs.sum())
    return total


def _pairs(tokens: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs (query, visible key) of a causal sequence of so many tokens, as float64."""
    tokens = tokens.astype(np.float64)
    if window is None:
        return tokens * (tokens + 1) / 2
    ramp = np.minimum(tokens, window)
    return ramp * (ramp + 1) / 2 + (tokens - ramp) * window
