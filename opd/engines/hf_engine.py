"""Teachers that are plain transformers models: `backend: hf`. They serve what vLLM does not know.

Only the base model is loaded: hidden states come from here, the output head from
`opd/ops/heads.py`. What a sleeping engine keeps is its residency:

| residency | asleep it keeps                             | waking costs                 | `prefetch`                         |
|-----------|---------------------------------------------|------------------------------|------------------------------------|
| gpu       | everything                                  | nothing                      | nothing                            |
| host      | its weights in host memory, pinned once     | a copy to the GPU            | starts the copy on a side stream   |
| disk      | nothing                                     | loading its files            | asks the kernel to read them ahead |

On a CPU the device is the host, so only `disk` gives memory back. There the weights are pages of
their safetensors files, mapped and not copied (unless `dtype` is another than the files'), and
unmapped again when the engine sleeps.

B sequences in a batch, S padded length, H hidden size.
"""  # noqa: E501

import ctypes
import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from opd.config import Residency
from opd.engines.hf_adapters import add_teacher_adapter, use_adapter
from opd.engines.host_memory import pinned_like
from opd.ops.attention import attention_for
from opd.ops.model_class import model_class
from opd.ops.pixels import Pixels
from opd.pictures import PromptImages
from opd.types import Sample

# Tokens of a batch, padding included: enough for a prefill to be compute-bound, few enough for its
# activations to be small.
TOKENS_PER_BATCH = 4096
ASYNC_LOAD = "HF_DEACTIVATE_ASYNC_LOAD"  # read by transformers at each load


