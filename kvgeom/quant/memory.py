"""What a cache takes: codes, scales, offsets, and the tokens of the residual window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvgeom.quant.formats.base import get_format
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

#: Length of the prompt by which a token's share of the memory is counted.
TOKENS = 4096


def scheme_bytes(scheme: Scheme | None, kv_heads: int, head_dim: int, tokens: int, exact_bytes: int = 2) -> int:
    """Bytes of one site of one layer for tokens that are rounded together.

    Parameters
    ----------
    scheme : Scheme or None
    kv_heads, head_dim, tokens : int
    exact_bytes : int
        Of an element without a scheme.
    """
    if tokens == 0:
        return 0
    if scheme is None:
        return kv_heads * head_dim * tokens * exact_bytes
    blocks, row = _blocks(scheme, kv_heads, head_dim, tokens)
    scale = sum(dtype.itemsize for dtype in get_format(scheme.format).scale_dtypes(scheme) if dtype is not None)
    return _code_bytes(scheme, *row) + blocks * scale


def _code_bytes(scheme: Scheme, rows: int, length: int) -> int:
    return rows * (length if scheme.bits == 8 else -(-length // 8) * scheme.bits)


def _blocks(scheme: Scheme, heads: int, dim: int, tokens: int) -> tuple[int, tuple[int, int]]:
    """How many scales there are; and in how many rows of which length the codes lie."""
    size = scheme.group_size or 1
    match scheme.granularity:
        case "tensor" | "none":
            scales = 1
        case "token":
            scales = tokens
        case "channel":
            scales = heads * dim
        case "head":
            scales = heads
        case "token-head":
            scales = tokens * heads
        case "group":
            size = min(size, heads * dim)
            scales = tokens * -(-heads * dim // size)
            return scales, (scales, size)
        case "channel-group":
            size = min(size, tokens)
            groups = -(-tokens // size)
            return groups * heads * dim, (heads * groups * size, dim)
    return scales, (heads * tokens, dim)


def cache_bytes(
    recipe: Recipe,
    placement: Placement,
    kv_heads: int,
    head_dim: int,
    prompt: int,
    generated: int = 0,
    *,
    exact_bytes: int = 2,
) -> int:
    """Bytes of the cache of one sequence, after its prompt and then token after token.

    Scales that the prompt has set are stored once. What a model computes anyway (offsets, factors, rotations) is not
    counted. Rounding at the projection is counted as if the cache stored codes.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    kv_heads, head_dim : int
        Of the cache of one layer.
    prompt, generated : int
        Tokens of the prompt, and tokens generated after it one by one.
    exact_bytes : int
        Of an element in full precision.
    """
    sites = ((scheme, kv_heads, head_dim) for pair in recipe for scheme in pair)
    return bytes_of_sites(sites, placement, prompt, generated, exact_bytes=exact_bytes)


def bytes_of_sites(
    sites: Iterable[tuple[Scheme | None, int, int]],
    placement: Placement,
    prompt: int,
    generated: int = 0,
    *,
    exact_bytes: int = 2,
) -> int:
    """The same for keys and values of shapes that may differ.

    Parameters
    ----------
    sites : iterable of (Scheme or None, int, int)
        Scheme, KV heads and channels of a head of the keys, and of the values, of every layer.
    placement, prompt, generated, exact_bytes
        As in :func:`cache_bytes`.
    """
    return sum(
        count * _site_bytes(scheme, placement, (heads, size), (prompt, generated), exact_bytes)
        for (scheme, heads, size), count in Counter(sites).items()
    )


def _site_bytes(
    scheme: Scheme | None, placement: Placement, shape: tuple[int, int], come: tuple[int, int], exact_bytes: int
) -> int:
    prompt, generated = come
    if scheme is None:
        return scheme_bytes(None, *shape, prompt + generated, exact_bytes)
    once = scheme.spans_tokens and placement.residual == 0 and placement.scales == "prompt"
    parts, quantized, stored = list[int](), -1, 0
    for new in (prompt, *[1] * generated):
        stored += new
        start, stop = placement.next_span(quantized, stored, scheme.spans_tokens)
        if placement.flush == "all" and stop > start:
            parts = []
        quantized = stop
        parts.append(stop - start)
    exact = stored - sum(parts)
    total = scheme_bytes(None, *shape, exact, exact_bytes)
    for index, tokens in enumerate(part for part in parts if part):
        if once and index:  # later tokens of a group lie as they come
            total += _code_bytes(scheme, shape[0] * tokens, shape[1])
        else:
            total += scheme_bytes(scheme, *shape, tokens)
    return total


def bytes_per_token(
    recipe: Recipe,
    placement: Placement | None = None,
    kv_heads: int = 8,
    head_dim: int = 128,
    tokens: int = TOKENS,
    *,
    exact_bytes: int = 2,
) -> float:
    """Bytes per token of all layers together, scales, offsets and the residual window included, of a prompt of ``tokens``.

    Examples
    --------
    >>> from kvgeom.quant.scheme import Scheme
    >>> bytes_per_token(Recipe.uniform(1, Scheme.parse("q4_0")), kv_heads=1, head_dim=64)
    72.0
    """
    return cache_bytes(recipe, placement or Placement(), kv_heads, head_dim, tokens, exact_bytes=exact_bytes) / tokens


def bits_per_element(
    recipe: Recipe, placement: Placement | None = None, kv_heads: int = 8, head_dim: int = 128, tokens: int = TOKENS
) -> float:
    """Mean bits of an element of keys and values; 16 where nothing is rounded."""
    total = bytes_per_token(recipe, placement, kv_heads, head_dim, tokens)
    return 8 * total / (2 * len(recipe) * kv_heads * head_dim)
