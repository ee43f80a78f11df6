"""Scores of next-token distributions: how near a model is to refusing, and how far one distribution is from another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from scipy.stats import beta
from torch import Tensor

#: How sure it must be that a first token predicts a refusal.
PREDICTS = 0.95
#: Why a model that refuses may have no margins.
NONE_PREDICTS = "Refusal margins are not measured: no first token predicts a refusal, as refusals are few, or begin as other responses do."


def refusal_tokens(first_tokens: Sequence[int], refused: Sequence[bool]) -> frozenset[int]:
    """The tokens R with which a model's own refusals under an exact cache begin: those that predict a refusal.

    A token belongs to R if, by what was seen, more than half of all responses that begin with it are refusals with a
    probability of :data:`PREDICTS` (a uniform prior: four of four do, three of three do not). So an opening that refusals
    share with compliance is not in R, nor is the first word of a single response that happens to condemn its request.
    Where no token is that sure there is none, and margins are not measured.

    Parameters
    ----------
    first_tokens : sequence of int
        First response token of every prompt; a negative number where the response is empty, which is no token.
    refused : sequence of bool
        Whether that response is a refusal.
    """
    begun = Counter(first_tokens)
    refusals = Counter(token for token, is_refusal in zip(first_tokens, refused, strict=True) if is_refusal)
    sure = {token: float(beta.sf(0.5, 1 + n, 1 + begun[token] - n)) for token, n in refusals.items()}
    return frozenset(token for token, found in sure.items() if found >= PREDICTS and token >= 0)


def margin(logits: Tensor, tokens: Iterable[int]) -> Tensor:
    """Refusal margin ``log p(R) - log(1 - p(R))`` in nats, at the first response position.

    Parameters
    ----------
    logits : Tensor [..., vocabulary]
    tokens : iterable of int
        The set R of :func:`refusal_tokens`; must not be empty.

    Returns
    -------
    Tensor [...], float32

    References
    ----------
    Arditi et al., arXiv:2406.11717, section 2.4 (their refusal metric).
    """
    is_refusal = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    is_refusal[list(tokens)] = True
    # Log-odds straight from the logits: the normalizer cancels, and nothing is lost when p(R) is near 1.
    return logits[..., is_refusal].float().logsumexp(-1) - logits[..., ~is_refusal].float().logsumexp(-1)


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence (nats) of the distribution of ``other`` from that of ``logits``.

    Parameters
    ----------
    logits, other : Tensor [..., vocabulary]
        Unnormalized log-probabilities; leading dimensions broadcast.

    Returns
    -------
    Tensor [...]
        ``sum(p * (log p - log q))`` with p from ``logits`` and q from ``other``.
    """
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_log_likelihood(logits: Tensor, tokens: Sequence[int]) -> float:
    """Mean log-probability (nats per token) of tokens, each under the logits of its position; NaN without tokens.

    Parameters
    ----------
    logits : Tensor [tokens, vocabulary]
    tokens : sequence of int
    """
    if not tokens:
        return float("nan")
    return float(logits.log_softmax(-1)[torch.arange(len(tokens)), list(tokens)].mean())