class HFEngine:
    """A teacher: returns the final hidden states of every token, never logits.

    `adapters` (name -> directory) are LoRA adapters on its weights, each another teacher. They
    sleep, wake and travel with the base. It is built awake.
    """

    def __init__(
        self,
        name: str,
        model: str,
        *,
        dtype: str,
        trust_remote_code: bool,
        device: torch.device | str = "cpu",
        residency: Residency = "host",
        adapters: Mapping[str, str] | None = None,
    ):
        self.adapters = dict(adapters or {})
        self.name, self.residency, self.device = name, residency, torch.device(device)
        self.model, self.dtype, self.trust_remote_code = (
            model,
            getattr(torch, dtype),
            trust_remote_code,
        )
        self._pixels = Pixels(model, trust_remote_code)
        self.awake = True
        self._base: nn.Module | None = self._load()
        self.bytes_awake = sum(t.numel() * t.element_size() for t in _tensors(self._base))
        self.bytes_prefetched = 0 if residency == "disk" else self.bytes_awake
        self._pinned: list[Tensor] | None = None  # the host's copies, in the order of `_tensors`
        self._arriving: list[Tensor] | None = None  # the GPU's, while the side stream fills them
        if residency == "host" and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._pinned = [
                pinned_like(tensor).copy_(tensor.data) for tensor in _tensors(self._base)
            ]
            self._bind(self._pinned)
            self.awake = False
            self.wake()
        else:
            self._base.to(self.device)

    @property
    def can_sleep(self) -> bool:
        """Whether sleep gives memory back.

        On a CPU "host" does not: sleep and wake only keep books.
        """
        return self.residency == "disk" or self._pinned is not None

    def sleep(self) -> None:
        """Gives back whatever the residency does not keep, that of a prefetch too; nothing for
        "gpu", which stays awake.
        """
        if self._arriving is not None:
            # the copy may still write to it
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._arriving = None
        if not self.awake or self.residency == "gpu":
            return
        self.awake = False
        if self.residency == "disk":
            self._base = None
        elif self._pinned is not None:
            self._bind(self._pinned)
        if self.can_sleep:
            return_free_memory()

    def rest(self) -> None:
        """Stays as it is: there is no KV cache to give up."""

    def prefetch(self) -> None:
        """Starts waking without waiting for it; `wake` completes it."""
        if self.awake or self._arriving is not None:
            return
        if self.residency == "disk":
            for directory in (self.model, *self.adapters.values()):
                _read_ahead(directory)
        elif self._pinned is not None:
            # The memory belongs to the current stream, which may still be using what was freed
            # there.
            self._arriving = [
                torch.empty_like(tensor, device=self.device) for tensor in self._pinned
            ]
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for target, source in zip(self._arriving, self._pinned, strict=True):
                    target.copy_(source, non_blocking=True)

    def wake(self, tags: list[str] | None = None) -> None:
        """Has the weights on the device again.

        There is no KV cache, so the tag "kv_cache" alone wakes nothing.
        """
        if self.awake or (tags is not None and "weights" not in tags):
            return
        if self.residency == "disk":
            self._base = self._load().to(self.device)
        elif self._pinned is not None:
            self.prefetch()
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._bind(self._arriving)
            self._arriving = None
        self.awake = True

    @torch.no_grad()
    def hidden_states(
        self,
        sequences: list[list[int]],
        images: Sequence[PromptImages | None] | None = None,
        adapter: str = "",
    ) -> list[Tensor]:
        """Final hidden states [len, H] of each sequence, on the host, in the engine's dtype: of the
        base, or of it with an adapter.

        ValueError if this model's processor makes other tokens of a prompt's images.
        """
        assert self.awake, f"{self.name}: weights asleep; wake it first"
        if self.adapters:
            use_adapter(self._base, adapter)
        images = images or [None] * len(sequences)
        for ids, own in zip(sequences, images, strict=True):
            self._pixels.check_tokens(self.name, ids, own)
        states: list[Tensor | None] = [None] * len(sequences)
        for indices in batches([len(ids) for ids in sequences], TOKENS_PER_BATCH):
            rows = [sequences[index] for index in indices]
            longest = max(map(len, rows))
            ids_BS = torch.tensor(
                [ids + [0] * (longest - len(ids)) for ids in rows], device=self.device
            )
            length_B1 = torch.tensor([[len(ids)] for ids in rows], device=self.device)
            mask_BS = torch.arange(longest, device=self.device) < length_B1
            shown = [images[index] for index in indices]
            seen = self._pixels.inputs_of(self._base, shown, longest)
            output = self._base(
                input_ids=ids_BS, attention_mask=mask_BS.long(), use_cache=False, **seen
            )
            hidden_BSH = output.last_hidden_state.cpu()
            for index, ids, hidden_SH in zip(indices, rows, hidden_BSH, strict=True):
                states[index] = hidden_SH[: len(ids)]
        return states

    @torch.no_grad()
    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Takes other weights, also while it sleeps: for a teacher whose weights change.

        Names and shapes are those of transformers' causal language model; those that are not of its
        base are left out. Not with residency "disk": its files are the weights.
        """
        assert self.residency != "disk", f"{self.name}: its weights are its files"
        places = self._places()
        for name, tensor in named:
            for place in places.get(name, ()):
                place.copy_(tensor)

    def weights(self) -> dict[str, Tensor]:
        """What `load_weights` takes, as it is now: the engine's own tensors."""
        return {name: places[0] for name, places in self._places().items()}

    def _places(self) -> dict[str, list[Tensor]]:
        """Name -> the tensors that hold it: the host's copy, if there is one, and the live one."""
        live, kept = _tensors(self._base), self._pinned or []
        own = [name for name, _ in (*self._base.named_parameters(), *self._base.named_buffers())]
        places = {}
        for place, name in enumerate(own):
            tensors = [*kept[place : place + 1], live[place].data]
            if kept and not self.awake:
                tensors = tensors[:1]  # the live one is the copy
            places[f"{self._prefix}.{name}"] = tensors
        return places

    def _load(self) -> nn.Module:
        """The base model on the host: rotary tables and other buffers that no file holds are
        computed anew each time.
        """
        options = {"trust_remote_code": self.trust_remote_code}
        config = AutoConfig.from_pretrained(self.model, **options)
        with torch.device("meta"):  # for its classes only
            whole = model_class(config).from_config(config, **options)
        with _loading():
            base, info = type(whole.base_model).from_pretrained(
                self.model,
                config=whole.base_model.config,
                dtype=self.dtype,
                output_loading_info=True,
                attn_implementation=attention_for(config),
            )
        if info["missing_keys"]:  # transformers makes random ones up
            missing = sorted(info["missing_keys"])
            raise RuntimeError(
                f"teacher {self.name}: {self.model} lacks {len(missing)} weights of its base "
                f"model, first {missing[0]}"
            )
        # names in an adapter are those of the causal language model: here without weights around
        # its base
        setattr(whole, whole.base_model_prefix, base)
        self._prefix = whole.base_model_prefix
        for name, directory in self.adapters.items():
            add_teacher_adapter(whole, name, directory, self.dtype)
        return base.eval().requires_grad_(False)

    def _bind(self, values: list[Tensor]) -> None:
        for tensor, value in zip(_tensors(self._base), values, strict=True):
            tensor.data = value


