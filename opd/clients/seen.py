"""Images on their way to a server: behind the token ids of a request, as JSON.

Encoded images travel and never a URL or a path: a server reads nothing that a request names.
"""

import base64
import binascii

import msgspec

from opd.clients.wire import decode_ids
from opd.pictures import Picture, PromptImages

MOST_IMAGE_BYTES = 64 << 20  # of the images of one request
MOST_IMAGES = 64


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    pictures: list[str]  # base64
    text: str
    unexpanded_ids: list[int]
    num_tokens: int


def decode_text(
    body: bytes, num_ids: int | None, prompt_length: int, *, vocab: int, most: int
) -> tuple[list[int], PromptImages | None]:
    """(token ids, images of the prompt) of a request; `num_ids` says that images follow the ids.

    ValueError for what can be neither.
    """
    if num_ids is None:
        return decode_ids(body, vocab=vocab, most=most), None
    if not 1 <= num_ids <= most:
        raise ValueError(f"ids={num_ids}: must be 1 to {most}")
    ids = decode_ids(body[: 4 * num_ids], vocab=vocab, most=most)
    return ids, decode_images(body[4 * num_ids :], prompt_length, vocab=vocab)


def decode_images(body: bytes, prompt_length: int, *, vocab: int) -> PromptImages:
    """The images of a prompt. ValueError for what no client sends, and for no images."""
    try:
        said = msgspec.json.decode(body, type=_Said)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"images: {error}") from None
    if not 1 <= len(said.pictures) <= MOST_IMAGES:
        raise ValueError(f"images: {len(said.pictures)}; must be 1 to {MOST_IMAGES}")
    if said.num_tokens != prompt_length or not said.unexpanded_ids:
        raise ValueError(f"images: num_tokens is {said.num_tokens}, not the prompt's length")
    if not all(0 <= token < vocab for token in said.unexpanded_ids):
        raise ValueError(f"images: an unexpanded id outside the vocabulary of {vocab}")
    if len(said.unexpanded_ids) > prompt_length:
        raise ValueError("images: more unexpanded ids than tokens of the prompt")
    try:
        pictures = [Picture.of(base64.b64decode(p, validate=True)) for p in said.pictures]
    except binascii.Error as error:
        raise ValueError(f"images: not base64: {error}") from None
    for picture in pictures:
        picture.check()
    return PromptImages(tuple(pictures), said.text, tuple(said.unexpanded_ids), said.num_tokens)
