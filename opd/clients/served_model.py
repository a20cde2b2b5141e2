"""A teacher behind URLs: what its servers say of themselves, and whether that fits the run.

Asked once, at start.

Two protocols look alike here: `json` is a vLLM server's `/v1/completions` with `prompt_logprobs`
(prompts with images: its route for tokens), `binary` is our own scoring server. Which one it is,
the server says at `/version`. Every replica is asked, and all must give the same answers: model,
context length, tokenizer, and the log-probabilities of a few fixed tokens, the canary. The canary
is also the probe of the pool: a replica that comes back with another model does not come back into
the rotation.
"""

import functools
import json
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opd.clients.health import Limits
from opd.clients.pool import ReplicaPool
from opd.clients.protocols import SCORING, is_loopback
from opd.clients.token_route import READ_ID_BYTES, TOKEN_ROUTE, read_tokens, token_request
from opd.clients.transport import Call, Rejected
from opd.clients.wire import (
    BadAnswer,
    Question,
    completion_request,
    decode_completion,
    decode_scores,
    encode_text,
    metric,
    said_ids,
    scores_of,
)
from opd.inputs.content import content_hash

TeacherProtocol = Literal["json", "binary"]

# Tokens that every vocabulary has, in an order that no model expects: two models will hardly agree
# on all of them.
CANARY = Question(
    prompt_ids=[7, 2, 9, 4],
    response_ids=[3, 8, 2, 6, 9, 5],
    payload="sampled",
    support_k=0,
    vocab=10,
)
CANARY_TOLERANCE = 0.2  # nats, of the mean difference: in bfloat16 logits of 16 are .125 apart
TOKENS_AT_ONCE = 32  # that one question names; no server's context is shorter
PROBE_TEXT = "Tokens: 12 + 34 = 46, naïve café\n\tdef f(x):\n        return x ** 2  # 你好"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What all replicas of a teacher agree on."""

    protocol: TeacherProtocol
    name: str  # what requests call it
    context: int  # tokens
    tokens: tuple[int, ...] | None  # of PROBE_TEXT; None if the server has no tokenizer
    canary: tuple[float, ...]  # log-probabilities of its response
    content: str | None = (
        None  # the content hash of its files, where the server tells, or is on this machine
    )
    vocab_size: int | None = None
    hidden_size: int = 0
    max_support_k: int | None = None
    eos_ids: tuple[int, ...] | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    sees: bool = False  # it is given images

    @property
    def identity(self) -> str:
        """For the fingerprint of a run: the content where it is known, else the name."""
        return self.content or f"served:{self.name}"


def score_call(
    model: ServedModel | str, protocol: TeacherProtocol, question: Question, request_id: str = ""
) -> Call:
    """The request that scores one response; its `read` gives the fields of `TeacherScores`."""
    name = model if isinstance(model, str) else model.name
    if protocol == "json" and question.images is not None:
        return _token_call(name, question, request_id)
    if protocol == "json":
        return Call(
            "/v1/completions",
            json.dumps(completion_request(question, name)).encode(),
            request_id=request_id,
            most_bytes=question.most_bytes_json,
            read=functools.partial(decode_completion, question=question),
            tokens=question.num_tokens,
        )
    asked = {
        "prompt_length": len(question.prompt_ids),
        "payload": question.payload,
        "support_k": question.support_k,
        "temperature": question.temperature,
        "vocab": question.vocab,
    }
    return Call(
        "/score?" + urllib.parse.urlencode(asked | said_ids(question)),
        encode_text(question),
        content_type="application/octet-stream",
        request_id=request_id,
        most_bytes=question.most_bytes_binary,
        read=functools.partial(decode_scores, question=question),
        tokens=question.num_tokens,
    )


def _token_call(name: str, question: Question, request_id: str) -> Call:
    ids = [*question.prompt_ids, *question.response_ids]
    body = token_request(
        name, ids, question.images, max_tokens=1, temperature=0, prompt_logprobs=question.support_k
    )
    return Call(
        TOKEN_ROUTE,
        json.dumps(body).encode(),
        request_id=request_id,
        most_bytes=question.most_bytes_json + READ_ID_BYTES * len(ids),
        read=lambda answer: scores_of(read_tokens(answer, ids).prompt_logprobs, question),
        tokens=question.num_tokens,
    )


def probe_call(model: ServedModel) -> Call:
    """One token, scored: the engine has to compute it, and with the weights that it had
    at start.
    """
    call = score_call(model, model.protocol, CANARY)

    def read(body: bytes) -> tuple[float, ...]:
        canary = _canary_of(call.read(body))
        if not _gap(canary, model.canary) <= CANARY_TOLERANCE:
            raise BadAnswer(
                f"another model: its canary is {_gap(canary, model.canary):.3f} nats off what it "
                "was at start"
            )
        return canary

    return Call(
        call.path, call.body, content_type=call.content_type, most_bytes=call.most_bytes, read=read
    )


def _canary_of(answer: dict) -> tuple[float, ...]:
    return tuple(answer["sampled_logprobs"].tolist())


def _gap(canary: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Mean difference, nats."""
    return sum(abs(a - b) for a, b in zip(canary, other, strict=True)) / len(canary)


