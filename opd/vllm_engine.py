"""Everything that touches vLLM: one in-process engine per rank for rollouts, one per teacher for hidden states.

The only importer of vllm in the package, and only when the first engine is built: the import takes seconds, and a user's
mistake must not wait for it. vLLM reads its environment at import, so the variables are set first; they make each rank own
its engines (`external_launcher`, no worker processes) and leave thread placement to the process.
"""

import os
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

GIB = 1 << 30
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


def _import_vllm():
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # vllm-cpu 0.32 takes it over `kv_cache_memory_bytes`: each engine, teachers too, would hold that many GiB.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    import vllm

    return vllm


class _AllocationTable(dict):
    """The sleep allocator's table of allocations, whose iteration can be narrowed to one engine.

    vLLM's allocator is one per process and puts every allocation it knows to sleep, those of other engines included
    (vllm 0.32: `CuMemAllocator.get_instance`). Lookups and removals still see the whole table.
    """

    only: frozenset[int] | None = None

    def items(self):
        return [(ptr, data) for ptr, data in super().items() if self.only is None or ptr in self.only]

    def values(self):
        return [data for _, data in self.items()]


def _allocation_table() -> _AllocationTable | None:
    if not torch.cuda.is_available():
        return None
    _import_vllm()
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.get_instance()
    if not isinstance(allocator.pointer_to_data, _AllocationTable):
        allocator.pointer_to_data = _AllocationTable(allocator.pointer_to_data)
    return allocator.pointer_to_data


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response. Log-probabilities are of the distribution that was sampled from."""

    token_ids: list[int]  # [L], the stop token included
    logprobs: list[float] | None  # [L]
    stopped: bool  # False: cut at the token limit


class _Engine:
    """An in-process vLLM engine that sleeps and wakes without touching the others of this process."""

    def __init__(self, name: str, model: str, *, sleep_level: int, kv_cache_gib: float, enforce_eager: bool, **options):
        self.name = name
        self.sleep_level = sleep_level
        table = _allocation_table()
        before = frozenset(table or ())
        self.llm = _import_vllm().LLM(
            model=model,
            distributed_executor_backend="external_launcher",
            enforce_eager=enforce_eager,
            enable_sleep_mode=table is not None,
            kv_cache_memory_bytes=int(kv_cache_gib * GIB),
            disable_log_stats=True,
            **options,
        )
        self._allocations = frozenset(table or ()) - before
        self._asleep: set[str] = set()

    @property
    def awake(self) -> bool:
        return "weights" not in self._asleep

    def _require_awake(self) -> None:
        """A request to a sleeping engine would wait for ever: vllm 0.32 stops its scheduler, without an error."""
        assert not self._asleep, f"{self.name}: {' and '.join(sorted(self._asleep))} asleep; wake it first"

    @contextmanager
    def _own_allocations(self):
        table = _allocation_table()
        if table is None:
            yield
            return
        table.only = self._allocations
        try:
            yield
        finally:
            table.only = None

    def sleep(self) -> None:
        """Gives the GPU memory back. Level 1 keeps the weights on the host, level 2 drops them."""
        if self._asleep == {"weights", "kv_cache"}:
            return
        if self._asleep:  # vllm 0.32 ignores `sleep` on an engine that is half awake
            self.wake(sorted(self._asleep))
        with self._own_allocations():
            self.llm.sleep(level=self.sleep_level)
        self._asleep = {"weights", "kv_cache"}

    def wake(self, tags: list[str] | None = None) -> None:
        """Maps the memory again; `tags` picks ["weights"] or ["kv_cache"], so that a load never meets a live cache."""
        tags = [tag for tag in (tags or ["weights", "kv_cache"]) if tag in self._asleep]
        if not tags:
            return
        with self._own_allocations():
            self.llm.wake_up(tags=tags)
        self._asleep -= set(tags)


class GeneratorEngine(_Engine):
    """Samples responses, and takes new weights from the student."""

    def __init__(
        self, model: str, *, dtype: str, max_model_len: int, kv_cache_gib: float, seed: int, trust_remote_code: bool,
        enforce_eager: bool = False,
    ):  # fmt: skip
        super().__init__(
            "rollout",
            model,
            sleep_level=2,
            enforce_eager=enforce_eager,
            kv_cache_gib=kv_cache_gib,
            dtype=dtype,
            max_model_len=max_model_len,
            seed=seed,
            trust_remote_code=trust_remote_code,
            skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs",
        )

    def generate(
        self, prompts: list[list[int]], seeds: list[int], stop_ids: tuple[int, ...], *,
        max_tokens: int, temperature: float, top_p: float = 1.0, top_k: int = 0, with_logprobs: bool = True,
    ) -> list[Sample]:  # fmt: skip
        """One response per prompt. A seed per request makes a sample independent of what else is in the batch.

        `temperature=0` is greedy; its log-probabilities are then those at temperature 1. Without log-probabilities vllm 0.32
        samples a sixth faster on a CPU.
        """
        self._require_awake()
        vllm = _import_vllm()
        params = [
            vllm.SamplingParams(
                max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                logprobs=0 if with_logprobs else None, stop_token_ids=list(stop_ids), ignore_eos=True, detokenize=False,
            )
            for seed in seeds
        ]  # fmt: skip
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        samples = []
        for output in outputs:
            best = output.outputs[0]
            ids = list(best.token_ids)
            logprobs = None
            if with_logprobs:
                logprobs = [step[token].logprob for token, step in zip(ids, best.logprobs, strict=True)]
            samples.append(Sample(ids, logprobs, stopped=best.finish_reason == "stop"))
        return samples

    def load_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the weights and drops every cached prefix, which the old weights had written."""
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter(named_parameters), "is_checkpoint_format": True}
        )
        self.llm.reset_prefix_cache()


class HiddenStateEngine(_Engine):
    """A teacher: returns the final hidden states of every token, never logits, and never generates.

    No vocabulary-sized tensor and no per-token Python object exists in the engine; the `lm_head` is not even loaded.
    """

    def __init__(
        self, name: str, model: str, *, tokenizer: str, dtype: str, max_model_len: int, kv_cache_gib: float,
        trust_remote_code: bool,
    ):  # fmt: skip
        _import_vllm()
        from vllm.config import PoolerConfig

        super().__init__(
            name,
            model,
            sleep_level=1,
            enforce_eager=True,  # a prefill gains nothing from CUDA graphs
            tokenizer=tokenizer,  # vLLM's pooling entry point insists on one; it never sees text
            kv_cache_gib=kv_cache_gib,
            dtype=dtype,
            max_model_len=max_model_len,
            trust_remote_code=trust_remote_code,
            runner="pooling",
            convert="embed",
            pooler_config=PoolerConfig(task="token_embed", use_activation=False),
            enable_prefix_caching=False,
        )

    def hidden_states(self, sequences: list[list[int]]) -> list[Tensor]:
        """Final hidden states [len, H] of each sequence, on the host, in the engine's dtype."""
        self._require_awake()
        outputs = self.llm.encode(
            [{"prompt_token_ids": ids} for ids in sequences],
            pooling_task="token_embed",
            pooling_params=_import_vllm().PoolingParams(use_activation=False),
            use_tqdm=False,
        )
        states = [output.outputs.data for output in outputs]
        for ids, state in zip(sequences, states, strict=True):
            assert state.shape[0] == len(ids), f"{self.name}: {state.shape[0]} hidden states for {len(ids)} tokens"
        return states
