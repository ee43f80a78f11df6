"""Does PCR of a few prompts at one layer say what finer scales do to other prompts?"""

from __future__ import annotations

from kvgeom.behaviour.pcr import THRESHOLDS
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import LAYER_BITS, Study
from kvgeom.paper.table import Row, recovered, share


@paper_table(
    "PCR of one layer on one set of prompts against finer scales on the other",
    suites=["custom", "advbench"],
    passes=lambda layers: layers / 2 + 4,
)
def pcr_prediction(study: Study, protocol: Protocol) -> Measured:
    """PCR at the critical layer on the first set, and per-channel and group-64 reduction of all layers on the second, at 3 bits.

    The paper counts a model right if both PCRs are above 30 %, or both are not. The two are different quantities: one is about
    a layer, the other about all of them.
    """
    critical = study.critical(protocol)
    tensor, channel = protocol.by_tensor(LAYER_BITS), protocol.scheme(LAYER_BITS, "channel", symmetric=True)
    group = protocol.scheme(LAYER_BITS, "group", symmetric=True, size=64)
    one = study.flipped(
        {
            name: protocol.over(scheme, layers=[critical.first], family="layer")
            for name, scheme in (("tensor", tensor), ("channel", channel))
        },
        title="calibration",
    )
    every = study.flipped(
        {
            name: protocol.over(scheme)
            for name, scheme in (("tensor", tensor), ("channel", channel), ("group-64", group))
        },
        "advbench",
        "test",
    )
    rows: list[Row] = []
    for prompts, found in (("calibration, one layer", one), ("test, all layers", every)):
        at = {"prompts": prompts}
        rows += [share(at, f"flip by {name}", int(flips.sum()), len(flips)) for name, flips in found.items()]
        rows.append(recovered(at, "PCR", found["tensor"], found["channel"]))
        if "group-64" in found:
            rows.append(recovered(at, "group-64 reduction", found["tensor"], found["group-64"]))
    known, seen = (float(row.measured) for row in rows if row.quantity == "PCR")
    verdict = (
        "undefined"
        if known != known or seen != seen
        else "right"
        if (known > THRESHOLDS[0]) == (seen > THRESHOLDS[0])
        else "wrong"
    )
    rows.append(Row({"prompts": "both"}, "prediction", verdict, n=len(every["tensor"]), unit="words"))
    same = study.suites["custom"].requests == study.suites["advbench"].requests
    return Measured(rows, (critical.note, "Both sets are the same requests: nothing is foretold." if same else ""))
