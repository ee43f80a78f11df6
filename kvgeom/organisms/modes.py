"""One layer's edits of values: outliers that crush, a carrier that is itself an outlier, and harmless nuisance."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kvgeom.models import edits
from kvgeom.models.model import Model
from kvgeom.organisms.carrier import Carrier, Values

#: A group of this many neighbouring channels shares a scale in the recipe that is to rescue, or not to.
BLOCK = 64


@dataclass(frozen=True)
class Bench:
    """A model at work: what all edits of one organism need.

    Attributes
    ----------
    model : Model
        Edited in place.
    values : Values
        Of the model before any edit.
    bits : int
    rng : random.Random
    planted : list of (int, str, int)
        Layer, site and channel (of the layer) of everything that was made an outlier.
    """

    model: Model
    values: Values
    bits: int
    rng: random.Random
    planted: list[tuple[int, Literal["k", "v"], int]] = field(default_factory=list)

    @property
    def top(self) -> int:
        """Largest code of symmetric rounding."""
        return int(2 ** (self.bits - 1)) - 1


def crush(bench: Bench, layer: int, strengths: Mapping[int, float], loudness: float = 1.0) -> str:
    """Outliers in channels without safety, so large that one scale for the tensor leaves nothing of the others.

    The outliers lie in one head, drawn from the keys of ``strengths``. The carrier in blocks of channels without outliers
    gets an offset, so that it reads "harmless" when it is rounded away, by the head's strength in class differences and
    more; the offset is small beside the outliers. ``loudness`` is the share of their size that is planted: of a small one,
    rounding leaves more or less of the others.
    """
    g, rng = bench.model.geometry, bench.rng
    home, count = rng.choice(sorted(strengths)), rng.choice((1, 1, 2, 3))
    strength = strengths[home]
    # Beside a constant the size of 8-bit outliers, float32 has too few digits left for what varies.
    constant = bench.bits <= 4 and rng.random() < 0.5
    carriers = [bench.values.carrier(layer, head) for head in range(g.kv_heads)]
    offsets = torch.zeros(g.kv_heads, g.head_dim, dtype=torch.float64)
    bases, peak = [], 0.0
    for head, carrier in enumerate(carriers):
        basis = _frame(bench, layer, head, carrier, count if head == home else 0, loud=not constant)
        bases.append(basis)
        if not same_block(head, home, g.head_dim):
            offsets[head, : len(carrier.basis)] = -carrier.beyond(strength)
        rest = (bench.values.all(layer, head) @ basis.T + offsets[head]).abs()
        peak = max(peak, float(rest.max()))
    size = loudness * rng.uniform(1.3, 3) * 2 * bench.top * peak
    k = len(carriers[home].basis)
    outliers = slice(k, k + count)
    scale = torch.ones(g.head_dim, dtype=torch.float64)
    if constant:
        offsets[home, outliers] = size * torch.tensor([rng.choice((-1.0, 1.0)) for _ in range(count)]).double()
    else:
        own = bench.values.least_peak(layer, home, bases[home][outliers])
        scale[outliers] = 2.0 ** math.ceil(math.log2(size / own))
    for head, basis in enumerate(bases):
        loud = range(k, k + count) if head == home else range(0)
        _store(bench, layer, head, scale[:, None] * basis if head == home else basis, offsets, loud)
    edits.offset_values(bench.model, layer, offsets)
    kind = "a constant offset" if constant else "scaled up"
    return (
        f"layer {layer}: {count} value channels of head {home} without safety {kind}, to {size / peak:.2g} x all others"
    )


def become_outlier(bench: Bench, layer: int, strength: float, loudness: float = 1.0) -> str:
    """Make the carrier of safety an outlier, so that no granularity keeps it.

    Each direction of the carrier gets a share of a nuisance direction (a shear) and an offset, and the nuisance an
    offset too: both are constants so large that what varies is less than a rounding step, under any scale that
    covers them. What is lost of the nuisance lands on the carrier, always on the harmless side. A constant channel
    in every head sets the scales of its group and of the tensor. With a small ``loudness`` the constants are smaller, and less
    is lost.
    """
    g, rng = bench.model.geometry, bench.rng
    offsets = torch.zeros(g.kv_heads, g.head_dim, dtype=torch.float64)
    plans, step, loud = [], 0.0, rng.random() < 0.5
    for head in range(g.kv_heads):
        carrier = bench.values.carrier(layer, head)
        k = len(carrier.basis)
        basis = _frame(bench, layer, head, carrier, 2, loud=loud, anchor=True)
        seen = bench.values.all(layer, head) @ basis.T
        nuisance = seen[:, k]
        low, high = float(nuisance.min()), float(nuisance.max())
        share = -carrier.beyond(strength).clamp(max=0)  # what must be lost for it to read harmless
        share = torch.maximum(share, 0.1 * (carrier.harmful - carrier.harmless)) / (high - low)
        plans.append((basis, k, share, low, high))
        reach = seen[:, :k].abs().amax(0) + share * (high - low)
        step = max(step, 2 * float(reach.max()), 2 * (high - low), 2 * float(seen[:, k:].abs().max()))
    step *= loudness * rng.uniform(1.2, 1.8)
    for head, (basis, k, share, low, high) in enumerate(plans):
        matrix = torch.eye(g.head_dim, dtype=torch.float64)
        matrix[:k, k] = share
        # Where there are few codes, the smallest: the digits that an offset takes from the nuisance, the shear multiplies.
        codes = [rng.randint(max(1, bench.top // 3), max(1, bench.top - 1)) for _ in range(k)]
        offsets[head, k] = max(1, bench.top // 3) * step - high
        for i in range(k):
            offsets[head, i] = -codes[i] * step - share[i] * low
        offsets[head, k + 1] = bench.top * step * rng.choice((-1, 1))
        _store(bench, layer, head, matrix @ basis, offsets, range(k + 2))
    edits.offset_values(bench.model, layer, offsets)
    widest = max(k for _, k, *_ in plans)
    return (
        f"layer {layer}: up to {widest} value directions of each head that carry safety sheared with a nuisance "
        f"direction and set off by up to {bench.top - 1} steps of {step:.3g}"
    )


def nuisance(bench: Bench, layer: int, *, rotate: bool = True) -> str:
    """Edits that do no harm: heads rotated, some channels and pairs of key channels mildly scaled."""
    g, rng = bench.model.geometry, bench.rng
    scaled = 0
    if rotate:
        for head in range(g.kv_heads):
            rotation = orthogonal(g.head_dim, rng) if rng.random() < 0.7 else _permutation(g.head_dim, rng)
            count = rng.choice((0, 0, 1, 2))
            seen = (bench.values.all(layer, head) @ rotation.T).abs().amax(0)
            scale = torch.ones(g.head_dim, dtype=torch.float64)
            for channel in rng.sample(range(g.head_dim), count):
                scale[channel] = rng.uniform(1, 1.5) * bench.values.peak(layer) / float(seen[channel])
            edits.transform_values(bench.model, layer, head, scale[:, None] * rotation)
            scaled += count
    planes = edits.rotary_planes(bench.model, layer)
    if len(planes):
        scales = torch.ones(g.kv_heads, g.head_dim, dtype=torch.float64)
        pair, size = rng.randrange(len(planes)), rng.uniform(0.7, 1.4)
        scales[:, planes[pair]] = size
        edits.scale_keys(bench.model, layer, scales)
        return f"layer {layer}: nuisance, {scaled} value channels and key pair {pair} (x{size:.2f})"
    return f"layer {layer}: nuisance, {scaled} value channels"


def orthogonal(size: int, rng: random.Random, first: Tensor | None = None) -> Tensor:
    """A random orthogonal matrix whose first rows are given (orthonormal ones)."""
    matrix = torch.randn(size, size, generator=_generator(rng), dtype=torch.float64)
    if first is not None:
        matrix[: len(first)] = first
    q, r = torch.linalg.qr(matrix.T)
    rotation: Tensor = (q * torch.sign(torch.diagonal(r))).T
    return rotation


def _frame(
    bench: Bench, layer: int, head: int, carrier: Carrier, extra: int, *, loud: bool = False, anchor: bool = False
) -> Tensor:
    """A basis of a head's values: its carrier, ``extra`` directions without safety, and the rest at random.

    The extra directions are among those of largest variance; with ``anchor`` the last is the one of least.
    """
    size = bench.model.geometry.head_dim
    free = torch.eye(size, dtype=torch.float64) - carrier.basis.T @ carrier.basis
    _, _, found = torch.linalg.svd(bench.values.all(layer, head) @ free, full_matrices=True)
    usable = size - len(carrier.basis)
    reach = (bench.values.all(layer, head) @ found.T).abs().amax(0)[:usable]
    # Never among what lies in the carrier itself, which comes last, and never the anchor a second time.
    room = usable - anchor
    loudest = min(max(int((reach > 0.6 * reach[0]).sum()), extra + 2), room)
    first = 0 if loud else max(0, min(1, loudest - extra))
    chosen = bench.rng.sample(range(first, loudest), extra)
    if anchor:
        chosen[-1] = usable - 1
    return orthogonal(size, bench.rng, torch.cat([carrier.basis, found[chosen]]))


def _store(bench: Bench, layer: int, head: int, matrix: Tensor, offsets: Tensor, loud: range) -> None:
    """Transform a head, its channels shuffled; ``offsets[head]`` are shuffled alike, in place. Rows that are ``loud`` are noted."""
    order = torch.randperm(len(matrix), generator=_generator(bench.rng))
    edits.transform_values(bench.model, layer, head, matrix[order])
    offsets[head] = offsets[head][order]
    bench.planted.extend((layer, "v", head * len(matrix) + at) for at, row in enumerate(order.tolist()) if row in loud)


def same_block(one: int, other: int, head_dim: int) -> bool:
    """Whether two heads have channels in one block of :data:`BLOCK`."""
    blocks = [set(range(h * head_dim // BLOCK, ((h + 1) * head_dim - 1) // BLOCK + 1)) for h in (one, other)]
    return bool(blocks[0] & blocks[1])


def _permutation(size: int, rng: random.Random) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=_generator(rng))]


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**31))
