"""The ratio and its parts: against closed forms, against a computation that keeps every token, and their symmetries."""

from __future__ import annotations

import os
import random
import threading
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgeom
from kvgeom.errors import InputError, KvgeomWarning
from kvgeom.geometry.activations import positions, tokens_at
from kvgeom.geometry.ratio import Contrast, Moments, null_quantities, quantities, random_bases
from kvgeom.geometry.sensitivity import Sensitivity, measure
from kvgeom.geometry.signal import Design, held_out_signal
from kvgeom.geometry.steering import steer
from kvgeom.geometry.subspace import Subspace
from kvgeom.models.hf import HFModel
from kvgeom.organisms import Size
from kvgeom.organisms import tiny_model as tiny_trained
from kvgeom.prompts.sets import PromptSet, calibration, concept_contrasts, held_out
from kvgeom.quant.placement import Placement
from kvgeom.quant.scheme import Scheme
from tests.builders.geometry import by_hand, synthetic
from tests.builders.requests import MORE_PAIRS, PAIRS
from tests.builders.tiny import KINDS, tiny_model


def contrast_of(s: dict[str, np.ndarray]) -> Contrast:
    """Every token is a prompt of its own."""
    design = Design.of(np.arange(len(s["x"])) < len(s["x"]) // 2)
    return Contrast(design, design.rows(s["x"]), design.dealt(99))


def summed(s: dict[str, np.ndarray], contrast: Contrast, parts: int = 1) -> Moments:
    moments = Moments.zero(len(s["gap"]), len(contrast.rows), len(s["null"]))
    for x, e in zip(np.array_split(s["x"], parts), np.array_split(s["e"], parts), strict=True):
        moments.add(x, e, contrast.rows, contrast.basis, s["null"])
    return moments


def all_of(s: dict[str, np.ndarray], parts: int = 1) -> dict[str, float]:
    contrast = contrast_of(s)
    moments = summed(s, contrast, parts)
    found = quantities(moments, contrast)
    return found | null_quantities(moments, contrast, found["signal_gap"])


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_definitions(seed: int) -> None:
    """Every quantity again, from all tokens at once and by its formula."""
    s = synthetic(seed, tokens=60)
    found, x, e = all_of(s, parts=7), s["x"], s["e"]
    g = x[:30] - x[30:]
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    signal = np.mean([g[i] @ g[j] for i, j in pairs]) / 4
    along = np.mean([np.mean((e @ g[i]) * (e @ g[j])) for i, j in pairs]) / (4 * signal)
    full = np.sum(e**2) / np.sum(x**2)
    u = g.mean(0) / np.linalg.norm(g.mean(0))
    assert found["ratio"] == pytest.approx(along / signal / full)
    assert found["ratio_low"] < found["ratio"] < found["ratio_high"]
    assert found["ratio_plugin"] == pytest.approx(np.mean((e @ u) ** 2) / (np.sum(g.mean(0) ** 2) / 4) / full)
    assert found["ratio_centered"] == pytest.approx(along / signal / (np.sum(e**2) / np.sum((x - x.mean(0)) ** 2)))
    assert found["nsr_safety"] == pytest.approx(along / signal)
    assert found["nsr_full"] == pytest.approx(full)
    assert found["signal"] == pytest.approx(signal)
    assert found["signal_share"] == pytest.approx(4 * signal / np.sum(g.mean(0) ** 2))
    nulls = [np.mean((e @ v[:, 0]) ** 2) / signal / full for v in s["null"]]
    assert found["null_low"] == pytest.approx(np.quantile(nulls, 0.025))
    assert found["null_high"] == pytest.approx(np.quantile(nulls, 0.975))
    assert found["signal_gap"] * found["noise_alignment"] == pytest.approx(found["ratio"])
    assert found["raw"] == found["ratio"]


def test_definitions_in_several_dimensions() -> None:
    """A subspace that is not the class difference: its noise, and its signal on requests that it was not found in."""
    s = synthetic(3, k=2, tokens=60)
    plain, basis = contrast_of(s), s["basis"]
    held_out = held_out_signal(s["x"], plain.design.harmful, lambda _: basis)
    contrast = Contrast(plain.design, plain.rows, plain.dealt, 1, basis, held_out)
    moments = summed(s, contrast)
    found = quantities(moments, contrast)
    noise, full = np.mean(((s["e"] @ basis) ** 2).sum(1)), np.sum(s["e"] ** 2) / np.sum(s["x"] ** 2)
    assert found["ratio"] == pytest.approx(noise / (held_out.value / 4) / full)
    assert found["ratio_low"] == pytest.approx(noise / (held_out.high / 4) / full)
    assert found["ratio_plugin"] == pytest.approx(
        noise / (np.sum((basis.T @ (s["x"][:30].mean(0) - s["x"][30:].mean(0))) ** 2) / 4) / full
    )
    assert found["signal_gap"] * found["noise_alignment"] == pytest.approx(found["ratio"])
    assert held_out.value == pytest.approx(np.sum((basis.T @ s["gap"]) ** 2), rel=0.3)


def test_closed_forms() -> None:
    """Isotropic noise: alignment 1, and a ratio that is known from mean, gap and spread."""
    s = synthetic(5, channels=16, tokens=40_000)
    s["e"] = np.random.default_rng(0).standard_normal(s["x"].shape)
    found = all_of(s)
    standard_error = np.sqrt(2 / len(s["e"]))
    assert found["noise_alignment"] == pytest.approx(1, abs=4 * standard_error)
    energy = np.sum(s["mean"] ** 2) + np.sum(s["gap"] ** 2) / 4 + 16 * 0.09
    expected = energy / 16 / (np.sum(s["gap"] ** 2) / 4)
    assert found["signal_gap"] == pytest.approx(expected, rel=0.01)
    assert found["ratio"] == pytest.approx(expected, rel=0.05)
    assert found["alignment_null_low"] < 1 < found["alignment_null_high"]
    assert found["null_low"] < expected < found["null_high"], "directions that get as much noise on average"


def test_noise_on_the_direction_alone() -> None:
    s = synthetic(6)
    amount = np.random.default_rng(1).standard_normal(len(s["x"]))
    s["e"] = np.outer(amount, s["basis"][:, 0])
    found = all_of(s)
    assert found["noise_alignment"] == pytest.approx(12, rel=1e-3)
    assert found["null_p"] == pytest.approx(1 / 51)
    s = synthetic(6)
    s["e"] -= s["e"] @ s["basis"] @ s["basis"].T
    assert all_of(s)["ratio_plugin"] == pytest.approx(0, abs=1e-2)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 3.0, 1e4]))
