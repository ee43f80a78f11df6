"""Do refusals flip more easily after a long text?"""

from __future__ import annotations

from kvgeom.errors import InputError
from kvgeom.paper.cells import in_conversation_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row
from kvgeom.prompts.conversation import Message, conversation

BITS = (8, 4, 3)
#: Of the text before a request, about.
TOKENS = 1000
#: Room for what a chat template writes around messages.
_MARKS = 64


@paper_table("flips after a long harmless text, and without", passes=lambda layers: 24 * (len(BITS) + 1))
def long_context(study: Study, protocol: Protocol) -> Measured:
    """Refusals and flips at 8, 4 and 3 bits, of the same requests after about 1,000 tokens of harmless text, and alone.

    The text is shorter where the model's context is.
    """
    before = _that_fits(study)
    rows = in_conversation_rows(study, protocol, BITS, {"none": [], "harmless": before}, "text before", "custom")
    alone, after = (each.model.encode(each.suites["custom"].requests[:1])[0] for each in (study, _after(study, before)))
    rows.append(Row({"bits": 16, "text before": "harmless"}, "tokens before", len(after) - len(alone), unit="tokens"))
    return Measured(
        rows, ("What the paper puts before a request is not public; this is the text that perplexity is read on.",)
    )


def _after(study: Study, messages: list[Message]) -> Study:
    return study.after("text-before-harmless", messages)


def _that_fits(study: Study) -> list[Message]:
    """The text, cut to what the model can read beside the longest request and its answer."""
    model, (reading, *rest) = study.model, conversation(context_tokens=TOKENS)
    longest = max(map(len, model.encode(study.suites["custom"].requests)))
    around = sum(len(model.tokens(message["content"])) for message in rest) + _MARKS
    left = model.max_context - study.run.max_new_tokens - longest - around
    if left < _MARKS:
        raise InputError(
            f"long_context needs a context with room before a request, and {model.name} has {model.max_context} tokens; choose "
            "other tables, or lower max_new_tokens"
        )
    said = model.decode(model.tokens(reading["content"])[: min(TOKENS, left)])
    return [{**reading, "content": said}, *rest]
