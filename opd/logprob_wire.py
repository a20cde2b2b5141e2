"""What travels between a trainer and a log-prob server, and what is believed of it.

A question is `POST /logprobs?prompt_length=&temperature=` with the token ids of prompt and response as raw int32. An answer is
safetensors, `logprobs` and `entropy`, float32 [L], with the version of the weights in its metadata: the version is part of
the very bytes that it is about. (The header X-Weights-Version repeats it for people.) What fails is a `wire.BadAnswer`.

L response length.
"""

import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from opd.wire import ABOVE_ZERO, HEADER_BYTES, BadAnswer, checked, encode_ids

VERSION_HEADER = "X-Weights-Version"
FIELDS = ("logprobs", "entropy")


class Logprobs(NamedTuple):
    """What one version of the weights says about one response."""

    logprobs_L: Tensor  # float32, of the response's tokens, at the temperature of the question
    entropy_L: Tensor  # float32, nats, likewise
    version: int


@dataclass(frozen=True, slots=True)
class LogprobQuestion:
    """One response whose log-probabilities are wanted."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]  # [L], L >= 0
    temperature: float = 1.0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def most_bytes(self) -> int:
        """No honest answer is larger."""
        return HEADER_BYTES + 4 * len(FIELDS) * len(self.response_ids)

    @property
    def path(self) -> str:
        """Of the request."""
        asked = {"prompt_length": len(self.prompt_ids), "temperature": self.temperature}
        return "/logprobs?" + urllib.parse.urlencode(asked)

    @property
    def body(self) -> bytes:
        """Of the request."""
        return encode_ids([*self.prompt_ids, *self.response_ids])


class _Metadata(msgspec.Struct):
    version: str


class _Header(msgspec.Struct):
    metadata: _Metadata = msgspec.field(name="__metadata__")


_decode_header = msgspec.json.Decoder(_Header).decode


def encode_logprobs(arrays: dict[str, Tensor], question: LogprobQuestion, version: int) -> bytes:
    """An answer's body. Raises BadAnswer for what no model says, such as NaN."""
    return safetensors.torch.save(_checked(arrays, question), {"version": str(version)})


def decode_logprobs(body: bytes, question: LogprobQuestion) -> Logprobs:
    """The answer to `question`. Raises BadAnswer."""
    try:
        arrays = safetensors.torch.load(body)
        version = _decode_header(body[8 : 8 + int.from_bytes(body[:8], "little")]).metadata.version
    except (safetensors.SafetensorError, msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        raise BadAnswer(f"not safetensors with a version: {error}") from None
    if not (version.isascii() and version.isdigit() and len(version) < 19):
        raise BadAnswer(f"version {version[:40]!r} is no number")
    return Logprobs(**{f"{name}_L": value for name, value in _checked(arrays, question).items()}, version=int(version))


def _checked(arrays: dict[str, Tensor], question: LogprobQuestion) -> dict[str, Tensor]:
    """`arrays` themselves if they can be the answer, else BadAnswer."""
    if arrays.keys() != set(FIELDS):
        raise BadAnswer(f"fields {sorted(arrays)} instead of {sorted(FIELDS)}")
    for name, value in arrays.items():
        if tuple(value.shape) != (len(question.response_ids),) or value.dtype != torch.float32:
            shape = (len(question.response_ids),)
            raise BadAnswer(f"{name} is {value.dtype} {tuple(value.shape)} instead of torch.float32 {shape}")
    checked(arrays, question)
    if question.response_ids and float(arrays["entropy"].min()) < -ABOVE_ZERO:
        raise BadAnswer(f"an entropy of {float(arrays['entropy'].min()):.4g}")
    return arrays
