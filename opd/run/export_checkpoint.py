"""The student of a checkpoint as a Hugging Face directory, on a CPU, without ranks or an engine.

It equals what the run itself exports after that step. The shards say the weights; configuration
and tokenizer are those of the student from which the run began, which `config.yaml` of the run
directory names.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import GenerationConfig

from opd.hub_names import as_named
from opd.inputs.content import content_hash
from opd.inputs.hub import find_snapshot
from opd.inputs.models import load_tokenizer, read_fact, token_ids_of
from opd.inputs.shapes import read_model
from opd.lora_config import LoraConfig
from opd.ops.lora import base_name, file_name, layout_of, merged_layer
from opd.ops.model_class import model_class
from opd.records import checkpoint, export

WRAPPER = "model."  # the student's module holds the model beside its loss


def export_command(argv: Sequence[str]) -> int:
    """Exports the checkpoint in `argv`; returns the exit status, 2 for a mistake."""
    usage = "usage: python -m opd.export CHECKPOINT OUT [--merge_on_export]"
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    merges = "--merge_on_export" in argv
    argv = [argument for argument in argv if argument != "--merge_on_export"]
    if len(argv) != 2:
        print(usage, file=sys.stderr)
        return 2
    try:
        export_checkpoint(Path(argv[0]), Path(argv[1]), merges=merges)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"model: {argv[1]}")
    return 0


def export_checkpoint(path: Path, out: Path, *, merges: bool = False) -> None:
    """Writes the student of the checkpoint `path` to the new directory `out`, whole or not at all.

    Of a student with adapters that is the adapter, or with `merges`, or if the run says so, a whole
    model.

    Host memory: the weights once, in their dtype of training. ValueError with one line if `path` is
    not a whole checkpoint, if the student that it began with is not there any more, or if `out` is
    in use.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"OUT {out}: exists already and is not empty; choose another")
    manifest = checkpoint.check_whole(path, "CHECKPOINT")
    run_config = _config_of(path)
    named, trust = run_config["student_model"], run_config["trust_remote_code"]
    student = find_snapshot("--student_model", named)
    tokenizer = load_tokenizer(student, trust)
    if content_hash(student) != manifest["fingerprint"]["student"]:
        raise ValueError(
            f"--student_model {named}: not the model that {path} began with; put that one back"
        )
    fact = read_fact("--student_model", student, tokenizer, trust, vllm=False)
    model = read_model("--student_model", student, trust)

    # its shards name DeepSpeed's classes, and DeepSpeed looks for an accelerator when it is found
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from opd.engines.shards import Shards

    shards = Shards(path)
    model.config.dtype = shards.dtype
    found = (*shards.parameters(), *shards.buffers())
    tensors = {name.removeprefix(WRAPPER): tensor for name, tensor in found}
    lora = _lora_of(run_config)
    layout = layout_of(model, lora)
    if merges and layout is None:
        raise ValueError(f"--merge_on_export: {path} has no adapter; leave it out")
    generation_config = _generation_config(student, model)
    more = token_ids_of(run_config.get("stop_token_ids") or [], tokenizer)
    generation_config.eos_token_id = list(dict.fromkeys([*fact.eos_ids, *more]))
    try:
        if out.exists():
            out.rmdir()
        if layout is not None and not (merges or lora.merge_on_export):
            buffers = {name.removeprefix(WRAPPER) for name, _ in shards.buffers()}
            adapter = [(file_name(n), t) for n, t in tensors.items() if n not in buffers]
            export.export_adapter(
                out, layout, adapter, tokenizer, generation_config, base=as_named(student)
            )
            return
        tensors |= _frozen(model, student, trust, shards.dtype, set(tensors))
        if layout is not None:
            named = [(base_name(name, layout), tensor) for name, tensor in tensors.items()]
            tensors = dict(merged_layer(named, layout))
        export.export_tensors(out, model, tokenizer, tensors, generation_config)
    except OSError as error:
        raise ValueError(f"OUT {out}: cannot be written: {error}") from None


def _lora_of(run_config: dict[str, Any]) -> LoraConfig:
    """The flags of the run's adapter; runs from before there were any had none."""
    names = (field.name for field in dataclasses.fields(LoraConfig))
    return LoraConfig(**{name: run_config[name] for name in names if name in run_config})


def _frozen(
    model: nn.Module, student: str, trust_remote_code: bool, dtype: torch.dtype, trained: set[str]
) -> dict[str, Tensor]:
    """What was not trained, and so is not in a checkpoint: as the student that the run began with
    has it.
    """
    tied = model.all_tied_weights_keys
    there = trained | {tied[name] for name in trained if name in tied}
    missing = {n for n in model.state_dict() if n not in there and tied.get(n) not in there}
    if not missing:
        return {}
    base = model_class(model.config).from_pretrained(
        student, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return {name: tensor for name, tensor in base.state_dict().items() if name in missing}


def _config_of(path: Path) -> dict[str, Any]:
    """The configuration of the run that a checkpoint lies in."""
    file = path.resolve().parent.parent / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text())
        content["student_model"], content["trust_remote_code"]
        return content
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        raise ValueError(
            f"CHECKPOINT {path}: {file} cannot be read, and says which model it began with; give "
            "the checkpoint in its run directory"
        ) from None


def _generation_config(student: str, model) -> GenerationConfig:
    """As transformers loads it with the model: of its own file, if there is one."""
    try:
        return GenerationConfig.from_pretrained(student)
    except OSError:
        return model.generation_config