def test_rotation_and_units_change_nothing(seed: int, unit: float) -> None:
    s = synthetic(seed, tokens=150)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((12, 12)))[0]
    turned = {
        "x": unit * s["x"] @ turn.T,
        "e": unit * s["e"] @ turn.T,
        "gap": unit * turn @ s["gap"],
        "null": np.einsum("dc,sck->sdk", turn, s["null"]),
    }
    a, b = all_of(s), all_of(turned)
    for name in a:
        scale = unit**2 if name in ("signal", "signal_low", "signal_high") else 1
        assert b[name] == pytest.approx(scale * a[name], rel=1e-6, nan_ok=True), name


def test_noise_twice_as_strong_is_the_same_ratio() -> None:
    s = synthetic(8)
    a, b = all_of(s), all_of({**s, "e": 2 * s["e"]})
    for name in ("ratio", "ratio_low", "ratio_high", "ratio_plugin"):
        assert b[name] == pytest.approx(a[name])
    assert b["nsr_safety"] == pytest.approx(4 * a["nsr_safety"])


def test_random_bases_are_orthonormal_and_isotropic() -> None:
    bases = random_bases(10, 3, 500, seed=2)
    np.testing.assert_allclose(
        np.einsum("sck,scl->skl", bases, bases), np.broadcast_to(np.eye(3), (500, 3, 3)), atol=1e-12
    )
    np.testing.assert_allclose(np.einsum("sck,sdk->cd", bases, bases) / 500, 0.3 * np.eye(10), atol=0.05)


