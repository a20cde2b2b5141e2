"""Which models vLLM runs here, asked of its registry without importing vLLM, which takes seconds.

The registry is a table in a source file: architecture -> module and class. It is read as text. A
module whose imports fail on this machine is refused with the reason; only modules for images and
the like are imported for that, in a process of its own, and only where what they are known to need
is not installed.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

# Tables of vllm 0.32's registry whose classes write text.
GENERATING = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
REMOVED = "_PREVIOUSLY_SUPPORTED_MODELS"  # architecture -> the last version that had it
NEEDS_MORE = re.compile(r"^\s*(from|import) .*\b(vllm\.multimodal|torchvision|torchaudio)\b", re.M)
# Model types that vllm 0.32 and transformers 5.19 were found to compute otherwise
# (scripts/check_families.py): always, on a CPU, or by less than bfloat16 shows (about 2e-4 nats).
OTHERWISE = {"doge": "without its dynamic mask", "jetmoe": "without its experts of attention"}
OTHERWISE_ON_CPU = ("gemma3n", "gemma3n_text")
ROUNDED = {
    "apertus": "its activation has parameters in bfloat16", "bloom": "its GELU, exact or "
                                                                     "approximated",
    **dict.fromkeys(("nemotron_h", "zamba2"), "a lower bound of the time step, applied or not"),
}  # fmt: skip
IMPORT_SECONDS = 300.0  # a cold disk

IMPORT = """
import importlib, sys
try:
    getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
except Exception as error:
    while error.__cause__ is not None:
        error = error.__cause__
    print(f"{type(error).__name__}: {error}")
    sys.exit(3)
"""


def check_vllm_runs(
    flag: str, path: str, model: PreTrainedModel, architectures: list[str] | None, remedy: str
) -> None:
    """ValueError, with the reason, if vLLM cannot run the first of `architectures` that it knows.

    They are those of config.json. Without any it takes the one of the model's type, which is that
    of `model`.

    Nothing is said where vLLM is not installed. Costs milliseconds; a model of images in an
    environment without torchvision costs one import of vLLM.
    """
    tables = _registry()
    if tables is None:
        return
    own = type(model).__name__
    architectures = architectures or [own]
    known = {
        architecture: place
        for table in GENERATING
        for architecture, place in tables.get(table, {}).items()
    }
    runs = next((architecture for architecture in architectures if architecture in known), None)
    if runs is None:
        if _brings_models():
            return
        (named, *_) = architectures
        if own in known or own not in architectures:
            raise ValueError(
                f"{flag} {path}: config.json says architectures {architectures}, of which vLLM "
                f"makes no model that writes "
                f'text; set it to ["{own}"] if the files hold one'
            )
        # as vllm 0.32 asks
        if not (model.is_backend_compatible() or model._can_set_attn_implementation()):
            last = tables.get(REMOVED, {}).get(named)
            since = f" (it did until {last})" if last else ""
            raise ValueError(f"{flag} {path}: vLLM does not run {named}{since}; {remedy}")
        return
    if reason := _why_not_importable(*known[runs]):
        raise ValueError(
            f"{flag} {path}: vLLM cannot run {runs} here ({reason}); install what it needs, or "
            f"{remedy}"
        )


def check_agrees(
    flag: str,
    path: str,
    config: PreTrainedConfig,
    *,
    is_student: bool,
    exact: bool,
    on_gpu: bool,
    tokens: int,
) -> None:
    """ValueError for a model that vllm 0.32 is known to compute otherwise than transformers 5.19,
    or cannot sample for a trainer.

    `exact` is whether it computes in float32, `tokens` the longest prompt and response together.
    What is not known here the judge of the sampler finds (`parity`); nobody judges a teacher.
    """
    config = config.get_text_config()
    family, window = config.model_type, getattr(config, "sliding_window", None)
    other = "choose another model" if is_student else "set `backend: hf` in its entry"
    if family in OTHERWISE:
        raise ValueError(
            f"{flag} {path}: vLLM computes {family} otherwise than its authors "
            f"({OTHERWISE[family]}); {other}"
        )
    if family in OTHERWISE_ON_CPU and not on_gpu:
        raise ValueError(
            f"{flag} {path}: on a CPU vLLM computes {family} otherwise than transformers does; "
            f"{other}"
        )
    if family.startswith("cohere2") and window and tokens > window:
        raise ValueError(
            f"{flag} {path}: beyond its window of {window} tokens vLLM and transformers see other "
            "tokens (vLLM one more); --max_prompt_tokens and --max_response_tokens may be "
            f"{window} together"
        )
    if is_student and family == "gpt_oss":
        raise ValueError(
            f"{flag} {path}: vLLM takes no new weights for gpt_oss while it runs; it can be a "
            "teacher"
        )
    if exact and family in ROUNDED:
        raise ValueError(
            f"{flag} {path}: vLLM and transformers compute {family} with other formulas "
            f"({ROUNDED[family]}), which float32 shows; use --dtype bfloat16, or {other}"
        )


@functools.cache
def takes_adapters(path: str) -> bool:
    """Whether vLLM runs the model in this directory with LoRA adapters, by the class that it takes
    for it: only one that says so itself counts.
    """
    tables, config = _registry(), Path(path) / "config.json"
    if tables is None or not config.is_file():
        return False
    known = {a: place for table in GENERATING for a, place in tables.get(table, {}).items()}
    for architecture in json.loads(config.read_text()).get("architectures") or ():
        if architecture in known:
            module, name = known[architecture]
            file = _vllm() / "model_executor/models" / f"{module}.py"
            classes = ast.walk(ast.parse(file.read_text())) if file.is_file() else ()
            return any(
                isinstance(node, ast.ClassDef)
                and node.name == name
                and any(ast.unparse(base) == "SupportsLoRA" for base in node.bases)
                for node in classes
            )
    return False


@functools.cache
def _registry() -> dict[str, dict] | None:
    """Name of a table -> its content; None without vLLM."""
    root = _vllm()
    if root is None:
        return None
    tables = {}
    for node in ast.parse((root / "model_executor/models/registry.py").read_text()).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Dict)
        ):
            name = node.targets[0].id
            if name in (*GENERATING, REMOVED):
                tables[name] = ast.literal_eval(node.value)
    return tables


def _vllm() -> Path | None:
    found = importlib.util.find_spec("vllm")
    return None if found is None or found.origin is None else Path(found.origin).parent


def _brings_models() -> bool:
    """Whether somebody else's plugin may have told vLLM of more models."""
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    return any(not plugin.value.startswith("vllm.") for plugin in plugins)


@functools.cache
def _why_not_importable(module: str, name: str) -> str | None:
    """The error at the root of a failed import of a class of vLLM's, or None."""
    # vLLM's backend of that name names images' classes too, and imports without them
    if module == "transformers":
        return None
    if (
        importlib.util.find_spec("torchvision") is not None
        and importlib.util.find_spec("torchaudio") is not None
    ):
        return None
    full = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    file = _vllm().parent / full.replace(".", "/")
    sources = file.rglob("*.py") if file.is_dir() else [file.with_suffix(".py")]
    if not any(NEEDS_MORE.search(source.read_text()) for source in sources):
        return None
    command = [sys.executable, "-c", IMPORT, full, name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None  # the engine will say
    if done.returncode == 0:
        return None
    said = (done.stdout if done.returncode == 3 else done.stderr).strip().splitlines()
    return said[-1] if said else f"its import ended with status {done.returncode}"
