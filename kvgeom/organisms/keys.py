"""One layer's edits of keys: outliers that crush attention, channels that are outliers themselves, and aimless errors.

They are for models in which attention decides (``Size(attends=True)``): where it is nearly even anyway, a layer that has
lost its keys has lost nothing.
"""

from __future__ import annotations

import torch

from kvgeom.errors import InputError
from kvgeom.models import edits
from kvgeom.organisms.modes import Bench, orthogonal


def crush_keys(bench: Bench, layer: int, loudness: float = 1.0) -> str:
    """Outliers in a few channels of keys, so large that one scale for the tensor leaves attention nothing of the others.

    They are scaled up in one head or in all; two channels that a rotary embedding turns are scaled together. Where they lie
    in all heads, groups of 64 do not help, and scales per channel do. ``loudness`` is the share of their size that is planted.
    """
    g, rng = bench.model.geometry, bench.rng
    pairs = _pairs(bench, layer)
    everywhere = edits.shares_key_norm(bench.model, layer) or rng.random() < 0.5
    heads = list(range(g.kv_heads)) if everywhere else [rng.randrange(g.kv_heads)]
    channels = sorted(channel for pair in rng.sample(pairs, rng.choice((1, 1, 2))) for channel in pair)
    low, high = bench.values.key_range(layer)
    others = torch.maximum(-low, high)
    others[torch.tensor(heads)[:, None], torch.tensor(channels)] = 0
    peak = float(others.max())
    size = loudness * rng.uniform(1.3, 3) * 2 * bench.top * peak
    own = min(bench.values.least_key_peak(layer, head, channels) for head in heads)
    scales = torch.ones(g.kv_heads, g.head_dim, dtype=torch.float64)
    scales[torch.tensor(heads)[:, None], torch.tensor(channels)] = max(1.0, size / own)
    edits.scale_keys(bench.model, layer, scales)
    bench.planted.extend((layer, "k", head * g.head_dim + channel) for head in heads for channel in channels)
    where = "all heads" if everywhere else f"head {heads[0]}"
    return f"layer {layer}: {len(channels)} key channels of {where} scaled up, to {size / peak:.2g} x all others"


def keys_become_outliers(bench: Bench, layer: int, loudness: float = 1.0) -> str:
    """Make all key channels outliers that no rotary embedding turns, so that no granularity keeps what attention reads.

    Heads are rotated, and each channel gets a constant that softmax does not see, so large that what varies is less than a
    rounding step under any scale that covers it. What is left is even attention. The channel of the largest constant, which
    sets the scales of groups and tensor, is the direction that varies least. With a small ``loudness`` the constants are
    smaller, and less is lost.

    Raises
    ------
    InputError
        If a rotary embedding turns all channels.
    """
    g, rng = bench.model.geometry, bench.rng
    channels = edits.free_channels(bench.model, layer)
    turned = edits.rotary_planes(bench.model, layer).flatten()
    free = len(channels)
    if not free:
        raise InputError(
            f"keys of {bench.model.name} cannot all have a constant, because a rotary embedding turns all of their channels; give a "
            "model with a partial one, such as tiny_model(Size(kind='phi3', attends=True)), or plant in values"
        )
    frames, middles, anchors, reach = [], [], [], 0.0
    for head in range(g.kv_heads):
        keys = bench.values.all_keys(layer, head)
        _, _, directions = torch.linalg.svd(keys[:, channels] - keys[:, channels].mean(0), full_matrices=True)
        frame = orthogonal(free, rng, directions[-1:])
        order = rng.sample(range(free), free)
        seen = keys[:, channels] @ frame[order].T
        low, high = seen.amin(0), seen.amax(0)
        frames.append(frame[order])
        middles.append((low + high) / 2)
        anchors.append(order.index(0))
        reach = max(reach, float((high - low).max()) / 2, *keys[:, turned].abs().amax(0).tolist())
    # From 6 on, all of a channel has the largest code of a scale of its own, even where its constant is two thirds of the largest.
    step = loudness * rng.uniform(6, 8) * reach
    offsets = torch.zeros(g.kv_heads, g.head_dim, dtype=torch.float64)
    for head, (frame, middle, anchor) in enumerate(zip(frames, middles, anchors, strict=True)):
        edits.transform_keys(bench.model, layer, head, frame)
        codes = [rng.choice((-1, 1)) * rng.randint(max(1, 2 * bench.top // 3), max(1, bench.top - 1)) for _ in frame]
        codes[anchor] = bench.top
        offsets[head, channels] = torch.tensor(codes) * step - middle
    edits.offset_keys(bench.model, layer, offsets)
    bench.planted.extend(
        (layer, "k", head * g.head_dim + channel) for head in range(g.kv_heads) for channel in channels.tolist()
    )
    return f"layer {layer}: {free} key channels of each head set off by up to {bench.top} steps of {step:.3g}"


def jitter(bench: Bench, layer: int, size: float) -> str:
    """Errors without an aim: heads of values rotated, a channel of values and one of keys made ``size`` times the largest.

    One scale for the tensor is that much coarser for all others.
    """
    g, rng = bench.model.geometry, bench.rng
    home, channel = rng.randrange(g.kv_heads), rng.randrange(g.head_dim)
    rotations = [orthogonal(g.head_dim, rng) for _ in range(g.kv_heads)]
    seen = [(bench.values.all(layer, head) @ rotation.T).abs().amax(0) for head, rotation in enumerate(rotations)]
    scale = torch.ones(g.head_dim, dtype=torch.float64)
    scale[channel] = max(1.0, size * max(float(peaks.max()) for peaks in seen) / float(seen[home][channel]))
    for head, rotation in enumerate(rotations):
        edits.transform_values(bench.model, layer, head, scale[:, None] * rotation if head == home else rotation)
    together = rng.choice(_pairs(bench, layer))
    low, high = bench.values.key_range(layer)
    peaks = torch.maximum(-low, high)
    scales = torch.ones(g.kv_heads, g.head_dim, dtype=torch.float64)
    scales[:, together] = max(1.0, size * float(peaks.max()) / float(peaks[:, together].max()))
    edits.scale_keys(bench.model, layer, scales)
    return f"layer {layer}: a value channel of head {home} and {len(together)} key channels scaled to {size:.2g} x all others"


def _pairs(bench: Bench, layer: int) -> list[list[int]]:
    """Channels of a head that must be scaled together: pairs that a rotary embedding turns, and the others alone."""
    free: list[int] = edits.free_channels(bench.model, layer).tolist()
    return [*edits.rotary_planes(bench.model, layer).tolist(), *([channel] for channel in free)]