#: The others store their keys and values as one of these does.
OFTEN = ("qwen2", "gpt_neox")


@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_measured_on_a_model(kind: str) -> None:
    model, scheme = tiny_model(kind), Scheme(3, True, "tensor")
    space = kvgeom.subspace(model, MORE_PAIRS, progress=False)
    found = space.sensitivity(scheme, progress=False)
    for layer, site in product(range(3), ("k", "v", "resid")):
        direction, cell = space.directions[layer, site], found.data.sel(layer=layer, site=site)
        s = by_hand(model, layer, site, direction.position, scheme, MORE_PAIRS)
        np.testing.assert_allclose(direction.gap, s["gap"], atol=1e-5)
        u, full = s["gap"] / np.linalg.norm(s["gap"]), np.sum(s["e"] ** 2) / np.sum(s["x"] ** 2)
        plain = np.mean((s["e"] @ u) ** 2) / ((s["gap"] @ u) ** 2 / 4) / full
        assert float(cell.ratio_plugin) == pytest.approx(plain, rel=1e-2)
        g = s["pairs"]
        signal = ((g.sum(0) ** 2).sum() - (g**2).sum()) / (len(g) * (len(g) - 1)) / 4
        assert float(cell.signal) == pytest.approx(signal, rel=1e-2, abs=1e-3 * float(np.sum(s["gap"] ** 2)))
        assert (str(cell.status.values) == "ok") == bool(np.isfinite(cell.ratio))
        if np.isfinite(cell.ratio):
            along = s["e"] @ g.T
            noise = (np.mean(along.sum(1) ** 2) - np.mean((along**2).sum(1))) / (len(g) * (len(g) - 1))
            assert float(cell.ratio) == pytest.approx(noise / (4 * signal) / signal / full, rel=2e-2)
            assert float(cell.ratio) == pytest.approx(float(cell.signal_gap * cell.noise_alignment))
        channels = found.channels(site).sel(layer=layer)
        np.testing.assert_allclose(channels.magnitude, np.sqrt((s["x"] ** 2).mean(0)), rtol=1e-3)
        np.testing.assert_allclose(channels.noise, np.sqrt((s["e"] ** 2).mean(0)), rtol=1e-2, atol=1e-5)
        assert float(channels.loading.sum()) == pytest.approx(1)


def test_projected_keys_are_keys_before_rope() -> None:
    """Rounding at the projection sees other values, but their class difference is the same direction."""
    model = tiny_model("qwen2")
    cached, projected = (
        kvgeom.subspace(model, PAIRS, placement=placement, progress=False)
        for placement in (Placement.cache(), Placement.paper())
    )
    for key, direction in cached.directions.items():
        np.testing.assert_allclose(direction.gap, projected.directions[key].gap, atol=1e-5)


def test_layer_0_at_the_template_is_undefined() -> None:
    """Keys of layer 0 depend on the token alone, so at template tokens harmful and harmless are the same."""
    prompts = PromptSet("same tokens", ("ab cd", "ba dc", "cd ab"), ("dc ba", "cd ba", "ab dc"), "anagrams")
    space = kvgeom.subspace(tiny_model(), prompts, progress=False)
    found = space.sensitivity(progress=False).data
    for site in ("k", "v"):
        assert found.status.sel(layer=0, site=site) == "undefined"
        assert np.isnan(found.ratio.sel(layer=0, site=site))
        assert "coincide" in str(found.reason.sel(layer=0, site=site).values)
    assert (found.status.sel(layer=[1, 2]) != "undefined").all()


def test_chance_is_weak() -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 12)) for _ in range(24)]
    found = kvgeom.subspace(tiny_model(), PromptSet("noise", tuple(words[:12]), tuple(words[12:]), ""), progress=False)
    status = found.sensitivity(progress=False).data.status.values
    assert (status == "weak").mean() >= 0.8


