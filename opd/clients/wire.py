"""What travels between a trainer and a teacher's server, and what is believed of it.

Two protocols give the same fields. A vLLM server answers in JSON: a dictionary per token, parsed
straight into arrays. Our scoring server answers in safetensors: raw arrays under a small header. A
request to it is the token ids themselves, as raw int32. Nothing is ever unpickled, and every array
is checked before it is believed: its name, type and shape against what was asked for, its ids
against the vocabulary, its numbers against what a log-probability can be. What fails is a
`BadAnswer`: the fault of the replica that sent it, never a sample that is trained on with a hole in
it.

L response length, K support size, V vocabulary, H hidden size.
"""

import math
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from opd.ops.finite import all_finite
from opd.pictures import PromptImages
from opd.types import TeacherPayload

# Rounding may lift a log-probability above 0, and the mass of a support above 1, by this much.
ABOVE_ZERO = 1e-3
CLAMPED = -9000.0  # vLLM writes -9999 where JSON cannot say minus infinity
JSON_BYTES_PER_ENTRY = 256  # one candidate of one token with its text; they take about 70
HEADER_BYTES = 1 << 16  # of safetensors, and of whatever else surrounds the numbers

HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BadAnswer(ValueError):
    """An answer that is not what was asked for. Its text says what is wrong, not who sent it."""


@dataclass(frozen=True, slots=True)
class Question:
    """One response to be scored: what is asked of a server, whatever its protocol."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]  # [L], L >= 0
    payload: TeacherPayload
    support_k: int  # K; 0 for the payloads "sampled" and "hidden"
    vocab: int  # the first V rows of the teacher's vocabulary are what all models share
    temperature: float = 1.0  # of the loss; a vLLM server knows 1 only
    hidden_size: int = 0  # H; 0 where no hidden states are asked for
    images: PromptImages | None = None  # of the prompt

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Field -> (shape, dtypes allowed) of a whole answer."""
        L, K = len(self.response_ids), self.support_k
        numbers = ((L,), (torch.float32,))
        fields = {}
        if self.payload != "hidden":
            fields = {name: numbers for name in ("sampled_logprobs", "logsumexp", "entropy")}
        if "topk" in self.payload:
            fields |= {
                "topk_ids": ((L, K), (torch.int32,)),
                "topk_logprobs": ((L, K), (torch.float32,)),
            }
        if "hidden" in self.payload:
            fields["hidden"] = ((L, self.hidden_size), HIDDEN_DTYPES)
        return fields

    @property
    def most_bytes_binary(self) -> int:
        """No honest binary answer is larger."""
        return HEADER_BYTES + sum(4 * math.prod(shape) for shape, _ in self.shapes.values())

    @property
    def most_bytes_json(self) -> int:
        """No honest JSON answer is larger."""
        return HEADER_BYTES + self.num_tokens * (self.support_k + 2) * JSON_BYTES_PER_ENTRY


# ---- Binary --------------------------------------------------------------------------------------


