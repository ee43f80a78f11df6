"""Do refusals flip more easily after other turns?"""

from __future__ import annotations

from kvgeom.paper.cells import in_conversation_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.prompts.conversation import conversation

BITS = (8, 6, 4, 3)
TURNS = 2


@paper_table("flips after harmless turns, and without", passes=lambda layers: 2 * (len(BITS) + 1))
def multi_turn(study: Study, protocol: Protocol) -> Measured:
    """Refusals and flips at 8, 6, 4 and 3 bits, of the same requests after two harmless questions with their answers, and alone."""
    settings = {"0": [], str(TURNS): conversation(turns=TURNS)}
    rows = in_conversation_rows(study, protocol, BITS, settings, "turns before", "custom")
    return Measured(
        rows, ("The paper's twelve conversations are not public; these turns are kvgeom's own, and harmless.",)
    )