def progress_call(model: ServedModel) -> Call:
    """The engine's own count of steps, from its metrics: it grows while a full server answers
    nothing.
    """
    names = {"json": "vllm:iteration_tokens_total_count", "binary": "opd_batches_total"}

    return Call(
        "/metrics", read=functools.partial(metric, name=names[model.protocol]), most_bytes=1 << 22
    )


def open_pool(
    name: str, urls: Sequence[str], model: ServedModel, limits: Limits, api_key: str | None
) -> ReplicaPool:
    """The pool that scores, of replicas that `inspect_replicas` has found to be alike."""
    return ReplicaPool(
        name,
        urls,
        probe=probe_call(model),
        progress=progress_call(model),
        limits=limits,
        api_key=api_key,
    )


# ---- At start ------------------------------------------------------------------------------------


def inspect_replicas(
    flag: str, urls: Sequence[str], model: str, api_key: str | None, timeout_s: float = 60.0
) -> ServedModel:
    """Asks every replica what it is.

    ValueError with one line, beginning with `flag`, for whatever does not fit.

    `model` is the name to use where a server has several; empty or a local directory where it has
    one.
    """
    with _asked_directly(flag, urls, api_key) as pool:
        ask = functools.partial(_ask_every, flag, pool, timeout_s=timeout_s, has_key=bool(api_key))
        protocol_of = {
            url: "binary" if version.get("protocol") == SCORING else "json"
            for url, version in ask(_json_call("/version"), "cannot be reached").items()
        }
        protocol = _one_answer(flag, "protocol", protocol_of)
        listed_by = ask(_json_call("/v1/models"), "does not list its models")
        entry_of = {url: _choose(flag, url, listed, model) for url, listed in listed_by.items()}
        name = _one_answer(flag, "model", {url: entry["id"] for url, entry in entry_of.items()})
        context = _context(flag, entry_of)
        tokens = _one_answer(flag, "tokenizer", _tokens(pool, name, timeout_s))
        if protocol == "binary":
            facts = _binary_facts(flag, ask(_json_call("/info"), "does not describe its model"))
        else:
            facts = {"content": _content_here(urls, [e.get("root") for e in entry_of.values()])}
        scores = ask(
            score_call(name, protocol, CANARY),
            "does not score (a vLLM server has to allow prompt_logprobs)",
        )
    canary = _one_canary(flag, {url: _canary_of(answer) for url, answer in scores.items()})
    return ServedModel(protocol, name, context, tokens, canary, **facts)


def _ask_every(
    flag: str, pool: ReplicaPool, call: Call, what_if_not: str, *, timeout_s: float, has_key: bool
) -> dict[str, Any]:
    """URL -> its answer; ValueError with one line if a replica has none."""
    answers = pool.ask_each(call, timeout_s)
    for url, answer in answers.items():
        if isinstance(answer, Rejected) and "HTTP 401" in str(answer):
            remedy = (
                "is not the right one"
                if has_key
                else "is missing: name its variable with `api_key_env`"
            )
            raise ValueError(f"{flag}: {url} wants a key, and it {remedy}")
        if isinstance(answer, Rejected) and "HTTP 404" in str(answer):
            raise ValueError(
                f"{flag}: {url} answers, and {what_if_not}: is it a vLLM or a scoring server?"
            )
        if isinstance(answer, Exception):
            raise ValueError(f"{flag}: {url} {what_if_not}: {answer}")
    return answers


def refusals(
    flag: str, urls: Sequence[str], model: ServedModel, question: Question, api_key: str | None
) -> dict[str, Exception]:
    """URL -> the error of each replica that does not answer a question."""
    with _asked_directly(flag, urls, api_key) as pool:
        answers = pool.ask_each(score_call(model, model.protocol, question))
    return {url: answer for url, answer in answers.items() if isinstance(answer, Exception)}


def unshared_tokens(
    flag: str,
    urls: Sequence[str],
    model: ServedModel,
    tokens: Sequence[str],
    encode: Callable[[str], list[int]],
    api_key: str | None,
    timeout_s: float = 60.0,
) -> list[str]:
    """Those of `tokens` of which a server makes other ids than `encode` does.

    A server says only what a text's tokens are, so it is asked for many at once, and again for each
    half of those that differ.
    """
    with _asked_directly(flag, urls, api_key) as pool:

        def differing(some: Sequence[str]) -> list[str]:
            text = "".join(some)
            answers = _tokens(pool, model.name, timeout_s, text)
            if _one_answer(flag, "tokenizer", answers) == tuple(encode(text)):
                return []
            if len(some) == 1:
                return list(some)
            half = len(some) // 2
            return [*differing(some[:half]), *differing(some[half:])]

        starts = range(0, len(tokens), TOKENS_AT_ONCE)
        return [t for i in starts for t in differing(tokens[i : i + TOKENS_AT_ONCE])]


