"""Adapters as peft and vLLM read them: a directory with `adapter_config.json` and
`adapter_model.safetensors`.
"""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor

from opd.ops.lora import LoraLayout, adapter_config


def write_adapter(
    directory: Path, layout: LoraLayout, tensors: Iterable[tuple[str, Tensor]], **more
) -> None:
    """Writes both files into `directory`. Tensors have the names of an adapter's file; `more` goes
    into its configuration beside what `layout` says, such as `base_model_name_or_path`.
    """
    from peft import LoraConfig as PeftConfig  # takes seconds

    config = PeftConfig(**adapter_config(layout), inference_mode=True, **more)
    config.target_modules = list(layout.short_targets)  # peft makes a set of it, in any order
    config.save_pretrained(directory)
    whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}
    save_file(
        {name: tensor.contiguous() for name, tensor in whole.items()},
        Path(directory) / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def adapter_folder() -> TemporaryDirectory:
    """A place for adapters that live as long as an engine: where a file costs no disk, if there is
    such a place.
    """
    return TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