def test_higher_dimensions() -> None:
    space = kvgeom.subspace(tiny_model(), PAIRS, k=3, progress=False)
    for direction in space.directions.values():
        if direction.defined:
            np.testing.assert_allclose(direction.basis.T @ direction.basis, np.eye(direction.basis.shape[1]), atol=1e-9)
    found = space.sensitivity(contrasts=(), progress=False).data.sel(layer=[1, 2])
    assert np.isfinite(found.ratio_plugin).all()


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least two of each"):
        kvgeom.subspace(tiny_model(), PromptSet("one", ("a",), ("b", "c"), ""), progress=False)
    with pytest.raises(InputError, match="k=99"):
        kvgeom.subspace(tiny_model(), PAIRS, k=99, progress=False)


def test_unknown_options_are_refused() -> None:
    for wrong, right in (("methd", "method"), ("dtpye", "dtype")):
        with pytest.raises(InputError, match=f"'{right}'"):
            kvgeom.subspace(tiny_model(), PAIRS, **{wrong: "pca"})


def test_strings_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgeom.prompts.load.SHIPPED", {"some": lambda: PAIRS})
    model = tiny_model()
    named = kvgeom.subspace(model, "some", placement="paper", progress=False)
    given = kvgeom.subspace(model, PAIRS, placement=Placement.paper(), progress=False)
    assert named.data.identical(given.data)
    assert named.meta == given.meta
    for wrong in ({"placement": "elsewhere"}, {"method": "median"}, {"position": "template-99"}, {"k": 0}):
        with pytest.raises(InputError, match=str(*wrong.values())):
            kvgeom.subspace(model, PAIRS, progress=False, **wrong)


@pytest.mark.parametrize("k", [1, 3])
def test_subspace_is_a_result(tmp_path: Path, k: int) -> None:
    space = kvgeom.subspace(tiny_model(), PAIRS, k=k, progress=False)
    frame = space.to_frame().set_index(["layer", "site"])
    for (layer, site), direction in space.directions.items():
        row = frame.loc[(layer, site)]
        assert row.position == direction.position
        assert row.separation == direction.separation.auroc
        assert row.p == min(1, direction.separation.p * len(space.tried))
        assert row.defined == direction.defined
    again = Subspace.load(space.save(tmp_path / "space.nc"))
    assert again.meta == space.meta
    assert again.data.identical(space.data)
    for key, direction in space.directions.items():
        np.testing.assert_array_equal(again.directions[key].basis, direction.basis)
        np.testing.assert_array_equal(again.directions[key].gap, direction.gap)
        assert again.directions[key].separation == direction.separation
    assert (again.k, again.method, again.tried) == (k, "mean", space.tried)
    assert "Subspace" in again._repr_html_()
    assert len(again.plot().data) == len(space.plot().data) > 0
    for asked in (again.sensitivity, again.compare, again.select, again.refit, lambda: again.harmful):
        with pytest.raises(InputError, match="no activations"):
            asked()
    with pytest.raises(InputError, match="burn it"):
        space.refit(prompts=PromptSet("other", ("burn it", "somebody else"), PAIRS.harmless, ""))


def test_saved_and_read_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = kvgeom.subspace(tiny_model(), PAIRS, progress=False).sensitivity(progress=False)
    again = Sensitivity.load(found.save(tmp_path / "s.nc"))
    assert again.data.identical(found.data)
    assert again.meta == found.meta
    assert "ratio" in found.to_frame()
    assert "Sensitivity" in repr(found)
    assert "<table" in found._repr_html_()


def test_positions_are_shared_by_all_prompts() -> None:
    model = tiny_model()
    prompts = model.encode(list(chain(PAIRS.harmful, PAIRS.harmless)))
    names = positions(prompts)
    assert names[0] == "instruction"
    for name in names[1:]:
        assert len({prompt.ids[tokens_at(prompt, name)] for prompt in prompts}) == 1
    last = prompts[0].ids[tokens_at(prompts[0], "template-1")]
    assert last == prompts[0].ids[-1:]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read as Linux says it")
