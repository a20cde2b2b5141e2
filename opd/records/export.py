"""The Hugging Face export: a directory that transformers and vLLM load, whole or absent."""

import copy
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from opd.distributed import agree_on_error, rank
from opd.engines.adapter_files import write_adapter
from opd.log import warn_once
from opd.ops.lora import LoraLayout
from opd.records.checkpoint import fsync

# What a model that sees has beside its tokenizer; training changes nothing of it.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def export_huggingface(
    path: Path,
    model,
    tokenizer,
    named_tensors: Iterable[tuple[str, Tensor]],
    generation_config,
    *,
    card: str = "",
) -> None:
    """Writes a directory that transformers and vLLM load; an older one at `path` gives way to a
    finished one only.

    Collective: every rank iterates `named_tensors` (under ZeRO-3 the iterator gathers), rank 0
    keeps host copies in the tensors' own dtype. Names are those of `model.named_parameters()`; of
    tied weights either name, or both. `model` is the transformers model; its own parameters may be
    partitioned, or on the meta device if persistent buffers are among the tensors. `card` is the
    text of its README.md, if it is to have one. Raises RuntimeError on every rank if rank 0 fails.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in named_tensors:
        if rank() == 0:
            tensors[name] = tensor.detach().to("cpu", copy=True)
    with agree_on_error(f"export to {path}"):
        if rank() == 0:
            parameters = {name for name, _ in model.named_parameters()}
            aliases = model.all_tied_weights_keys
            buffers = {
                n: b.cpu()
                for n, b in model.state_dict().items()
                if n not in parameters and n not in aliases and n not in tensors
            }
            export_tensors(Path(path), model, tokenizer, tensors | buffers, generation_config, card)


def _one_name(model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor per tied group, under the name that loaders expect."""
    result = dict(tensors)
    for alias, source in model.all_tied_weights_keys.items():
        if alias in result:
            tensor = result.pop(alias)
            result.setdefault(source, tensor)
    names = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    assert names == result.keys(), (
        f"names differ from the model's: {sorted(names ^ result.keys())[:4]}"
    )
    return result


def export_tensors(
    path: Path, model, tokenizer, tensors: dict[str, Tensor], generation_config, card: str = ""
) -> None:
    """Writes the directory from parameters and persistent buffers by name; `model` may be on the
    meta device. On one rank.
    """
    tensors = _one_name(model, tensors)
    own_generation_config = model.generation_config
    try:
        # save_pretrained writes the model's own
        model.generation_config = _storable(generation_config, tokenizer)
        with _whole_directory(path) as tmp:
            model.save_pretrained(tmp, state_dict=tensors, max_shard_size="5GB")
            _write_companions(tmp, tokenizer, card)
    finally:
        model.generation_config = own_generation_config


def export_adapter(
    path: Path,
    layout: LoraLayout,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer,
    generation_config,
    *,
    base: str,
    card: str = "",
) -> None:
    """Writes a directory that peft and vLLM load as an adapter of the model `base`, a directory or
    a hub id; an older one at `path` gives way to a finished one only. On one rank.

    `tensors` have the names of an adapter's file.
    """
    name, _, revision = base.partition("@")
    if os.path.isdir(base):
        name, revision = os.path.abspath(base), ""
    with _whole_directory(path) as tmp:
        write_adapter(tmp, layout, tensors, base_model_name_or_path=name, revision=revision or None)
        _storable(generation_config, tokenizer).save_pretrained(tmp)
        _write_companions(tmp, tokenizer, card)


def _write_companions(directory: Path, tokenizer, card: str) -> None:
    tokenizer.save_pretrained(directory)
    for name in PROCESSOR_FILES:
        if (own := Path(tokenizer.name_or_path) / name).is_file():
            shutil.copyfile(own, directory / name)
    if card:
        (directory / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _whole_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, which takes the place of `path` when all is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (
        *path.parent.glob(f".tmp_{path.name}.*"),
        *path.parent.glob(f".old_{path.name}.*"),
    ):
        shutil.rmtree(leftover, ignore_errors=True)
    tmp, old = (
        path.with_name(f".{kind}_{path.name}.{secrets.token_hex(4)}") for kind in ("tmp", "old")
    )
    try:
        tmp.mkdir()
        yield tmp
        for file in (*tmp.iterdir(), tmp):
            fsync(file)
        if path.exists():
            os.rename(path, old)
        os.rename(tmp, path)
        fsync(path.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _storable(generation_config, tokenizer):
    """A copy with an EOS token, which stops generation in transformers and vLLM, and that
    transformers will write.
    """
    config = copy.deepcopy(generation_config)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    try:
        config.validate(strict=True)
    # some published models carry sampling hints that transformers refuses to write
    except ValueError as error:
        warn_once(
            "export: generation_config.json keeps the token ids only: "
            f"{' '.join(str(error).split())[:200]}"
        )
        ids = {
            name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        config = type(config)(**ids)
    return config
