"""The models of a run, read and checked before a weight is loaded.

A wrong pair of models is the most expensive mistake of distillation: it shows after hours, as a
curve. Here it costs a second and is one ValueError that names the flag, the value and the remedy.
Only configurations, tokenizers and the headers of weight files are read; of a head that is said to
be the embedding, both.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from opd.config import TeacherSpec
from opd.distributed import resolve_dtype
from opd.inputs.adapters import check_adapter, has_tokenizer
from opd.inputs.dialects import Dialect, check_eos, compare_tokenizers
from opd.inputs.hub import fetch_weights, files_of, models_here
from opd.inputs.lora_rules import check_sampled
from opd.inputs.past import check_steps_back
from opd.inputs.shapes import ModelShape, check_path, head_of, load_part, read_model, shape_of
from opd.inputs.teacher_rules import allowed
from opd.inputs.vllm_models import check_agrees, check_vllm_runs
from opd.inputs.weight_files import check_not_quantised, check_weights
from opd.log import cut, one_line
from opd.lora_config import LoraConfig
from opd.ops.attention import AUTO
from opd.ops.headers import ADAPTER_CONFIG
from opd.ops.heads import find_head, logit_form, weights_beside_the_head
from opd.ops.model_class import placeholder_ids, sees_images


@dataclass(frozen=True, kw_only=True)
class ModelFact(ModelShape):
    """One model: what its configuration says, and what ends its responses."""

    eos_ids: tuple[int, ...]  # generation config, else config, else tokenizer
    sees: bool = False  # it reads images
    placeholder_ids: tuple[int, ...] = ()  # tokens that stand for images and the like


@dataclass(frozen=True)
class ModelFacts:
    """All models of a run."""

    student: ModelFact
    teachers: dict[str, ModelFact]  # by teacher name, without those that are served
    pad_id: int
    # highest token id of the student's tokenizer, plus one
    num_tokens: int
    shared_vocab: int  # rows that every lm_head has
    stop_ids: tuple[int, ...] = ()  # of --stop_token_ids, beside the EOS of the student's own
    dialects: tuple[Dialect, ...] = ()  # of the teachers

    @property
    def own_eos_ids(self) -> tuple[int, ...]:
        """What ends the student's responses without `--stop_token_ids`."""
        return tuple(token for token in self.student.eos_ids if token not in self.stop_ids)


