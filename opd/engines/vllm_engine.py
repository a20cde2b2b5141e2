"""The vLLM engines of a rank: one in-process engine for rollouts, one per teacher for hidden
states.

Each rank owns its engines (`external_launcher`, no worker processes). Whatever they need of vLLM's
modules comes from `opd/engines/vllm_process.py`.
"""

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd import distributed
from opd.config import GIB
from opd.engines.adapter_files import adapter_folder, write_adapter
from opd.engines.engine_memory import KV_CACHE, WEIGHTS
from opd.engines.vllm_adapters import lora_options, rank_of, use_exact_kernels
from opd.engines.vllm_images import check_vllm_tokens, images_limit, vllm_request
from opd.engines.vllm_process import (
    Workspace,
    adapter_request,
    as_transformers,
    engine_memory,
    import_vllm,
    kept_classes,
    parallel_groups,
    pooling_options,
    reload_weights,
    room_for_one_sequence,
    sampler_options,
    sampling_params,
    use_own_sleep,
    weight_bytes,
)
from opd.log import warn
from opd.ops.lora import LoraLayout
from opd.pictures import PromptImages
from opd.types import Sample

SLEEP_LEVEL = {"gpu": 0, "host": 1, "disk": 2}  # of a teacher, by its residency


@functools.cache
def _warn_that_nothing_sleeps() -> None:
    warn("vLLM cannot sleep on a CPU: its engines keep their memory in every phase")


