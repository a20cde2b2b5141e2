"""The Hugging Face export: a directory that transformers and vLLM load, whole or absent."""

import copy
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from opd.distributed import agree_on_error, rank
from opd.log import warn_once
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
    partitioned. `card` is the text of its README.md, if it is to have one. Raises RuntimeError on
    every rank if rank 0 fails.
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
                if n not in parameters and n not in aliases
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
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (
        *path.parent.glob(f".tmp_{path.name}.*"),
        *path.parent.glob(f".old_{path.name}.*"),
    ):
        shutil.rmtree(leftover, ignore_errors=True)
    tmp, old = (
        path.with_name(f".{kind}_{path.name}.{secrets.token_hex(4)}") for kind in ("tmp", "old")
    )
    own_generation_config = model.generation_config
    try:
        # save_pretrained writes the model's own
        model.generation_config = _storable(generation_config, tokenizer)
        model.save_pretrained(tmp, state_dict=tensors, max_shard_size="5GB")
        tokenizer.save_pretrained(tmp)
        for name in PROCESSOR_FILES:
            if (own := Path(tokenizer.name_or_path) / name).is_file():
                shutil.copyfile(own, tmp / name)
        if card:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        for file in (*tmp.iterdir(), tmp):
            fsync(file)
        if path.exists():
            os.rename(path, old)
        os.rename(tmp, path)
        fsync(path.parent)
    finally:
        model.generation_config = own_generation_config
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