def encode_ids(token_ids: Sequence[int]) -> bytes:
    """Raw little-endian int32."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def encode_text(question: "Question | LogprobQuestion") -> bytes:
    """Prompt and response, and behind them the images of the prompt, as JSON, if it has any."""
    images = question.images
    ids = encode_ids([*question.prompt_ids, *question.response_ids])
    return ids if images is None else ids + msgspec.json.encode(images.to_json())


def said_ids(question: "Question | LogprobQuestion") -> dict[str, int]:
    """What the path of a request says of a body in which images follow the ids."""
    return {} if question.images is None else {"ids": question.num_tokens}


def decode_ids(body: bytes, *, vocab: int, most: int) -> list[int]:
    """The token ids of a request. ValueError for what is no id of the vocabulary, or too long."""
    if len(body) % 4 or not 4 <= len(body) <= 4 * most:
        raise ValueError(f"{len(body)} bytes are not 1 to {most} token ids of 4 bytes")
    ids = np.frombuffer(body, dtype="<i4")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(
            f"token id {ids.min() if ids.min() < 0 else ids.max()} is outside the vocabulary of "
            f"{vocab}"
        )
    return ids.tolist()


def encode_arrays(arrays: Mapping[str, Tensor]) -> bytes:
    """safetensors; int64 ids travel as int32."""
    assert sys.byteorder == "little", "safetensors are little-endian"
    return safetensors.torch.save(
        {
            k: (v.to(torch.int32) if v.dtype == torch.int64 else v).contiguous()
            for k, v in arrays.items()
        }
    )


def decode_scores(body: bytes, question: Question) -> dict[str, Tensor]:
    """The fields of `TeacherScores` from a scoring server's answer; ids become int64.

    Raises BadAnswer.
    """
    try:
        arrays = safetensors.torch.load(body)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadAnswer(f"not safetensors: {error}") from None
    expected = question.shapes
    if arrays.keys() != expected.keys():
        raise BadAnswer(f"fields {sorted(arrays)} instead of {sorted(expected)}")
    for name, (shape, dtypes) in expected.items():
        if tuple(arrays[name].shape) != shape or arrays[name].dtype not in dtypes:
            raise BadAnswer(
                f"{name} is {arrays[name].dtype} {tuple(arrays[name].shape)} instead of "
                f"{dtypes[0]} {shape}"
            )
    if "topk_ids" in arrays:
        arrays["topk_ids"] = arrays["topk_ids"].long()
    return checked_scores(arrays, question)


# ---- JSON ----------------------------------------------------------------------------------------


class _Candidate(msgspec.Struct):
    logprob: float
    rank: int | None = None


# An entry for each token of a text: candidates by id, given the tokens before it; null for the
# first.
PromptLogprobs = list[dict[int, _Candidate] | None]


class _Choice(msgspec.Struct):
    prompt_logprobs: PromptLogprobs | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


_decode_completion = msgspec.json.Decoder(_Completion).decode


def completion_request(question: Question, model: str) -> dict:
    """The body of a `/v1/completions` request that scores: the whole text is the prompt, the one
    new token is not used.
    """
    return {
        "model": model,
        "prompt": [*question.prompt_ids, *question.response_ids],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": question.support_k,
        "add_special_tokens": False,
    }


def decode_completion(body: bytes, question: Question) -> dict[str, Tensor]:
    """The fields of `TeacherScores` from a vLLM server's answer. Raises BadAnswer."""
    try:
        (choice,) = _decode_completion(body).choices
    except (
        msgspec.MsgspecError,
        ValueError,
    ) as error:  # a dictionary of logprobs with a key that is no number, too
        raise BadAnswer(f"not a completion: {error}") from None
    return scores_of(choice.prompt_logprobs, question)


def scores_of(entries: PromptLogprobs | None, question: Question) -> dict[str, Tensor]:
    """Top-k and sampled log-probabilities: the last L entries are the response's, index t about
    response token t. Raises BadAnswer.
    """
    if entries is None or len(entries) != question.num_tokens:
        found = "no" if entries is None else len(entries)
        raise BadAnswer(f"{found} prompt_logprobs for {question.num_tokens} tokens")
    L, K = len(question.response_ids), question.support_k
    sampled_L, ids_LK, logprobs_LK = (
        np.empty(L, np.float32),
        np.empty((L, K), np.int64),
        np.empty((L, K), np.float32),
    )
    for t, (token, row) in enumerate(
        zip(question.response_ids, entries[question.num_tokens - L :], strict=True)
    ):
        if row is None or token not in row:
            raise BadAnswer(f"no log-probability for response token {t}")
        sampled_L[t] = row[token].logprob
        top = sorted(
            (-entry.logprob, id_) for id_, entry in row.items() if K and (entry.rank or 0) <= K
        )[:K]
        if len(top) != K:
            raise BadAnswer(f"{len(top)} candidates for response token {t} instead of {K}")
        for k, (negative, id_) in enumerate(top):
            ids_LK[t, k], logprobs_LK[t, k] = id_, -negative
    arrays = {"sampled_logprobs": torch.from_numpy(sampled_L)}
    if question.payload == "topk":
        arrays |= {
            "topk_ids": torch.from_numpy(ids_LK),
            "topk_logprobs": torch.from_numpy(logprobs_LK),
        }
    return checked_scores(arrays, question)


