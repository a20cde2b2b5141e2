"""Which tensors the files of a model hold, from the headers of its safetensors.

No weight is read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from opd.log import one_line

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint, as a header describes it."""

    file: Path
    dtype: str  # as safetensors writes it: BF16
    shape: tuple[int, ...]


def weight_files(root: Path) -> list[Path]:
    """The safetensors of the model in `root`, in the order of their names.

    ValueError, without the name of the model, for none, for an index without its files, and where
    transformers and vLLM would read different ones.
    """
    whole, index = root / WHOLE, root / INDEX
    if index.is_file():
        names = _read_index(index)
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(names)} weight files are missing, first {missing[0]}"
            )
        if whole.is_file() and names != [WHOLE]:
            raise ValueError(
                f"holds both {WHOLE} and {INDEX}; remove what is left over from an older export"
            )
        return [root / name for name in names]
    others = sorted(path.name for path in root.glob("*.safetensors") if path.name != WHOLE)
    if not whole.is_file():
        raise ValueError(_nothing_to_read(root, others))
    if others:  # vLLM takes all that it finds
        raise ValueError(f"{others[0]} lies beside {WHOLE}, and vLLM would load both; move it away")
    return [whole]


def _read_index(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cannot load its {INDEX}: {one_line(error)}; fetch the file again"
        ) from None
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its {INDEX} names no files; fetch the file again")
    return names


def _nothing_to_read(root: Path, others: list[str]) -> str:
    if len(others) == 1:
        return f"its weights are in {others[0]}, which no {INDEX} names; rename it to {WHOLE}"
    if others:
        return (
            f"{len(others)} weight files and no {INDEX} that names them, first {others[0]}; fetch "
            "the index too"
        )
    hint = ""
    if any(root.glob("*.bin")):
        hint = "; convert the .bin files with save_pretrained"
    elif any(root.glob("*.gguf")):
        hint = "; give the checkpoint from which the .gguf file was made"
    return f"no .safetensors weights in the directory{hint}"


def read_headers(root: Path) -> dict[str, Stored]:
    """Tensor name -> what the files of the model in `root` say of it.

    ValueError, without the model's name, for broken ones.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(root):
        for name, stored in read_header(path).items():
            if name in found:
                raise ValueError(
                    f"{name} is in {found[name].file.name} and in {path.name}; remove the older "
                    "file"
                )
            found[name] = stored
    index = root / INDEX
    if index.is_file():
        named = json.loads(index.read_text())["weight_map"]
        wrong = [
            name
            for name, file in named.items()
            if name not in found or found[name].file.name != file
        ]
        if wrong:
            raise ValueError(
                f"its {INDEX} names {len(wrong)} tensors that are not where it says, first "
                f"{wrong[0]} in {named[wrong[0]]}; fetch index and files of one export"
            )
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """Of one file; ValueError as above."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ValueError(
                f"{path.name} is a git-lfs pointer, not weights; fetch it with git lfs pull"
            )
        if not start:
            raise ValueError(f"{path.name} is empty; fetch it again")
        # checks that the header accounts for every byte, and reads none
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return {
                name: Stored(path, s.get_dtype(), tuple(s.get_shape()))
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path.name} is not a whole safetensors file ({one_line(error)}); fetch it again"
        ) from None
