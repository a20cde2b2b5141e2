"""The engine behind a rollout server: vLLM's asynchronous engine, whose weights change while it
lives.

A request sampled here has the tokens that `vllm_engine.GeneratorEngine` gives for the same weights,
prompt and seed.
"""

import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from opd.config import GIB
from opd.engines.vllm_images import check_vllm_tokens, images_limit, vllm_request
from opd.engines.vllm_process import async_engine, sampler_options, sampling_params
from opd.pictures import PromptImages
from opd.servers.control import PauseMode

RELOAD_SECONDS = 600.0  # to read new weights
FINISH_REASONS = {"stop": "stop", "length": "length", "abort": "aborted"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one response is sampled."""

    prompt_ids: list[int]
    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: of all tokens
    stop_ids: tuple[int, ...] = ()
    with_logprobs: bool = True
    images: PromptImages | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A response, and which weights sampled which of its L tokens."""

    token_ids: list[int]  # [L], the stop token included
    logprobs: list[float] | None  # [L] of the distribution that was sampled from
    finish_reason: Literal["stop", "length", "aborted"]
    spans: list[tuple[int, int, int]]  # (version, start, end): they partition the L tokens


class PushedEngine:
    """The `control.Holder` of a rollout server. To be called from one event loop."""

    def __init__(
        self,
        model: str,
        *,
        version: int | None,
        dtype: str,
        max_model_len: int,
        kv_cache_gib: float,
        seed: int,
        trust_remote_code: bool,
        enforce_eager: bool,
        tensor_parallel_size: int,
        images_per_prompt: int | None = None,
    ):
        self.requests = self.tokens = self.aborted = 0  # answered; their tokens; of them unfinished
        self.steps = 0  # of the engine
        self._inflight = self._running_at_step = 0
        self._version, self._numbers = version, itertools.count()
        # vllm 0.32 refuses to start unless this share of the GPU is free, and reads it for nothing
        # else when the size of the cache is given
        options = {"gpu_memory_utilization": 0.01} if torch.cuda.is_available() else {}
        self.llm = async_engine(
            self._stepped,
            model=model,
            dtype=dtype,
            max_model_len=max_model_len,
            seed=seed,
            kv_cache_memory_bytes=int(kv_cache_gib * GIB),
            trust_remote_code=trust_remote_code,
            enforce_eager=enforce_eager,
            tensor_parallel_size=tensor_parallel_size,
            **sampler_options(images_per_prompt),
            **images_limit(images_per_prompt),
            **options,
        )

    def _stepped(self, running: int) -> None:
        self.steps, self._running_at_step = self.steps + 1, running

    @property
    def running(self) -> int:
        """Requests that were in the engine's last step and are not over."""
        return min(self._running_at_step, self._inflight)

    @property
    def waiting(self) -> int:
        """All others."""
        return self._inflight - self.running

    @property
    def dead(self) -> bool:
        """Whether the engine's process has ended or failed for good."""
        return self.llm.errored

    async def generate(self, name: str, sampling: Sampling) -> Response:
        """One response; if the task is cancelled the engine forgets the request.

        ValueError for what vLLM refuses.
        """
        asked = {f.name: getattr(sampling, f.name) for f in fields(sampling)}
        text = (asked.pop("prompt_ids"), asked.pop("images"))
        prompt, final = vllm_request(text), None
        self._inflight += 1
        try:
            async for output in self.llm.generate(
                prompt, sampling_params(**asked), f"{name}-{next(self._numbers)}"
            ):
                final = output
        finally:
            self._inflight -= 1
        check_vllm_tokens("rollout server", text, final.prompt_token_ids)
        response = _response(final.outputs[0], sampling.with_logprobs)
        self.requests, self.tokens = self.requests + 1, self.tokens + len(response.token_ids)
        self.aborted += response.finish_reason == "aborted"
        return response

    async def warm_up(self) -> None:
        """The first question compiles for seconds.

        Whatever it leaves in the cache, nobody reads.
        """
        await self._tell_version()
        await self.generate("warm-up", Sampling(prompt_ids=[0], seed=0, max_tokens=2))
        await self._reset_cache()
        self.requests = self.tokens = 0

    async def pause(self, mode: PauseMode) -> None:
        """Returns when the engine is idle; what runs is kept in its queue, or ends as aborted."""
        await self.llm.pause_generation(mode=mode, clear_cache=True)

    async def load(self, directory: Path, version: int) -> None:
        """Reads weights; the old ones' prefixes go, those of requests that are kept too: they are
        computed again.
        """
        self._version = None
        await self.llm.collective_rpc("reload_from", timeout=RELOAD_SECONDS, args=(str(directory),))
        await self._reset_cache()
        self._version = version
        await self._tell_version()

    async def resume(self) -> None:
        await self.llm.resume_generation()

    async def _tell_version(self) -> None:
        """vLLM notes it with every token."""
        await self.llm.update_weight_version(str(-1 if self._version is None else self._version))

    async def _reset_cache(self) -> None:
        if not await self.llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError(
                "the prefix cache could not be reset: prefixes of the old weights would be read"
            )
        await self.llm.reset_encoder_cache()  # what the old weights made of images


def _response(completion: Any, with_logprobs: bool) -> Response:
    """vLLM's form of a response to ours."""
    ids = list(completion.token_ids)
    reason = FINISH_REASONS.get(completion.finish_reason)
    if reason is None:
        raise RuntimeError(f"the engine ended a response with {completion.finish_reason!r}")
    logprobs = None
    if with_logprobs:
        logprobs = [
            step[token].logprob for token, step in zip(ids, completion.logprobs or [], strict=True)
        ]
    spans = [(int(span.version), span.start, span.end) for span in completion.weight_versions or []]
    ends = [0, *(end for _, _, end in spans)]
    assert [start for _, start, _ in spans] == ends[:-1] and ends[-1] == len(ids), (
        f"{spans} of {len(ids)} tokens"
    )
    return Response(token_ids=ids, logprobs=logprobs, finish_reason=reason, spans=spans)