def _asked_directly(flag: str, urls: Sequence[str], api_key: str | None) -> ReplicaPool:
    """A pool for `ask_each` only: it probes nobody, since nobody is in a rotation yet."""
    return ReplicaPool(
        flag, urls, probe=Call("/health"), limits=Limits(probe_every_s=1e6), api_key=api_key
    )


def _json_call(path: str) -> Call:
    def read(body: bytes) -> dict:
        try:
            content = json.loads(body)
        except ValueError:
            raise BadAnswer("its answer is not JSON: is it a vLLM or a scoring server?") from None
        if not isinstance(content, dict):
            raise BadAnswer("its answer is not a JSON object: is it a vLLM or a scoring server?")
        return content

    return Call(path, read=read)


def _one_answer(flag: str, what: str, by_url: dict[str, Any]) -> Any:
    (first_url, first), *others = by_url.items()
    for url, value in others:
        if value != first:
            raise ValueError(
                f"{flag}: the replicas differ in their {what}: {_at_most_60(first)} at "
                f"{first_url}, {_at_most_60(value)} at {url}; they must serve the same model alike"
            )
    return first


def _context(flag: str, entry_of: dict[str, dict]) -> int:
    """Tokens that fit into the model."""
    context_of = {url: entry.get("max_model_len") for url, entry in entry_of.items()}
    context = _one_answer(flag, "context length", context_of)
    if not isinstance(context, int):
        raise ValueError(
            f"{flag}: {next(iter(context_of))} does not say its context length (max_model_len)"
        )
    return context


def _one_canary(flag: str, canary_of: dict[str, tuple[float, ...]]) -> tuple[float, ...]:
    (first_url, first), *_ = canary_of.items()
    for url, canary in canary_of.items():
        if not _gap(canary, first) <= CANARY_TOLERANCE:
            raise ValueError(
                f"{flag}: {url} has another model than {first_url}: their log-probabilities of the "
                f"canary differ by {_gap(canary, first):.3f} nats; replicas of one teacher must "
                "serve the same weights"
            )
    return first


def _content_here(urls: Sequence[str], roots: Sequence[str | None]) -> str | None:
    """What a vLLM server of this very machine serves: it says which directory, and what lies there
    can be read.
    """
    is_here = all(is_loopback(urllib.parse.urlsplit(url).hostname) for url in urls)
    root = roots[0]
    if not is_here or len(set(roots)) != 1 or not root or not Path(root).is_dir():
        return None
    try:
        return content_hash(root)
    except (ValueError, OSError):
        return None


def _at_most_60(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _choose(flag: str, url: str, content: dict, model: str) -> dict:
    data = content.get("data")
    listed = data if isinstance(data, list) else ()
    entries = [
        entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]
    named = [entry for entry in entries if model in (entry["id"], entry.get("root"))]
    if named:
        return named[0]
    if len(entries) != 1:
        names = ", ".join(entry["id"] for entry in entries) or "no model"
        raise ValueError(f"{flag}: {url} serves {names}; name the teacher's with `model`")
    return entries[0]


def _tokens(
    pool: ReplicaPool, name: str, timeout_s: float, text: str = PROBE_TEXT
) -> dict[str, tuple[int, ...] | None]:
    """URL -> the tokens of a text; None where a server has no tokenizer."""

    def read(body: bytes) -> tuple[int, ...]:
        try:
            return tuple(map(int, json.loads(body)["tokens"]))
        except (ValueError, KeyError, TypeError):
            raise BadAnswer("no tokens") from None

    body = json.dumps({"model": name, "prompt": text, "add_special_tokens": False}).encode()
    answers = pool.ask_each(Call("/tokenize", body, read=read), timeout_s)
    return {
        url: None if isinstance(answer, Exception) else answer for url, answer in answers.items()
    }


def _binary_facts(flag: str, info_of: dict[str, dict]) -> dict[str, Any]:
    content_of = {url: info.get("content") for url, info in info_of.items()}
    _one_answer(flag, "content of the model", content_of)
    info = next(iter(info_of.values()))
    readers: dict[str, Callable] = {
        "content": str,
        "vocab_size": int,
        "hidden_size": int,
        "max_support_k": int,
        "eos_ids": lambda ids: tuple(map(int, ids)),
        "logit_scale": float,
        "logit_softcap": lambda x: None if x is None else float(x),
        "sees": bool,
    }
    try:
        return {name: read(info[name]) for name, read in readers.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{flag}: a scoring server of another version: {error!r} in its /info"
        ) from None