def _config_dict(flag: str, path: str) -> dict[str, Any]:
    """What its config.json holds."""
    check_path(flag, path)
    if (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").is_file():
        remedy = "name its base too, --teacher NAME=BASE+ADAPTER"
        if not flag.startswith("--teacher"):
            remedy = "give a whole model (a LoRA run writes it with --merge_on_export)"
        raise ValueError(f"{flag} {path}: this is a LoRA adapter without its base; {remedy}")
    options = {"local_files_only": Path(path).is_dir()}
    return load_part(
        flag, path, "config.json", lambda: PreTrainedConfig.get_config_dict(path, **options)
    )[0]


def _check_source(flag: str, path: str, trust_remote_code: bool) -> None:
    """Refuses a missing model and a model that brings code along."""
    config_dict = _config_dict(flag, path)
    options = {"local_files_only": Path(path).is_dir()}
    tokenizer_dict = load_part(
        flag, path, "tokenizer", lambda: {**get_tokenizer_config(path, **options)}
    )
    if ("auto_map" in config_dict or "auto_map" in tokenizer_dict) and not trust_remote_code:
        raise ValueError(
            f"{flag} {path}: the model brings its own code (auto_map); read it, then "
            "--trust_remote_code"
        )
    if "model_type" not in config_dict:
        raise ValueError(
            f"{flag} {path}: no config.json with a model_type; give a Hugging Face model directory"
        )


def load_tokenizer(path: str, trust_remote_code: bool = False, *, flag: str = "--student_model"):
    """The tokenizer of a model directory or hub id."""
    _check_source(flag, path, trust_remote_code)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": Path(path).is_dir()}

    def load():
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        _try_out(tokenizer)
        return tokenizer

    tokenizer = load_part(flag, path, "tokenizer", load)
    is_local = Path(path).is_dir()
    # transformers 5 builds an empty tokenizer from the model type alone where a directory holds
    # none.
    if is_local and not any(
        p.name.startswith(("tokenizer", "vocab", "spiece")) for p in Path(path).iterdir()
    ):
        raise ValueError(
            f"{flag} {path}: the directory holds no tokenizer; save it there with save_pretrained"
        )
    return tokenizer


def _try_out(tokenizer) -> None:
    """What is wrong with it may show only here."""
    special = set(tokenizer.all_special_tokens)
    tokenizer(next((t for t in tokenizer.get_vocab() if t not in special), "a"))


def _tokenizer_of(flag: str, adapter: str, base):
    """The tokenizer that lies beside an adapter, of the base's class: no config.json is there."""

    def load():
        tokenizer = type(base).from_pretrained(adapter, local_files_only=True)
        _try_out(tokenizer)
        return tokenizer

    return load_part(flag, adapter, "tokenizer", load)


def _eos_ids(flag: str, path: str, model_config: PreTrainedConfig, tokenizer) -> tuple[int, ...]:
    generation, file = None, Path(path) / "generation_config.json"
    try:
        generation = GenerationConfig.from_pretrained(path).eos_token_id
    # many base models have no such file, but a broken one must not pass for none
    except Exception as error:
        if not isinstance(error, OSError) or file.exists() or file.is_symlink():
            reason = f"cannot load its generation_config.json: {one_line(error)}"
            raise ValueError(f"{flag} {path}: {reason}") from None
    candidates = (generation, model_config.get_text_config().eos_token_id, tokenizer.eos_token_id)
    eos = next((e for e in candidates if e is not None and e != []), [])
    ids = eos if isinstance(eos, list | tuple) else [eos]
    if not all(type(token) is int for token in ids):
        raise ValueError(
            f"{flag} {path}: its eos_token_id is {cut(eos)}; it must be a token id or a list of "
            "them"
        )
    return tuple(ids)


def token_ids_of(values: Sequence[str], tokenizer) -> tuple[int, ...]:
    """The ids of `--stop_token_ids`, each once."""
    vocab, found = tokenizer.get_vocab(), []
    known = set(vocab.values())
    for value in values:
        if value in vocab and not value.isdecimal():
            ids = [vocab[value]]
        elif value.isdecimal():
            ids = [int(value)]
        else:  # text that a byte-level vocabulary spells in its own way
            ids = tokenizer(value, add_special_tokens=False)["input_ids"] if value else []
        if len(ids) != 1 or ids[0] not in known:
            raise ValueError(
                f"--stop_token_ids {cut(value)}: not one token of the student's tokenizer; give an "
                "id of it, or a token such as <|im_end|>"
            )
        found += ids
    return tuple(dict.fromkeys(found))


def _check_head(flag: str, path: str, model: torch.nn.Module) -> None:
    """Scores are computed from hidden states and the head; a model that does more would be scored
    wrongly, in silence.
    """
    head_of(model, flag, path)
    try:
        logit_form(model.config)
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from None
    if names := weights_beside_the_head(model):
        raise ValueError(
            f"{flag} {path}: {model.config.model_type} has weights between its hidden states and "
            f"its lm_head ({names[0]}), which scores from hidden states do not reproduce; choose a "
            "causal language model without them"
        )


def read_checked(
    flag: str,
    path: str,
    trust_remote_code: bool,
    *,
    vllm: bool = True,
    attn_implementation: str = AUTO,
) -> torch.nn.Module:
    """The model at `path` on the meta device, when its files hold all of it and its scores can be
    computed; else ValueError.

    With `vllm` it is also one that vLLM runs. Where a snapshot of the hub has no weights yet, their
    headers are checked.
    """
    content = _config_dict(flag, path)
    is_teacher = flag.startswith("--teacher")
    served = ", or serve it with vLLM and give its URL" if is_teacher else ""
    check_not_quantised(flag, path, content, f"give its bfloat16 checkpoint{served}")
    model = read_model(flag, path, trust_remote_code, attn_implementation=attn_implementation)
    _check_head(flag, path, model)
    if root := files_of(flag, path):
        _check_files(flag, path, root, model, vllm)
    if vllm:
        if set(path) & set("[*?"):
            raise ValueError(
                f"{flag} {path}: vLLM takes [, * and ? in a path for a pattern; rename the "
                "directory"
            )
        other = "choose another model" + (", or `backend: hf` in its entry" if is_teacher else "")
        check_vllm_runs(flag, path, model, content.get("architectures"), other)
    return model


def _check_files(flag: str, path: str, root: Path, model: torch.nn.Module, vllm: bool) -> None:
    check_weights(flag, path, root, model, vllm=vllm)
    try:
        find_head(str(root))
    except ValueError as error:
        raise ValueError(f"{flag} {str(error).replace(str(root), path)}") from None


def fetch_models(config) -> None:
    """Downloads the weights of models of the hub, where the cache lacks them, and checks the files
    themselves.
    """
    flags = models_here(config)
    by_hf = {t.model for t in config.teachers if t.backend == "hf"} - {config.model.student_model}
    trust = config.model.trust_remote_code
    for path in fetch_weights(flags):
        flag = flags[path]
        model = read_model(flag, path, trust)
        _check_files(flag, path, Path(path), model, path not in by_hf)


def read_fact(
    flag: str, path: str, tokenizer, trust_remote_code: bool, *, vllm: bool = True
) -> ModelFact:
    """Of the model at `path`. ValueError as `read_checked` says, and if it has no EOS."""
    return _fact_of(read_checked(flag, path, trust_remote_code, vllm=vllm), flag, path, tokenizer)


def _fact_of(
    model: torch.nn.Module, flag: str, path: str, tokenizer, lora: LoraConfig | None = None
) -> ModelFact:
    shape = shape_of(model, flag, path, lora)
    eos_ids = _eos_ids(flag, path, model.config, tokenizer)
    if not eos_ids:
        raise ValueError(
            f"{flag} {path}: has no EOS token; name one in its generation_config.json "
            "(eos_token_id)"
        )
    if not all(0 <= e < shape.vocab_size for e in eos_ids):
        raise ValueError(
            f"{flag} {path}: EOS token {list(eos_ids)} is not one of its {shape.vocab_size} tokens"
        )
    return ModelFact(
        **vars(shape),
        eos_ids=eos_ids,
        sees=sees_images(model.config),
        placeholder_ids=placeholder_ids(model.config),
    )


def _check_residency(config) -> None:
    """vllm 0.32 keeps its weights on a CPU, whatever it is told; a user who has not the memory must
    not find that out late.
    """
    for spec in config.teachers:
        if (
            config.teacher.teacher_residency == "disk"
            and spec.backend == "vllm"
            and not torch.cuda.is_available()
        ):
            raise ValueError(
                "--teacher_residency disk: on a CPU vLLM gives no memory back, and teacher "
                f"{spec.name} runs on it; set --teacher_backend hf, or `backend: hf` in its entry"
            )


def check_models(config, tokenizer) -> ModelFacts:
    """Reads the student and the teachers of a script's Config, each once, and checks them against
    each other; ValueError on the first mistake.

    `tokenizer` is the student's. A served teacher is asked for its tokenizer and context when the
    servers are.
    """
    _check_residency(config)
    student = _read("--student_model", config.model.student_model, tokenizer, config)
    check_sampled(config, student, sees=student.sees)
    own_eos = student.eos_ids
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else own_eos[0]
    stop_ids = tuple(
        token
        for token in token_ids_of(config.rollout.stop_token_ids, tokenizer)
        if token not in own_eos
    )
    student = dataclasses.replace(student, eos_ids=(*own_eos, *stop_ids))
    _check_sizes(student, tokenizer, config)
    teachers: dict[str, ModelFact] = {}
    dialects: list[Dialect] = []
    for spec in config.teachers:
        if spec.is_served:
            continue
        flag = f"--teacher {spec.name}"
        own = load_tokenizer(spec.model, config.model.trust_remote_code, flag=flag)
        width = 2 if resolve_dtype(config.model.dtype) == torch.bfloat16 else 4
        check_steps_back(spec, student.num_parameters * width)
        if has_tokenizer(spec.adapter):
            own = _tokenizer_of(f"{flag}: adapter", spec.adapter, own)
        teachers[spec.name] = fact = _read(flag, spec.model, own, config, teacher=spec)
        used = (*student.eos_ids, pad_id)
        dialect = dialect_of(config, spec, own, tokenizer, used)
        check_eos(dialect, tokenizer, fact.eos_ids, own_eos, student.eos_ids)
        dialects.append(dialect)
        # one for text alone need not have the tokens that stand for images
        _check_sizes(fact, own if student.sees and not fact.sees else tokenizer, config)
    return ModelFacts(
        student,
        teachers,
        pad_id,
        _num_tokens(tokenizer),
        min(fact.vocab_size for fact in (student, *teachers.values())),
        stop_ids,
        tuple(dialects),
    )


def dialect_of(config, spec: TeacherSpec, theirs, tokenizer, used: Collection[int]) -> Dialect:
    """Of a teacher with a tokenizer here; ValueError if that is none for the student."""
    flag = f"--teacher {spec.name} {spec.model}"
    foreign = compare_tokenizers(flag, theirs, tokenizer, used)
    return Dialect(spec.name, flag, allowed(spec, config.teacher), foreign, theirs)


def _read(
    flag: str, path: str, tokenizer, config, *, teacher: TeacherSpec | None = None
) -> ModelFact:
    """The facts of the student, or of a teacher that runs here."""
    vllm = teacher is None or teacher.backend == "vllm"
    model = read_checked(
        flag,
        path,
        config.model.trust_remote_code,
        vllm=vllm,
        attn_implementation=config.model.attn_implementation if teacher is None else AUTO,
    )
    fact = _fact_of(model, flag, path, tokenizer, config.lora if teacher is None else None)
    if teacher is not None:
        fact = dataclasses.replace(fact, **check_adapter(teacher, model))
    if vllm:
        tokens = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        _check_agrees(config, flag, path, model.config, tokens, is_student=teacher is None)
    return fact


def _check_agrees(
    config, flag: str, path: str, model_config: PreTrainedConfig, tokens: int, *, is_student: bool
) -> None:
    dtype, on_gpu = config.model.dtype, torch.cuda.is_available()
    exact = dtype == "float32" or (dtype == "auto" and not on_gpu)
    check_agrees(
        flag, path, model_config, is_student=is_student, exact=exact, on_gpu=on_gpu, tokens=tokens
    )


def check_long_teacher(config, spec: TeacherSpec, tokens: int) -> None:
    """ValueError where vLLM computes otherwise than transformers with so many tokens, more than the
    student's.
    """
    if spec.backend == "vllm":
        flag = f"--teacher {spec.name}"
        model = read_model(flag, spec.model, config.model.trust_remote_code)
        _check_agrees(config, flag, spec.model, model.config, tokens, is_student=False)


def check_context(model: ModelShape, config) -> None:
    """The model has a position for every token of the longest response; ValueError otherwise."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    if model.context is not None and prompt + response > model.context:
        raise ValueError(
            f"--max_prompt_tokens {prompt} + --max_response_tokens {response}: over the context of "
            f"{model.flag} {model.path}, {model.context} tokens; lower them"
        )


def _num_tokens(tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _check_sizes(fact: ModelFact, tokenizer, config) -> None:
    """The model has a row for every token of its tokenizer, and a position for every token of the
    longest response.
    """
    num_tokens = _num_tokens(tokenizer)
    if num_tokens > fact.vocab_size:
        raise ValueError(
            f"{fact.flag} {fact.path}: the tokenizer has ids up to {num_tokens - 1}, its lm_head "
            f"has {fact.vocab_size} rows; resize it"
        )
    check_context(fact, config)