def test_memory_does_not_grow_with_the_number_of_prompts() -> None:
    """What is recorded grows by fifty megabytes; what is held in memory, files aside, by less than a tenth of that."""
    model = tiny_model("qwen2", layers=8)
    rng = random.Random(0)

    def requests(count: int) -> tuple[str, ...]:
        return tuple(f"{' '.join(rng.choices(['burn', 'a', 'car', 'wash'], k=100))} {n}" for n in range(count))

    grew, recorded = [], []
    for count in (8, 8, 32):  # the first fills what is kept anyway
        prompts = PromptSet("many", requests(count), requests(count), "")
        with PeakMemory() as peak:
            space = kvgeom.subspace(model, prompts, progress=False)
            measure(space, Scheme(3, True, "tensor"), contrasts=(), progress=False)
        grew.append(peak.grew)
        recorded.append(os.fstat(space.activations._file.fileno()).st_size)
    assert recorded[2] - recorded[1] > 40e6
    assert grew[2] - grew[1] < 5e6


class PeakMemory:
    """How many bytes the anonymous memory of this process grows by at most."""

    def __enter__(self) -> PeakMemory:
        self._first = self._most = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.grew = self._most - self._first

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, self._now())

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.slow
def test_demo_separates_harmful_from_harmless(demo: HFModel) -> None:
    """More than any of 19 sets does in which chance says which request of a pair is the harmful one: p = 0.05."""
    space = kvgeom.subspace(demo, calibration(), position="best", progress=False)
    dealt = [space.refit(prompts=dealt_anew(calibration(), seed), position="best") for seed in range(19)]
    for site in ("k", "v", "resid"):
        assert late_auroc(space, site) > max(late_auroc(chance, site) for chance in dealt), site
    assert (space.data.separation.sel(layer=range(12, 24), site=["v", "resid"]) > 0.8).all()
    found = space.refit().sensitivity(contrasts=(), progress=False).data
    assert (found.sel(layer=range(12, 24)).status == "ok").all()
    assert float(found.ratio.sel(site="k").median()) > 1


def dealt_anew(prompts: PromptSet, seed: int) -> PromptSet:
    """The same pairs; a coin says which of the two is called harmful."""
    coins = np.random.default_rng(seed).random(len(prompts.harmful)) < 0.5
    pairs = [
        (good, bad) if coin else (bad, good)
        for bad, good, coin in zip(prompts.harmful, prompts.harmless, coins, strict=True)
    ]
    return PromptSet(prompts.name, tuple(bad for bad, _ in pairs), tuple(good for _, good in pairs), "dealt anew")


def late_auroc(space: Subspace, site: str) -> float:
    return float(np.mean([space.directions[layer, site].separation.auroc for layer in range(12, 24)]))


@pytest.mark.slow
def test_demo_direction_takes_and_brings_refusal(demo: HFModel) -> None:
    """The chosen direction on prompts that had no part in it, by generation: the intervals do not touch."""
    space = kvgeom.subspace(demo, calibration(), progress=False)
    found = space.select(validation=3, positions=[space.positions[2]], progress=False)
    assert found.chosen is not None
    unseen = held_out()
    steered = steer(
        demo,
        found.direction,
        found.layer,
        demo.encode(unseen.harmful),
        demo.encode(unseen.harmless),
        max_new_tokens=16,
        progress=False,
    )
    (_, _, before), (_, _, after) = steered.refusals("none", True), steered.refusals("ablate", True)
    assert after[1] < before[0]
    (_, _, before), (_, _, after) = steered.refusals("none", False), steered.refusals("add", False)
    assert after[0] > before[1]


def test_a_tokenizer_that_cannot_tell_the_contrasts_apart_has_a_ratio_without_them() -> None:
    """Of the default ones; contrasts that somebody gives are refused."""
    size = Size(3)
    space = kvgeom.subspace(tiny_trained(size), size.prompts().take(8), progress=False)
    with pytest.warns(KvgeomWarning, match=r"contrasts \(null b\) are not measured: .* as the same"):
        found = space.sensitivity(progress=False)
    assert found.data.sizes.get("contrast", 0) == 0
    assert "is not decided" in found.conclusion
    with pytest.raises(InputError, match="as the same"):
        space.sensitivity(contrasts=concept_contrasts(), progress=False)
