"""Where in a model, and when, keys and values are quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from kvgeom.checks import one_of, whole
from kvgeom.errors import InputError

#: No sequence has more tokens than a window or sinks can hold.
MOST_TOKENS = 2**31


@dataclass(frozen=True)
class Placement:
    """Where in the model, and over which tokens, rounding happens.

    Attributes
    ----------
    where : {"cache", "projection"}
        ``cache``: as stored, keys after RoPE. ``projection``: the output of ``k_proj``/``v_proj``, keys before RoPE.
    scales : {"prompt", "call"}
        For granularities that share scales over tokens. ``prompt``: the prompt sets them, and every later token is
        rounded (and saturates) with them, as in a cache that must store each token at once. ``call``: each forward call
        sets its own, so that under a scale per channel a single decoded token has no error at all.
    prefill_reads : {"rounded", "exact", "last"}
        Whether the prompt's own attention reads what is stored, or the values before rounding (as engines
        do that quantize after prefill). ``last``: all but the last prompt token read exactly, because the engine feeds
        that one as its first decode step (MLX-LM). Only where rounding happens in the cache.
    residual : int
        Size of the residual window: how many recent tokens stay in full precision before they are rounded. With 0, each
        token is rounded at once and read rounded. Otherwise a new token is always read exactly and rounded later. Tokens
        that are rounded together set their own scales; a scheme whose scales span tokens rounds ``residual`` of them at a
        time.
    flush : {"oldest", "all"}
        What happens when the residual window is full. ``oldest``: its oldest tokens are rounded (KIVI). ``all``: the whole
        prompt is rounded after its forward pass; later, whenever the window is full, the whole sequence is rounded again,
        tokens that were rounded before included (the quantized caches of transformers).
    sinks : int
        How many first tokens of a sequence stay in full precision for good.
    batch : int
        How many prompts are run together, padded on the left to the longest, and share scales that span tokens, padding
        included; 4 in the code released with arXiv:2606.09864. Only at the projection, with scales of the call. Which prompts
        fall into one batch then decides what each answers. What runs a sequence at a time (perplexity, geometry) rounds it
        alone.
    alone : {"scheme", "token"}
        Under a scheme whose scales span tokens, where each call sets its own: whether a token that comes alone is rounded as
        the scheme says, so that a channel of it has a scale of its own, or with one scale for the token.

    Raises
    ------
    InputError
        For a value that is none of these, or values that do not go together.

    Notes
    -----
    The default is what a quantized cache stores. :meth:`paper` is the simulation in the code released with
    arXiv:2606.09864 for one sequence at a time, and :meth:`released` the same in its batches, whose prompts share scales.
    """

    where: Literal["cache", "projection"] = "cache"
    scales: Literal["prompt", "call"] = "prompt"
    prefill_reads: Literal["rounded", "exact", "last"] = "rounded"
    residual: int = 0
    flush: Literal["oldest", "all"] = "oldest"
    sinks: int = 0
    batch: int = 1
    alone: Literal["scheme", "token"] = "scheme"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value: Any = getattr(self, name)
            if kind is int:
                object.__setattr__(self, name, whole(name, value, 0, MOST_TOKENS))
            else:
                one_of(f"{name} of a placement", value, get_args(kind))
        if self.flush == "all" and self.residual == 0:
            raise InputError("flush='all' needs a residual window, got residual=0; give 1 or more")
        if self.batch < 1:
            raise InputError(f"batch of a placement must be a whole number, 1 or more, got {self.batch}")
        if (self.where, self.scales) != ("projection", "call") and (self.batch > 1 or self.alone != "scheme"):
            raise InputError(
                f"batch={self.batch} and alone={self.alone!r} go with where='projection' and scales='call' alone, got "
                f"{self.where!r} and {self.scales!r}; use Placement.released()"
            )
        if self.windowed and self.where == "projection":
            raise InputError(
                f"where='projection' keeps no tokens, got residual={self.residual} and sinks={self.sinks}; use where='cache'"
            )

    @classmethod
    def cache(cls) -> Placement:
        """Decode-faithful: rounded as stored, with the scales that a streaming cache has."""
        return cls()

    @classmethod
    def paper(cls) -> Placement:
        """The paper's simulation: projection outputs, fresh scales in every forward call."""
        return cls(where="projection", scales="call")

    @classmethod
    def released(cls, batch: int = 4) -> Placement:
        """The paper's simulation as its code runs it: batches of 4 prompts share scales, padding included."""
        return cls(where="projection", scales="call", batch=batch)

    @classmethod
    def parse(cls, given: Placement | str) -> Placement:
        """``"cache"`` and ``"paper"`` by name; a placement is returned as it is.

        Raises
        ------
        InputError
            If it is neither.

        Examples
        --------
        >>> Placement.parse("paper").where
        'projection'
        """
        if isinstance(given, cls):
            return given
        one_of("placement", given, ("cache", "paper"))
        return cls.paper() if given == "paper" else cls.cache()

    @property
    def windowed(self) -> bool:
        """Whether some tokens are stored in full precision, for a while or for good."""
        return self.residual > 0 or self.sinks > 0

    @property
    def one_pass(self) -> bool:
        """Whether one teacher-forced pass over prompt and response reads what the step-by-step cache reads.

        Not so where a token is read exactly first and rounded later: then go step by step.
        """
        return self.residual == 0 and self.prefill_reads == "rounded"

    @property
    def allows_speculation(self) -> bool:
        """Whether a response can be checked token by token in passes over prompt and response, and cut off anywhere.

        False with a residual window or sinks, where the last prompt token is run on its own, or prompts share scales.
        """
        return not self.windowed and self.prefill_reads != "last" and self.batch == 1

    def next_span(self, quantized: int, stored: int, whole_blocks: bool) -> tuple[int, int]:
        """Which tokens are quantized next.

        Parameters
        ----------
        quantized : int
            Tokens before the end of the last span, sinks included; -1 before the first call.
        stored : int
            Tokens in the cache.
        whole_blocks : bool
            Whether the scheme's scales span tokens.

        Returns
        -------
        start, stop : int
            The tokens ``start:stop``, of which there may be none.
        """
        first = min(self.sinks, stored)
        begin = max(quantized, first)
        if self.residual == 0:
            return begin, stored
        if self.flush == "all":
            return (first, stored) if quantized < 0 or stored - begin >= self.residual else (begin, begin)
        stop = first + (stored - first) // self.residual * self.residual if whole_blocks else stored - self.residual
        return begin, max(begin, stop)

    def rounds(self, prompt: int, stored: int, whole_blocks: bool) -> bool:
        """Whether anything that is read has been rounded, in a sequence of ``prompt`` tokens that grows to ``stored``.

        With a residual window, a short sequence is never rounded at all.

        Parameters
        ----------
        prompt, stored : int
            Tokens that come at once, and tokens when the last one has come.
        whole_blocks : bool
            Whether the scheme's scales span tokens.
        """
        quantized = -1
        for length in range(prompt, stored + 1):
            before, (_, quantized) = quantized, self.next_span(quantized, length, whole_blocks)
            # What comes is read before it is rounded where it waits, and in the prompt where that is read exactly.
            exactly = self.residual > 0 or (self.prefill_reads == "exact" and length == prompt)
            if (before if exactly else quantized) > self.sinks:
                return True
        return False

    def __str__(self) -> str:
        parts = [f"{self.where}, scales of the {self.scales}"]
        if self.prefill_reads != "rounded":
            parts.append("prefill reads exact" + (", its last token rounded" if self.prefill_reads == "last" else ""))
        if self.residual:
            parts.append(
                f"residual window of {self.residual} tokens"
                + ("" if self.flush == "oldest" else ", flushed with all tokens")
            )
        if self.sinks:
            parts.append(f"{self.sinks} sinks")
        if self.batch > 1:
            parts.append(f"shared by batches of {self.batch} padded on the left")
        if self.alone == "token":
            parts.append("of a token where it comes alone")
        return ", ".join(parts)