class HFGenerator:
    """A teacher that writes, its head included: for a child process that is gone afterwards."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        trust_remote_code: bool,
        device: torch.device | str = "cpu",
        adapter: str = "",
    ):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        whole = model_class(config).from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            attn_implementation=attention_for(config),
        )
        # its own would fill in a top_k or a penalty that nobody asked for
        whole.generation_config = GenerationConfig()
        if adapter:
            add_teacher_adapter(whole, "teacher", adapter, whole.dtype)
            use_adapter(whole, "teacher")
        self._model, self.device = whole.to(device).eval(), torch.device(device)
        self._pixels = Pixels(model, trust_remote_code)

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        stop_ids: tuple[int, ...],
        *,
        images: Sequence[PromptImages | None] | None = None,
        max_tokens: int,
        temperature: float,
    ) -> list[Sample]:
        """One response per prompt, without log-probabilities; `temperature=0` is greedy.

        transformers has one random state for a whole batch, so what is sampled is sampled alone,
        from its own seed; and what it makes of images is on the left, where batches are padded.
        """
        images = images or [None] * len(prompts)
        budget = 0 if temperature or any(images) else TOKENS_PER_BATCH
        samples: list[Sample | None] = [None] * len(prompts)
        for indices in batches([len(ids) + max_tokens for ids in prompts], budget):
            torch.manual_seed(seeds[indices[0]])
            written = self._write(
                [prompts[index] for index in indices],
                stop_ids,
                max_tokens,
                temperature,
                images[indices[0]],
            )
            for index, sample in zip(indices, written, strict=True):
                samples[index] = sample
        return samples

    @torch.no_grad()
    def _write(
        self,
        prompts: list[list[int]],
        stop_ids: tuple[int, ...],
        max_tokens: int,
        temperature: float,
        images: PromptImages | None,
    ) -> list[Sample]:
        """`images` are those of a prompt that is alone."""
        longest = max(map(len, prompts))
        ids_BS = torch.tensor(
            [[stop_ids[0]] * (longest - len(ids)) + ids for ids in prompts], device=self.device
        )
        start_B1 = torch.tensor([[longest - len(ids)] for ids in prompts], device=self.device)
        mask_BS = torch.arange(longest, device=self.device) >= start_B1
        options = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {}
        )
        written_BS = self._model.generate(
            ids_BS,
            attention_mask=mask_BS.long(),
            max_new_tokens=max_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            **self._pixels.inputs_of(self._model, [images], longest),
            **options,
        )[:, longest:]
        samples = []
        for ids in written_BS.tolist():
            end = next((t + 1 for t, token in enumerate(ids) if token in stop_ids), None)
            samples.append(Sample(ids[:end], None, stopped=end is not None))
        return samples


def batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices of sequences that share a batch: neighbours in length, at most `budget` tokens with
    their padding.

    A sequence that is longer than the budget has a batch of its own.
    Example: `list(batches([3, 9, 4], 8))` is `[[0, 2], [1]]`.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _tensors(module: nn.Module) -> list[Tensor]:
    """Everything that moves between devices, each once; buffers that no file holds included."""
    return [*module.parameters(), *module.buffers()]


@contextmanager
def _loading():
    """`from_pretrained` for a teacher on the disk, which is loaded at every step: without a word,
    and in this thread.

    transformers 5.19 converts weights to another dtype in threads of its own, whose share of the C
    library's heap `malloc_trim` does not shrink: half of the weights stayed when the engine slept.
    """
    verbosity, shows_bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    in_threads = os.environ.get(ASYNC_LOAD)
    # the checkpoint's head is unexpected, as it has to be
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ[ASYNC_LOAD] = "1"
    try:
        yield
    finally:
        os.environ.pop(ASYNC_LOAD)
        if in_threads is not None:
            os.environ[ASYNC_LOAD] = in_threads
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()


def return_free_memory() -> None:
    """Hands what Python, the C library and PyTorch have freed but kept back to the machine."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # vLLM's engines allocate beside PyTorch


def _read_ahead(model: str) -> None:
    """The kernel reads the weights into its page cache in the background; no process holds them."""
    for path in Path(model).glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