# ---- Metrics -------------------------------------------------------------------------------------


def metric(body: bytes, name: str) -> float:
    """The value of a metric in Prometheus' text form, summed over its labels.

    Raises BadAnswer if there is none.

    Example: `metric(b'steps{engine="0"} 3\nsteps{engine="1"} 4', "steps")` is 7.
    """
    lines = [
        line
        for line in body.decode(errors="replace").splitlines()
        if line.startswith((f"{name} ", f"{name}{{"))
    ]
    if not lines:
        raise BadAnswer(f"its metrics have no {name}")
    try:
        return math.fsum(float(line.rpartition(" ")[2]) for line in lines)
    except ValueError:
        raise BadAnswer(f"its {name} is not a number") from None


# ---- What is believed ----------------------------------------------------------------------------


def checked_scores(arrays: dict[str, Tensor], question: Question) -> dict[str, Tensor]:
    """`arrays` themselves if they can be what a language model says.

    Raises BadAnswer for what no model says.
    """
    for name, value in arrays.items():
        if value.is_floating_point() and not all_finite(value):
            raise BadAnswer(f"{name} is not finite")
        if name.endswith("logprobs") and value.numel():
            if float(value.max()) > ABOVE_ZERO:
                raise BadAnswer(f"{name}: a log-probability of {float(value.max()):.4g}")
            if float(value.min()) <= CLAMPED:
                raise BadAnswer(f"{name}: a log-probability of minus infinity")
    if (ids := arrays.get("topk_ids")) is not None and ids.numel():
        if int(ids.min()) < 0 or int(ids.max()) >= question.vocab:
            worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise BadAnswer(
                f"topk_ids: token {worst} is outside the {question.vocab} tokens that all models "
                "share"
            )
        in_order = ids.sort(dim=-1).values
        if bool((in_order[:, 1:] == in_order[:, :-1]).any()):
            raise BadAnswer("topk_ids: a token stands twice in one row")
        logprobs = arrays["topk_logprobs"]
        if bool((logprobs[:, 1:] > logprobs[:, :-1] + ABOVE_ZERO).any()):
            raise BadAnswer("topk_logprobs are not descending")
        if float(logprobs.exp().sum(-1).max()) > 1 + 10 * ABOVE_ZERO:
            raise BadAnswer(
                f"topk_logprobs: probabilities sum to {float(logprobs.exp().sum(-1).max()):.4g}"
            )
    return arrays


# ---- Log-probabilities of a version of the student -----------------------------------------------

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
    images: PromptImages | None = None  # of the prompt

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
        return "/logprobs?" + urllib.parse.urlencode(asked | said_ids(self))

    @property
    def body(self) -> bytes:
        """Of the request."""
        return encode_text(self)


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
    except (
        safetensors.SafetensorError,
        msgspec.MsgspecError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        raise BadAnswer(f"not safetensors with a version: {error}") from None
    if not (version.isascii() and version.isdigit() and len(version) < 19):
        raise BadAnswer(f"version {version[:40]!r} is no number")
    return Logprobs(
        **{f"{name}_L": value for name, value in _checked(arrays, question).items()},
        version=int(version),
    )


def _checked(arrays: dict[str, Tensor], question: LogprobQuestion) -> dict[str, Tensor]:
    """`arrays` themselves if they can be the answer, else BadAnswer."""
    if arrays.keys() != set(FIELDS):
        raise BadAnswer(f"fields {sorted(arrays)} instead of {sorted(FIELDS)}")
    for name, value in arrays.items():
        if tuple(value.shape) != (len(question.response_ids),) or value.dtype != torch.float32:
            shape = (len(question.response_ids),)
            raise BadAnswer(
                f"{name} is {value.dtype} {tuple(value.shape)} instead of torch.float32 {shape}"
            )
    checked_scores(arrays, question)
    if question.response_ids and float(arrays["entropy"].min()) < -ABOVE_ZERO:
        raise BadAnswer(f"an entropy of {float(arrays['entropy'].min()):.4g}")
    return arrays
