"""Responses of a data set: as the student would have sampled them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd.inputs.chats import Chat
from opd.inputs.columns import column
from opd.inputs.templates import ChatTemplate
from opd.log import cut


@dataclass(frozen=True)
class End:
    """How an answer ends."""

    token_id: int  # what is put behind a response that has no end
    eos_ids: frozenset[int]  # what the sampler stops at


def turn_end(
    tokenizer, eos_ids: Sequence[int], template: ChatTemplate | None, chats: list[Chat]
) -> End:
    """The template's end of turn if the sampler stops there, else the tokenizer's EOS, else the
    first of `eos_ids`.
    """
    own = tokenizer.eos_token_id
    eos_ids = tuple(eos_ids) or (() if own is None else (own,))
    if not eos_ids:
        raise ValueError(
            "--student_model: the tokenizer has no EOS token to end the dataset responses with"
        )
    found = template.end_of_turn(chats[0], eos_ids) if template else None
    if found is None:
        found = own if own in eos_ids else eos_ids[0]
    return End(found, frozenset(eos_ids))


def targets_of(where: str, row: dict[str, Any], key: str, tokenizer, end: End) -> list[int]:
    """The dataset response as the student would have sampled it: its tokens, then the end of the
    turn, once.
    """
    response = column(where, row, key, "--response_key")
    if not isinstance(response, str) or not response.strip():
        raise ValueError(
            f"{where}: column `{key}` must be the text of a response, got {cut(response)}"
        )
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    ended = (
        tokenizer(response.rstrip(), add_special_tokens=False)["input_ids"]
        if response[-1].isspace()
        else ids
    )
    if not ended or ended[-1] not in end.eos_ids:
        return [*ids, end.token_id]
    while len(ended) > 1 and ended[-2] in end.eos_ids:  # nothing is sampled after the first
        ended.pop()
    return ended
