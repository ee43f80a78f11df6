"""The models of arXiv:2606.09864 by name: where they are, their shape, and what was published of them."""

from __future__ import annotations

from dataclasses import dataclass

from kvgeom.errors import unknown


@dataclass(frozen=True)
class ZooModel:
    """One model of the paper.

    Attributes
    ----------
    name : str
        Its short name, as :mod:`kvgeom.paper` uses it.
    title : str
        What tables call it.
    hub_id : str
        What :func:`kvgeom.load` takes.
    layers : int
    gigabytes : int
        Memory of the weights in bfloat16, as the released code states it.
    critical_layers : tuple of int
        The layers that the released code protects where none are given, the most critical first; a default of the code and
        no published result.
    mode : str or None
        The failure mode that was published, where one was.
    held_out : bool
        Whether the paper's rules were made without it.
    """

    name: str
    title: str
    hub_id: str
    layers: int
    gigabytes: int
    critical_layers: tuple[int, ...]
    mode: str | None = None
    held_out: bool = False

    @property
    def critical_layer(self) -> int:
        """The first of :attr:`critical_layers`."""
        return self.critical_layers[0]


_AS, _CRUSHES, _DILUTION = "outlier-as-safety", "outlier-crushes-safety", "multi-layer dilution"

#: In the order of their sizes. Source: code released with the paper (its registry of models and its taxonomy).
MODELS: tuple[ZooModel, ...] = (
    ZooModel("phi35", "Phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct", 32, 8, (2, 11, 14), _DILUTION),
    ZooModel("qwen7b", "Qwen-2.5-7B", "Qwen/Qwen2.5-7B-Instruct", 28, 14, (0, 27, 1, 8), _AS),
    ZooModel("mistral7b", "Mistral-7B v0.2", "mistralai/Mistral-7B-Instruct-v0.2", 32, 14, (0,), _AS),
    ZooModel("deepseek7b", "DeepSeek-7B", "deepseek-ai/deepseek-llm-7b-chat", 30, 14, (17, 1), _CRUSHES),
    ZooModel("olmo2", "OLMo-2-7B", "allenai/OLMo-2-1124-7B-Instruct", 32, 14, (0,), held_out=True),
    ZooModel("llama8b", "Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", 32, 16, (2, 3, 0, 1, 9), _DILUTION),
    ZooModel("yi9b", "Yi-1.5-9B", "01-ai/Yi-1.5-9B-Chat", 48, 18, (16,), _CRUSHES),
    ZooModel("gemma9b", "Gemma-2-9B", "google/gemma-2-9b-it", 42, 18, (1,), _CRUSHES),
    ZooModel(
        "msmall24b", "Mistral-Small-24B", "mistralai/Mistral-Small-24B-Instruct-2501", 40, 48, (14, 1, 2), _DILUTION
    ),
    ZooModel("yi34b", "Yi-1.5-34B", "01-ai/Yi-1.5-34B-Chat", 60, 68, (0,)),
    ZooModel("mixtral", "Mixtral-8x7B", "mistralai/Mixtral-8x7B-Instruct-v0.1", 32, 90, (0,)),
    ZooModel("qwen72b", "Qwen2.5-72B", "Qwen/Qwen2.5-72B-Instruct", 80, 144, (0,)),
)


def zoo_model(name: str) -> ZooModel:
    """A model of the paper by its short name.

    Raises
    ------
    InputError
        If there is none of that name.

    Examples
    --------
    >>> zoo_model("qwen7b").hub_id
    'Qwen/Qwen2.5-7B-Instruct'
    """
    found = next((model for model in MODELS if model.name == name), None)
    if found is None:
        raise unknown("model of the paper", name, [model.name for model in MODELS])
    return found


def in_zoo(name: str) -> ZooModel | None:
    """The model of the paper that a loaded model is, by the name it was loaded under; None of any other.

    A short name, a hub id, and a folder with the name of the hub's repository are known.

    Examples
    --------
    >>> in_zoo("models/Qwen2.5-7B-Instruct").name
    'qwen7b'
    >>> in_zoo("demo") is None
    True
    """
    last = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    return next((model for model in MODELS if last in (model.name, model.hub_id.rpartition("/")[2].lower())), None)