class _Engine:
    """An in-process vLLM engine that sleeps and wakes without touching the others of this process.

    With a `tensor_parallel_size` above 1 it is this rank's part of an engine that so many
    neighbouring ranks share. They build it, call it, load it, put it to sleep and wake it alike;
    what they ask it may differ.

    `sleep_level` 1 keeps the weights on the host, 2 drops them, 0 never sleeps. `frozen` weights
    are never replaced. A KV cache that is too small for one sequence is a ValueError, or grows.
    `images_per_prompt` is the most that a prompt has, None for a model that sees none.
    """

    def __init__(
        self,
        name: str,
        model: str,
        *,
        sleep_level: int,
        frozen: bool,
        kv_cache_gib: float,
        kv_cache_grows: bool,
        enforce_eager: bool,
        tensor_parallel_size: int = 1,
        images_per_prompt: int | None = None,
        **options,
    ):
        self.name = name
        self._sees = images_per_prompt is not None
        options |= images_limit(images_per_prompt)
        self.sleep_level = sleep_level
        self.tensor_parallel_size = tensor_parallel_size
        vllm = import_vllm()
        self._groups = parallel_groups(tensor_parallel_size)
        self.memory = engine_memory(name, frozen=frozen) if sleep_level else None
        if self.memory is not None:
            options["enable_sleep_mode"] = True
        if torch.cuda.is_available():
            # vllm 0.32 refuses to start unless this share of the GPU is free, and reads it for
            # nothing else when the size of the cache is given. The other engines and the student
            # are on the GPU already.
            options["gpu_memory_utilization"] = 0.01
        size = int(kv_cache_gib * GIB)
        self._asleep: set[str] = set()
        self._rests = False
        self._workspace = Workspace()
        room = room_for_one_sequence(size, grows=kv_cache_grows)
        with self._active(), kept_classes(), room as sizes:
            self.llm = vllm.LLM(
                model=model,
                **as_transformers(),
                tensor_parallel_size=tensor_parallel_size,
                distributed_executor_backend="external_launcher",
                enforce_eager=enforce_eager,
                kv_cache_memory_bytes=max(1, size),  # 0 is vLLM's own default
                disable_log_stats=True,
                **options,
            )

            if self.memory is not None:
                self.llm.collective_rpc(use_own_sleep)
        self._kv_cache_bytes = sizes[-1] if sizes else 0
        self.dtype = self.llm.model_config.dtype

    @contextmanager
    def _active(self):
        """Around every call of vLLM: its globals are this engine's inside, and what it allocates.

        Ranks that share an engine wait for each other inside, and cannot be asked there.
        """
        shared = self.tensor_parallel_size > 1
        with (
            self._workspace.active(),
            self._groups.active(),
            self.memory.active() if self.memory is not None else nullcontext(),
            distributed.collective_region() if shared else nullcontext(),
        ):
            yield

    @property
    def can_sleep(self) -> bool:
        """Whether `sleep` gives memory back."""
        return self.memory is not None

    @property
    def awake(self) -> bool:
        return WEIGHTS not in self._asleep

    @property
    def ready(self) -> bool:
        """Whether it can be asked: weights and KV cache are there."""
        return not self._asleep

    @property
    def vocab_size(self) -> int:
        return self.llm.model_config.get_vocab_size()

    @property
    def bytes_awake(self) -> int:
        """Bytes of weights and KV cache that the engine holds on its device when awake."""
        if self.memory is not None:
            return self.memory.size()
        (weights,) = self.llm.collective_rpc(weight_bytes)
        return weights + self._kv_cache_bytes

    @property
    def bytes_prefetched(self) -> int:
        """Bytes on the device after `prefetch`: the weights that the host holds."""
        return self.memory.size(WEIGHTS) if self.memory is not None and self.sleep_level == 1 else 0

    def _require_awake(self) -> None:
        """A request to a sleeping engine would wait for ever: vllm 0.32 stops its scheduler,
        without an error.
        """
        assert not self._asleep, (
            f"{self.name}: {' and '.join(sorted(self._asleep))} asleep; wake it first"
        )

    def _answer_all(self, requests: list, answer: Callable[[list, range], list]) -> list:
        """Answers to this rank's requests.

        Ranks that share an engine run the requests of all of them, and keep their own.

        `answer` gets the requests to run, and which of them are this rank's.
        """
        self._require_awake()
        shares = distributed.gather_in_group(requests, self.tensor_parallel_size, self.name)
        if not any(shares):
            return []
        start = sum(map(len, shares[: distributed.rank() % self.tensor_parallel_size]))
        mine = range(start, start + len(requests))
        with self._active():
            answers = answer([request for share in shares for request in share], mine)
        return answers[mine.start : mine.stop]

    def sleep(self) -> None:
        """Gives the GPU memory back, that of a prefetch too; nothing at level 0.

        After an error a part of it may be asleep: call it again.
        """
        if self.sleep_level == 0:
            return
        if not self.can_sleep:
            _warn_that_nothing_sleeps()
        if self._asleep == {WEIGHTS, KV_CACHE}:
            if self.memory is not None:
                self.memory.suspend(self.sleep_level)
            return
        # vllm 0.32 ignores `sleep` on an engine whose cache alone is awake
        if WEIGHTS in self._asleep:
            self._wake([WEIGHTS])
        with self._active():
            if self._sees:
                self.llm.llm_engine.reset_encoder_cache()
            self.llm.sleep(level=self.sleep_level)
        self._asleep, self._rests = {WEIGHTS, KV_CACHE}, False

    def prefetch(self) -> None:
        """Starts bringing the weights back from the host, without waiting: the next `wake`
        completes it.
        """
        if self.memory is not None and not self.awake:
            torch.cuda.empty_cache()  # what torch holds unused may be the room for them
            self.memory.prefetch()

    def rest(self) -> None:
        """Gives up the KV cache and keeps the weights: the next `wake` is due soon, and copies
        nothing.
        """
        if self.memory is not None and not self._asleep:
            self.memory.drop_cache()
            self._asleep = {KV_CACHE}
            self._rests = True

    def wake(self, tags: list[str] | None = None) -> None:
        """Maps the memory again; `tags` picks ["weights"] or ["kv_cache"], so that a load never
        meets a live cache.
        """
        tags = [tag for tag in (tags or [WEIGHTS, KV_CACHE]) if tag in self._asleep]
        if tags:
            self._wake(tags)

    def _wake(self, tags: list[str]) -> None:
        if self._rests:  # vLLM never heard of it
            torch.cuda.empty_cache()
            self.memory.resume([KV_CACHE])
            self._asleep, self._rests = set(), False
            return
        with self._active():
            self.llm.wake_up(tags=tags)
        self._asleep -= set(tags)


