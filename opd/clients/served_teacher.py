"""A teacher behind URLs, as the run uses it: it scores responses while others are written, and
writes answers itself.

It never sleeps and takes no memory here but its answers, and its output head where the loss is over
the full vocabulary: then its hidden states travel, and the head is read from a local copy of the
model or fetched from the server once.

L response length, K support size, V vocabulary, H hidden size.
"""

import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec
import safetensors.torch

from opd.clients.health import Limits
from opd.clients.served_model import ServedModel, open_pool, score_call
from opd.clients.token_route import TOKEN_ROUTE, read_tokens, token_request
from opd.clients.transport import Call
from opd.clients.wire import BadAnswer, Question
from opd.config import LossConfig, TeacherSpec
from opd.ops.heads import LogitForm, OutputHead, load_head
from opd.types import Prompt, Rollout, Sample, TeacherPayload, TeacherScores


class ServedTeacher:
    """One teacher of the pool.

    `submit` starts, `collect` waits; the pool of its replicas decides who answers.
    """

    def __init__(
        self,
        spec: TeacherSpec,
        model: ServedModel,
        cfg: LossConfig,
        *,
        limits: Limits,
        api_key: str | None,
        shared_vocab: int,
        needs_head: bool,
    ):
        self.name, self.spec, self.model, self.cfg = spec.name, spec, model, cfg
        self.shared_vocab = shared_vocab
        self.pool = open_pool(f"teacher {spec.name}", spec.urls, model, limits, api_key)
        self.head: OutputHead | None = None
        try:
            if needs_head and model.protocol == "binary":
                self.head = (
                    load_head(spec.model) if spec.has_local_model else self._fetch_head()
                ).pinned()
        except BaseException:
            self.close()
            raise

    def payload(self, wanted: TeacherPayload) -> TeacherPayload:
        """What it gives where the loss wants `wanted`: a vLLM server has no hidden
        states to give.
        """
        return "topk" if self.model.protocol == "json" and "hidden" in wanted else wanted

    @property
    def bytes_per_token(self) -> int:
        """Of a hidden state; 0 where none is sent."""
        return (
            self.model.hidden_size * self.head.weight_VH.element_size()
            if self.head is not None
            else 0
        )

    def submit(self, rollout: Rollout, payload: TeacherPayload) -> Future:
        """Asks for a response's scores, without waiting for them."""
        question = Question(
            prompt_ids=rollout.prompt.ids_for(self.name),
            response_ids=rollout.ids_within(self.shared_vocab),
            payload=payload,
            support_k=min(self.cfg.support_k, self.shared_vocab) if "topk" in payload else 0,
            vocab=self.shared_vocab,
            temperature=self.cfg.loss_temperature,
            hidden_size=self.model.hidden_size,
            images=rollout.prompt.images_for(self.name),
        )
        request_id = f"{self.name}-{rollout.sample_id.replace('/', '-')}"
        return self.pool.submit(score_call(self.model, self.model.protocol, question, request_id))

    def collect(self, futures: Sequence[Future]) -> list[TeacherScores]:
        """The scores, in order.

        Raises transport.Unanswered, or Rejected, with the teacher's name; nothing is left out.
        """
        return [
            TeacherScores(teacher=self.name, weight=1.0, **fields)
            for fields in self.pool.collect(futures)
        ]

    def close(self) -> None:
        """Ends its thread and its connections."""
        self.pool.close()

    def _fetch_head(self) -> OutputHead:
        """The output head from a scoring server, whole, in the dtype that it has there."""
        V, H = self.model.vocab_size, self.model.hidden_size

        def read(body: bytes) -> OutputHead:
            try:
                arrays = safetensors.torch.load(body)
            except (safetensors.SafetensorError, ValueError, KeyError) as error:
                raise BadAnswer(f"its head is not safetensors: {error}") from None
            weight_VH, bias_V = arrays.get("weight_VH"), arrays.get("bias_V")
            if (
                weight_VH is None
                or tuple(weight_VH.shape) != (V, H)
                or not weight_VH.is_floating_point()
            ):
                raise BadAnswer(f"its head is no floating-point matrix of {V} x {H}")
            if bias_V is not None and tuple(bias_V.shape) != (V,):
                raise BadAnswer(f"its head's bias is not of length {V}")
            return OutputHead(
                weight_VH, bias_V, LogitForm(self.model.logit_scale, self.model.logit_softcap)
            )

        (head,) = self.pool.collect(
            [self.pool.submit(Call("/head", read=read, most_bytes=4 * V * (H + 1) + (1 << 16)))]
        )
        return head


# ---- Writing -------------------------------------------------------------------------------------


class _Written(msgspec.Struct):
    token_ids: list[int]
    finish_reason: str | None = None


class _WrittenBody(msgspec.Struct):
    choices: list[_Written]


def write_with_servers(
    spec: TeacherSpec,
    model: ServedModel,
    prompts: Sequence[Prompt],
    *,
    limits: Limits,
    api_key: str | None,
    seeds: Sequence[int],
    eos_ids: tuple[int, ...],
    max_tokens: int,
    temperature: float,
    vocab: int,
) -> list[Sample]:
    """Responses of a teacher that a vLLM server runs, for the report and for `--seq_kd`; ids below
    `vocab` only.
    """
    calls = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        ids, images = prompt.ids_for(spec.name), prompt.images_for(spec.name)
        sampling = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "stop_token_ids": list(eos_ids),
            "ignore_eos": True,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
        }
        sample_of = functools.partial(_sample_of, most=max_tokens, vocab=vocab)
        if images is None:
            route = "/v1/completions"
            asked = {"prompt": ids, "add_special_tokens": False, "return_token_ids": True}
            body = {"model": model.name, **asked, **sampling}
            read = functools.partial(_read_written, sample_of=sample_of)
        else:
            route, body = TOKEN_ROUTE, token_request(model.name, ids, images, **sampling)
            read = functools.partial(_read_seen, ids=ids, sample_of=sample_of)
        calls.append(
            Call(
                route,
                json.dumps(body).encode(),
                most_bytes=(1 << 16) + 64 * (len(ids) + max_tokens),
                read=read,
                tokens=len(ids) + max_tokens,
                request_id=f"{spec.name}-writes-{prompt.prompt_id}",
            )
        )
    with open_pool(f"teacher {spec.name}", spec.urls, model, limits, api_key) as pool:
        return pool.collect([pool.submit(call) for call in calls])


def _read_written(body: bytes, sample_of: Callable[[list[int], str | None], Sample]) -> Sample:
    try:
        (choice,) = msgspec.json.decode(body, type=_WrittenBody).choices
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadAnswer(f"not a completion with token ids: {error}") from None
    return sample_of(choice.token_ids, choice.finish_reason)


def _read_seen(
    body: bytes, ids: list[int], sample_of: Callable[[list[int], str | None], Sample]
) -> Sample:
    (choice,) = read_tokens(body, ids).choices
    return sample_of(choice.token_ids, choice.finish_reason)


def _sample_of(token_ids: list[int], finish_reason: str | None, most: int, vocab: int) -> Sample:
    """What a server wrote, if it can be what was asked for. Raises BadAnswer."""
    if not 1 <= len(token_ids) <= most:
        raise BadAnswer(f"{len(token_ids)} tokens instead of 1 to {most}")
    if not all(0 <= token < vocab for token in token_ids):
        raise BadAnswer(f"a token outside the {vocab} that all models share")
    return Sample(token_ids, None, stopped=finish_reason == "stop")
