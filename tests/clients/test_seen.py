"""Images on their way to a server: what arrives is what was sent, and nothing else is believed."""

import base64

import msgspec
import pytest

from opd.clients.seen import MOST_IMAGES, decode_images, decode_text
from opd.clients.wire import LogprobQuestion, Question, encode_ids, encode_text, said_ids
from opd.pictures import PromptImages
from tests.support import vision

VOCAB, MOST = 40, 64
PROMPT, RESPONSE = [5, 9, 9, 9, 6], [7, 8]
IMAGES = PromptImages((vision.picture(1), vision.picture(2)), "text", (5, 9, 6), len(PROMPT))


def decode(body, num_ids):
    return decode_text(body, num_ids, len(PROMPT), vocab=VOCAB, most=MOST)


@pytest.mark.parametrize("images", [None, IMAGES])
@pytest.mark.parametrize("kind", ["score", "logprobs"])
def test_what_is_sent_arrives(kind, images):
    if kind == "score":
        question = Question(PROMPT, RESPONSE, "topk", 4, VOCAB, images=images)
    else:
        question = LogprobQuestion(PROMPT, RESPONSE, images=images)
    num_ids = said_ids(question).get("ids")
    assert decode(encode_text(question), num_ids) == (PROMPT + RESPONSE, images)


def said(**changes) -> bytes:
    content = {**IMAGES.to_json(), **changes}
    return msgspec.json.encode({k: v for k, v in content.items() if v is not None})


PNG = base64.b64encode(vision.picture(1).source).decode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "images: "),
        (b"\xff\xfe", "images: "),
        (b"[" * 5000, "images: "),
        (said(pictures=[]), "images: 0; must be 1 to"),
        (said(pictures=[PNG] * (MOST_IMAGES + 1)), f"must be 1 to {MOST_IMAGES}"),
        (said(pictures=["%%"]), "images: not base64"),
        (said(pictures=["aGk="]), "cannot be read"),
        (said(pictures=[PNG[:400]]), "cannot be read|not base64"),
        (said(pictures=["file:///etc/passwd"]), "not base64"),
        (said(num_tokens=4), "num_tokens is 4"),
        (said(num_tokens=None), "images: "),
        (said(unexpanded_ids=[]), "num_tokens"),
        (said(unexpanded_ids=[40]), "outside the vocabulary of 40"),
        (said(unexpanded_ids=[-1]), "outside the vocabulary of 40"),
        (said(unexpanded_ids=[5] * 6), "more unexpanded ids than tokens"),
        (said(text=3), "images: "),
        (said(path="/etc/passwd"), "images: "),
    ],
)
def test_what_is_no_prompt_with_images_is_refused(body, reason):
    with pytest.raises(ValueError, match=reason):
        decode_images(body, len(PROMPT), vocab=VOCAB)


@pytest.mark.parametrize("num_ids", [0, -1, MOST + 1, 1 << 62, 3, 9])
def test_a_number_of_ids_that_is_none(num_ids):
    body = encode_ids(PROMPT + RESPONSE) + said()
    with pytest.raises(ValueError):
        decode(body, num_ids)


def test_ids_alone_are_as_before():
    assert decode(encode_ids(PROMPT + RESPONSE), None) == (PROMPT + RESPONSE, None)
    with pytest.raises(ValueError, match="are not 1 to"):
        decode(encode_ids(PROMPT) + b"{}}", None)