def _sample(completion, with_logprobs: bool) -> Sample:
    """vLLM's form of a response to ours."""
    ids, logprobs = list(completion.token_ids), None
    if with_logprobs:
        logprobs = [
            step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)
        ]
    return Sample(ids, logprobs, stopped=completion.finish_reason == "stop")


class GeneratorEngine(_Engine):
    """Samples responses, and takes new weights from the student.

    With `lora` it keeps the weights of its files and takes new adapters of that layout instead.
    With `adapter`, a directory, a teacher that is this LoRA adapter on `model` writes.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_model_len: int,
        kv_cache_gib: float,
        seed: int,
        trust_remote_code: bool,
        kv_cache_grows: bool = False,
        enforce_eager: bool = False,
        tensor_parallel_size: int = 1,
        lora: LoraLayout | None = None,
        images_per_prompt: int | None = None,
        adapter: str = "",
    ):
        self.lora, self._number = lora, 0
        self._folder = None if lora is None else adapter_folder()
        ranks = [lora.r] if lora else [rank_of(adapter)] if adapter else []
        super().__init__(
            "rollout",
            model,
            # New weights are due when it wakes. New adapters are not: what they stand beside waits
            # on the host, and vLLM's tables of adapters with it, which every batch may change.
            sleep_level=2 if lora is None else 1,
            frozen=False,
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=enforce_eager,
            kv_cache_gib=kv_cache_gib,
            kv_cache_grows=kv_cache_grows,
            dtype=dtype,
            max_model_len=max_model_len,
            seed=seed,
            trust_remote_code=trust_remote_code,
            images_per_prompt=images_per_prompt,
            **sampler_options(images_per_prompt),
            **lora_options(ranks),
        )
        self._request = adapter_request(1, adapter) if adapter else None  # instead of the base

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        stop_ids: tuple[int, ...],
        *,
        images: Sequence[PromptImages | None] | None = None,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        with_logprobs: bool = True,
        on_finished: Callable[[int, Sample], None] | None = None,
    ) -> list[Sample]:
        """One response per prompt, which may have images.

        A seed per request makes a sample independent of what else is in the batch.

        `temperature=0` is greedy; its log-probabilities are then those at temperature 1. Without
        log-probabilities vllm 0.32 samples a sixth faster on a CPU. `on_finished(index, sample)`
        hears of each response as soon as it is complete, while the others are still being written.
        """

        def answer(requests: list, mine: range) -> list[Sample]:
            params = [
                sampling_params(
                    seed,
                    stop_ids,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    with_logprobs=with_logprobs,
                )
                for _, seed in requests
            ]
            samples: dict[int, Sample] = {}
            for index, output in self._run([vllm_request(text) for text, _ in requests], params):
                check_vllm_tokens(self.name, requests[index][0], output.prompt_token_ids)
                samples[index] = _sample(output.outputs[0], with_logprobs)
                if on_finished is not None and index in mine:
                    on_finished(index - mine.start, samples[index])
            return [samples[index] for index in range(len(requests))]

        texts = zip(prompts, images or [None] * len(prompts), strict=True)
        return self._answer_all(list(zip(texts, seeds, strict=True)), answer)

    def _run(self, prompts: list, params: list) -> Iterator[tuple[int, Any]]:
        """(index, output) of each request, in the order in which they finish.

        Whoever stops asking aborts the rest.
        """
        engine, first = (
            self.llm.llm_engine,
            self.llm.request_counter.counter,
        )  # vllm 0.32 numbers requests one by one
        ids = self.llm.enqueue(prompts, params, lora_request=self._request, use_tqdm=False)
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        yield int(output.request_id) - first, output
        finally:
            if engine.has_unfinished_requests():
                engine.abort_request(ids, internal=True)

    def load_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the weights and drops every cached prefix and image, which the old weights had
        computed.
        """
        with self._active():
            self.llm.collective_rpc(
                reload_weights, kwargs={"weights_iterator": iter(named_parameters)}
            )
            self.llm.reset_prefix_cache()
            if self._sees:  # what the old weights made of images
                self.llm.llm_engine.reset_encoder_cache()

    def load_adapter(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the adapter, whose tensors have the names of an adapter's file, and drops every
        cached prefix.
        """
        assert self.lora is not None
        self._number += 1
        directory = Path(self._folder.name, str(self._number))
        write_adapter(directory, self.lora, named_tensors)
        request = adapter_request(self._number, str(directory))
        with self._active():
            self.llm.llm_engine.add_lora(request)  # what is wrong with it shows here
            self.llm.reset_prefix_cache()
        if self._request is not None:
            shutil.rmtree(self._request.path)
        self._request = request


class HiddenStateEngine(_Engine):
    """A teacher: returns the final hidden states of every token, never logits, and never generates.

    No vocabulary-sized tensor and no per-token Python object exists in the engine; the `lm_head` is
    not even loaded. `residency` is where its weights are while others work: "gpu" (it never
    sleeps), "host" (a pinned copy), or "disk" (its files, which every wake reads). `adapters` (name
    -> directory) are LoRA adapters on its weights, each another teacher.
    """

    def __init__(
        self,
        name: str,
        model: str,
        *,
        tokenizer: str,
        dtype: str,
        max_model_len: int,
        kv_cache_gib: float,
        trust_remote_code: bool,
        kv_cache_grows: bool = False,
        tensor_parallel_size: int = 1,
        residency: str = "host",
        images_per_prompt: int | None = None,
        adapters: Mapping[str, str] | None = None,
    ):
        self.adapters = dict(adapters or {})
        super().__init__(
            name,
            model,
            sleep_level=SLEEP_LEVEL[residency],
            frozen=True,
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=True,  # a prefill gains nothing from CUDA graphs
            tokenizer=tokenizer,  # vLLM's pooling entry point insists on one; it never sees text
            kv_cache_gib=kv_cache_gib,
            kv_cache_grows=kv_cache_grows,
            dtype=dtype,
            max_model_len=max_model_len,
            trust_remote_code=trust_remote_code,
            enable_prefix_caching=False,
            images_per_prompt=images_per_prompt,
            **pooling_options(),
            **lora_options([rank_of(directory) for directory in self.adapters.values()]),
        )
        self._requests = {
            name: adapter_request(number, directory)
            for number, (name, directory) in enumerate(self.adapters.items(), start=1)
        }
        if self.adapters:
            self.llm.collective_rpc(use_exact_kernels)

    def _wake(self, tags: list[str]) -> None:
        if not (self.can_sleep and self.sleep_level == 2 and WEIGHTS in tags):
            super()._wake(tags)
            return
        super()._wake([WEIGHTS])
        try:
            self.reload()
        except BaseException:
            self.sleep()  # half a model must not look awake
            raise
        if KV_CACHE in tags:
            super()._wake([KV_CACHE])

    def reload(self) -> None:
        """Reads the weights from the model's files again, into the memory that they have; an
        adapter's when it is asked for.
        """
        with self._active():
            self.llm.collective_rpc(reload_weights)
            for request in self._requests.values():
                self.llm.llm_engine.remove_lora(request.lora_int_id)

    def hidden_states(
        self,
        sequences: list[list[int]],
        images: Sequence[PromptImages | None] | None = None,
        adapter: str = "",
    ) -> list[Tensor]:
        """Final hidden states [len, H] of each sequence, on the host, in the engine's dtype: of the
        base, or of it with an adapter.
        """

        def answer(requests: list, mine: range) -> list:
            outputs = self.llm.encode(
                [vllm_request(text) for text in requests],
                pooling_task="token_embed",
                pooling_params=import_vllm().PoolingParams(use_activation=False),
                lora_request=self._requests[adapter] if adapter else None,
                use_tqdm=False,
            )
            for text, output in zip(requests, outputs, strict=True):
                check_vllm_tokens(self.name, text, output.prompt_token_ids)
            return outputs

        texts = list(zip(sequences, images or [None] * len(sequences), strict=True))
        states = [output.outputs.data for output in self._answer_all(texts, answer)]
        for ids, state in zip(sequences, states, strict=True):
            assert state.shape[0] == len(ids), (
                f"{self.name}: {state.shape[0]} hidden states for {len(ids)} tokens"
            )
            # twice the bytes on their way to the host, and in what the plan counts
            assert state.dtype == self.dtype, f"{self.name}: {state.dtype}"
        return states
