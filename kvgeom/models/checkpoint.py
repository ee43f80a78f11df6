"""Transforms as weights: a checkpoint of a standard class, whose cache any engine can round as it comes."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kvgeom.checks import as_path
from kvgeom.errors import InputError, ModelError
from kvgeom.models import edits
from kvgeom.models.model import Model
from kvgeom.models.quiet import quiet_transformers
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import ROTATIONS, Statics, frame

#: Which checkpoint this is; only a folder that has it is written again.
MARK = "kvgeom.json"
_CHECK = "What is the capital of France?"


def fold(model: Model, recipe: Recipe, sites: Collection[Site] = ("k", "v")) -> Model:
    """A copy of a model whose weights do what the transforms of a recipe do.

    With an exact cache its logits are those of the model, and rounding its cache under :func:`plain` of the recipe is
    rounding the model's own under the recipe.

    ============= ======================================================== ============================================
    transform     keys                                                     values
    ============= ======================================================== ============================================
    ``equalize``  factors into the key projection, inverse into the        factors into the value projection, inverse
                  queries' (or into their norms)                           into the output projection
    ``hadamard``, never: a rotation of a head does not commute with        into the value projection, inverse into the
    ``rotation``, rotary embedding                                         output projection
    ``rht``
    ``center``    only in channels that no rotary embedding turns          into the value bias; a bias of the output
                  (:func:`unrotated`)                                      projection takes it back, if the class has one
    ============= ======================================================== ============================================

    Parameters
    ----------
    model : Model
        Run by plain transformers, with unquantized weights. It is left as it is.
    recipe : Recipe
        With the offsets and factors that its schemes need.
    sites : collection of {"k", "v"}
        Which sites to fold; the other keeps its transforms.

    Raises
    ------
    InputError
        If recipe and model do not fit, or a scheme rounds some channels only.
    ModelError
        If plain transformers does not run the model, a transform cannot be folded in it, or the logits would change.
    """
    edited = edits.editable(edits.copied(model, f"{model.name} (folded)"))
    if len(recipe) != model.geometry.layers:
        raise InputError(f"{model.name} has {model.geometry.layers} layers, got a recipe for {len(recipe)}")
    recipe = model.geometry.stored(recipe, model.name)
    for layer in recipe.touched:
        for site in sites:
            scheme = recipe.scheme(layer, site)
            if scheme is not None and scheme.transform != "none":
                _fold_site(edited, recipe, layer, site, scheme)
    _load_biases(edited.hf_model, model.name)
    folded = edits.rewrapped(edited, edited.hf_model)
    _check_same(model, folded)
    return folded


def foldable(recipe: Recipe) -> tuple[Site, ...]:
    """The sites whose transforms weights can do, whatever the model: not offsets or rotations of rotated keys.

    Offsets of values are among them; :func:`fold` says whether the model's class has a place for them.
    """
    found = {
        site: {s.transform for layer in range(len(recipe)) if (s := recipe.scheme(layer, site)) is not None} - {"none"}
        for site in get_args(Site)
    }
    able: dict[Site, set[str]] = {"k": {"equalize"}, "v": {"equalize", "center", *ROTATIONS}}
    return tuple(site for site, used in found.items() if used and used <= able[site])


def plain(recipe: Recipe, sites: Collection[Site] = ("k", "v")) -> Recipe:
    """What is left to do in the cache of the model that :func:`fold` returns: the same grids without transforms."""

    def bare(scheme: Scheme | None, site: Site) -> Scheme | None:
        return replace(scheme, transform="none") if scheme is not None and site in sites else scheme

    left = Recipe(tuple((bare(k, "k"), bare(v, "v")) for k, v in recipe))
    return left.with_statics(
        offsets=recipe.offsets if left.sites_with("offsets") else None,
        factors=recipe.factors if left.sites_with("factors") else None,
    )


def unrotated(model: Model, offsets: Statics) -> Statics:
    """The part of offsets that softmax cannot see, which :func:`fold` can take: zero in all rotated channels of keys."""
    vectors = {}
    for (layer, site), vector in offsets.vectors.items():
        kept = vector.clone()
        if site == "k":
            kept[:, edits.rotary_planes(model, layer).flatten()] = 0
        vectors[layer, site] = kept
    return Statics.of(f"{offsets.name}, unrotated", vectors, rotary=offsets.rotary)


def save_checkpoint(
    model: Model, directory: str | Path, transforms: Sequence[str] = (), *, dtype: torch.dtype | None = None
) -> Path:
    """Write a model with its tokenizer, as ``save_pretrained`` does, for any engine.

    Parameters
    ----------
    model : Model
        For instance what :func:`fold` returns.
    directory : str or Path
        New or empty; or a checkpoint that this function has written and nobody has added to, which is replaced.
    transforms : sequence of str
        Descriptions of what was folded, for ``kvgeom.json`` in the folder.
    dtype : torch.dtype, optional
        Of the weights in the checkpoint; the model's own by default. Fold in float32 and store in bfloat16: that rounds
        the weights once.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        If there is something else in the folder.
    ModelError
        If plain transformers does not run the model, or would not load these weights again as they are.
    """
    folder, own = as_path("the folder of the checkpoint", directory), edits.editable(model)
    _check_target(folder)
    _check_loads(own.hf_model, model.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="writing-") as scratch:
        made = Path(scratch) / "checkpoint"  # with the mode of a folder that anybody makes
        made.mkdir()
        tokenizer = copy.deepcopy(own.tokenizer)
        tokenizer.chat_template = own.template
        with quiet_transformers():
            stored = own.hf_model if dtype is None else copy.deepcopy(own.hf_model).to(dtype)
            stored.save_pretrained(made)
            tokenizer.save_pretrained(made)
        about = {
            "kvgeom": version("kvgeom"),
            "model": model.name,
            "fingerprint": model.fingerprint,
            "transforms": list(transforms),
            "files": sorted(path.name for path in made.iterdir()),
        }
        (made / MARK).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


# --- folding ---


def _fold_site(model: Model, recipe: Recipe, layer: int, site: Site, scheme: Scheme) -> None:
    if scheme.channels is not None:
        raise InputError(
            f"scheme {scheme} of layer {layer} rounds some channels only, but weights change all; give schemes without channels"
        )
    where = f"{scheme.transform} of {'keys' if site == 'k' else 'values'} in layer {layer} cannot be folded"
    statics = {None: None, "offsets": recipe.offsets, "factors": recipe.factors}[scheme.constants]
    if scheme.constants is not None and statics is None:
        raise InputError(f"{where}: the recipe has no vectors for it; give recipe.with_statics(...)")
    vector = None if statics is None else statics.vectors.get((layer, site))
    if statics is not None and vector is None:
        return
    if site == "v":
        _fold_values(model, layer, scheme, vector)
    elif scheme.transform == "equalize" and vector is not None:
        edits.scale_keys(model, layer, 1 / vector.double().cpu())
    elif scheme.transform == "center" and vector is not None:
        rotated = edits.rotary_planes(model, layer).flatten()
        if bool(vector[:, rotated].any()):
            raise ModelError(
                f"{where}: {len(rotated)} of {vector.shape[1]} channels of a head of {model.name} are rotated, where an offset changes "
                "scores by what depends on the distance of two tokens, and no weight undoes it. Run it in the cache "
                "(kvgeom.models.packed.quantized_cache), or fold unrotated(model, offsets)"
            )
        edits.offset_keys(model, layer, -vector)
    else:
        raise ModelError(
            f"{where}: a rotation of keys does not commute with rotary embedding, so that no weights do it; run it in the "
            "cache, or fold the values alone (sites=['v'])"
        )


def _fold_values(model: Model, layer: int, scheme: Scheme, vector: Tensor | None) -> None:
    g = model.geometry
    if scheme.transform == "center" and vector is not None:
        edits.offset_values(model, layer, -vector)
        return
    # Every other transform is linear: rows of `entered` are what becomes of the unit vectors of each head.
    unit = torch.eye(g.head_dim, dtype=torch.float64).expand(1, g.kv_heads, -1, -1)
    entered = frame(scheme.transform, None if vector is None else vector.cpu()[:, None], unit).enter(unit)[0]
    for head in range(g.kv_heads):
        edits.transform_values(model, layer, head, entered[head].T)


def _check_same(model: Model, folded: Model) -> None:
    """Whatever kvgeom takes the architecture for: a few logits say whether it is right."""
    ids = model.encode([_CHECK])[0].ids
    before, after = (each.forward(ids, all_logits=True) for each in (model, folded))
    apart = float((after - before).norm() / (before - before.mean()).norm())
    if not apart < (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
        raise ModelError(
            f"folding changes the logits of {model.name} by {apart:.1%} even with an exact cache: its attention is not of a kind that kvgeom can "
            "edit, or its precision is too low for these transforms (load it in float32)"
        )


# --- standard classes ---


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.state_dict().items()}


def _loaded(config: Any, name: str) -> dict[str, torch.Size]:
    """Weights of the class that ``AutoModelForCausalLM`` makes of a config, made without memory."""
    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"), quiet_transformers():
            return _shapes(auto.from_config(copy.deepcopy(config), trust_remote_code=False))
    except ValueError as error:
        raise ModelError(f"transformers has no class of its own for a checkpoint of {name}: {error}") from error


def _load_biases(model: Any, name: str) -> None:
    """Let the class load the biases that offsets have made: with ``attention_bias``, and zeros where it then wants more."""
    own = _shapes(model)
    if own.keys() <= _loaded(model.config, name).keys():
        return
    config = copy.deepcopy(model.config)
    config.attention_bias = True
    wanted = _loaded(config, name)
    if not own.keys() <= wanted.keys():
        missing = min(own.keys() - wanted.keys())
        raise ModelError(
            f"center of values cannot be folded into {name}: {type(model).__name__} has no place for {missing}, so that a "
            "checkpoint would lose it; run it in the cache (kvgeom.models.packed.quantized_cache)"
        )
    for missing in wanted.keys() - own.keys():
        module: Any = model.get_submodule(missing.removesuffix(".bias"))
        module.bias = nn.Parameter(torch.zeros_like(module.weight[:, 0]), requires_grad=module.weight.requires_grad)
    model.config.attention_bias = True


def _check_loads(model: Any, name: str) -> None:
    own, wanted = _shapes(model), _loaded(model.config, name)
    if own != wanted:
        apart = min(key for key in own.keys() | wanted.keys() if own.get(key) != wanted.get(key))
        raise ModelError(
            f"{type(model).__name__} would not load a checkpoint of {name} again as it is ({apart}); load the model with plain "
            "transformers and unquantized weights"
        )


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the checkpoint")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not there:
        return
    try:
        known = {MARK, *json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    if not there <= known:
        raise InputError(
            f"{folder} holds {min(there - known)}, which save_checkpoint has not written; give a new or empty folder"
        )
