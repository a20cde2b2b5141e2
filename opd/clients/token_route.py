"""vLLM's own server and prompts with images: its route that takes token ids and images side by side
(`/inference/v1/generate`, vllm 0.32). `/v1/completions` takes no images.

The ids that are sent are unexpanded, as for an engine in this process. The server says what it made
of them: whoever expands images to other tokens than the student's processor is told apart at once.
"""

import base64
from typing import Any

import msgspec

from opd.clients.wire import BadAnswer, PromptLogprobs
from opd.pictures import PromptImages, token_difference

TOKEN_ROUTE = "/inference/v1/generate"
READ_ID_BYTES = 16  # of the ids that the server says it read


class _Text(msgspec.Struct):
    token_ids: list[int]
    finish_reason: str | None = None


class TokenAnswer(msgspec.Struct):
    """What the route answers, as far as it is read."""

    choices: list[_Text]
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None = None


_decode = msgspec.json.Decoder(TokenAnswer).decode


def token_request(
    model: str, ids: list[int], images: PromptImages, **sampling: Any
) -> dict[str, Any]:
    """The body of a request with the prompt's images; `ids` are expanded."""
    return {
        "model": model,
        "token_ids": images.unexpanded(ids),
        "content_parts": [
            {"type": "image_url", "url": f"data:image;base64,{base64.b64encode(shown).decode()}"}
            for shown in images.shown()
        ],
        "sampling_params": {"detokenize": False, **sampling},
        "return_token_ids": True,
    }


def read_tokens(body: bytes, ids: list[int]) -> TokenAnswer:
    """An answer whose server read `ids`, and wrote one text. Raises BadAnswer."""
    try:
        answer = _decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadAnswer(f"not an answer of {TOKEN_ROUTE}: {error}") from None
    if answer.prompt_token_ids != ids:
        raise BadAnswer(f"it makes {token_difference(answer.prompt_token_ids, ids)}")
    if len(answer.choices) != 1:
        raise BadAnswer(f"{len(answer.choices)} texts instead of 1")
    return answer
