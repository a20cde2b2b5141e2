"""Everything that can be checked before a weight is loaded: models, tokenizers and the run
directory.

A wrong pair of models is the most expensive mistake of distillation: it shows after hours, as a
curve. Here it costs a second and is one ValueError that names the flag, the value and the remedy.
Only configurations, tokenizers and the headers of weight files are read; of a head that is said to
be the embedding, both.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from opd.config import to_dict
from opd.inputs.prompts import PromptSet
from opd.inputs.shapes import check_path, layer_values, load_part, read_model
from opd.inputs.vllm_models import check_agrees, check_vllm_runs
from opd.inputs.weight_files import check_not_quantised, check_weights
from opd.log import cut, one_line
from opd.ops.attention import AUTO
from opd.ops.heads import find_head, logit_form, weights_beside_the_head


@dataclass(frozen=True)
class ModelFact:
    """One model, from its configuration and tokenizer."""

    flag: str  # what error messages call it
    path: str
    eos_ids: tuple[int, ...]  # generation config, else config, else tokenizer
    vocab_size: int  # rows of the lm_head, padding included
    hidden_size: int
    context: int | None  # most positions; None if the model states no limit
    num_parameters: int
    head_parameters: int  # rows times columns of the lm_head
    kv_heads: int
    # what tensor parallelism deals to the GPUs: its name -> how many there are
    divided: dict[str, int]


@dataclass(frozen=True)
class ModelFacts:
    """All models of a run."""

    student: ModelFact
    teachers: dict[str, ModelFact]  # by teacher name
    pad_id: int
    # highest token id of the tokenizer, plus one; ids beyond it are padding of the vocabulary
    num_tokens: int
    shared_vocab: int  # rows that every lm_head has


def _check_source(flag: str, path: str, trust_remote_code: bool) -> None:
    """Refuses a missing model and a model that brings code along."""
    check_path(flag, path)
    options = {"local_files_only": Path(path).is_dir()}
    config_dict, _ = load_part(
        flag, path, "config.json", lambda: PreTrainedConfig.get_config_dict(path, **options)
    )
    tokenizer_dict = load_part(
        flag, path, "tokenizer", lambda: {**get_tokenizer_config(path, **options)}
    )
    if ("auto_map" in config_dict or "auto_map" in tokenizer_dict) and not trust_remote_code:
        raise ValueError(
            f"{flag} {path}: the model brings its own code (auto_map); read it, then "
            f"--trust_remote_code"
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
        special = set(tokenizer.all_special_tokens)
        # what is wrong may show only here
        tokenizer(next((t for t in tokenizer.get_vocab() if t not in special), "a"))
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
            f"them"
        )
    return tuple(ids)


def _check_head(flag: str, path: str, model: torch.nn.Module) -> None:
    """Scores are computed from hidden states and the head; a model that does more would be scored
    wrongly, in silence.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{flag} {path}: {model.config.model_type} has no lm_head; give a causal language model"
        )
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

    With `vllm` it is also one that vLLM runs. The files of a hub id are checked when they are there
    (`check_downloads`).
    """
    check_path(flag, path)
    is_local = Path(path).is_dir()
    content, _ = load_part(
        flag,
        path,
        "config.json",
        lambda: PreTrainedConfig.get_config_dict(path, local_files_only=is_local),
    )
    is_teacher = flag.startswith("--teacher")
    served = ", or serve it with vLLM and give its URL" if is_teacher else ""
    check_not_quantised(flag, path, content, f"give its bfloat16 checkpoint{served}")
    model = read_model(flag, path, trust_remote_code, attn_implementation=attn_implementation)
    _check_head(flag, path, model)
    if is_local:
        _check_files(flag, path, path, model, vllm)
    if vllm:
        if is_local and set(path) & set("[*?"):
            raise ValueError(
                f"{flag} {path}: vLLM takes [, * and ? in a path for a pattern; rename the "
                f"directory"
            )
        other = "choose another model" + (", or `backend: hf` in its entry" if is_teacher else "")
        check_vllm_runs(flag, path, model, content.get("architectures"), other)
    return model


def _check_files(flag: str, path: str, root: str, model: torch.nn.Module, vllm: bool) -> None:
    check_weights(flag, path, Path(root), model, vllm=vllm)
    try:
        find_head(root)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None


def check_downloads(config) -> None:
    """Fetches the models that are given by a hub id, and checks their files as those of a
    directory.
    """
    models = [("--student_model", config.model.student_model, True)]
    models += [
        (f"--teacher {t.name}", t.model, t.backend == "vllm")
        for t in config.teachers
        if not t.is_served
    ]
    for flag, path, vllm in models:
        if not Path(path).is_dir():
            root = snapshot_download(path, allow_patterns=["*.safetensors", "*.json"])
            _check_files(
                flag, path, root, read_model(flag, path, config.model.trust_remote_code), vllm
            )


def read_fact(
    flag: str,
    path: str,
    tokenizer,
    trust_remote_code: bool,
    *,
    vllm: bool = True,
    attn_implementation: str = AUTO,
) -> ModelFact:
    """Of the model at `path`. ValueError as `read_checked` says, and if it has no EOS."""
    model = read_checked(
        flag, path, trust_remote_code, vllm=vllm, attn_implementation=attn_implementation
    )
    model_config = model.config
    head = model.get_output_embeddings()
    eos_ids = _eos_ids(flag, path, model_config, tokenizer)
    text_config = model_config.get_text_config()
    if not eos_ids:
        raise ValueError(
            f"{flag} {path}: has no EOS token; name one in its generation_config.json "
            f"(eos_token_id)"
        )
    if not all(0 <= e < head.weight.shape[0] for e in eos_ids):
        raise ValueError(
            f"{flag} {path}: EOS token {list(eos_ids)} is not one of its {head.weight.shape[0]} "
            f"tokens"
        )
    return ModelFact(
        flag=flag,
        path=path,
        eos_ids=eos_ids,
        vocab_size=head.weight.shape[0],
        hidden_size=head.weight.shape[1],
        context=getattr(text_config, "max_position_embeddings", None),
        num_parameters=sum(p.numel() for p in model.parameters()),
        head_parameters=head.weight.numel(),
        kv_heads=math.gcd(*layer_values(text_config, "num_key_value_heads"))
        or math.gcd(*layer_values(text_config, "num_attention_heads"))
        or 1,
        divided=_divided(text_config),
    )


def _divided(text_config: PreTrainedConfig) -> dict[str, int]:
    """Where layers differ, what divides the number of each of them."""
    sizes = {"num_attention_heads": "attention heads", "intermediate_size": "intermediate channels"}
    return {
        name: math.gcd(*values)
        for key, name in sizes.items()
        if (values := layer_values(text_config, key))
    }


def _check_same_tokenizer(fact: ModelFact, teacher_tokenizer, tokenizer) -> None:
    """Ids must mean the same; how text becomes ids does not matter, since nothing is ever tokenised
    again.
    """
    mine, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if mine == theirs:
        return
    differing = sorted(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
    token = differing[0]
    raise ValueError(
        f"{fact.flag} {fact.path}: its tokenizer is not the student's: {len(differing)} tokens "
        f"differ, first {token!r} (id {theirs.get(token)}, the student's {mine.get(token)}); "
        "choose a teacher of the student's family"
    )


def _check_same_dialect(fact: ModelFact, student: ModelFact, teacher_tokenizer, tokenizer) -> None:
    """EOS and chat template.

    A teacher that ends its turns elsewhere teaches responses that never end.
    """
    remedy = "choose a matching teacher, or accept it with --allow_template_mismatch"
    if set(fact.eos_ids) != set(student.eos_ids):
        theirs, mine = (tokenizer.convert_ids_to_tokens(list(f.eos_ids)) for f in (fact, student))
        raise ValueError(
            f"{fact.flag} {fact.path}: its EOS is {theirs}, the student's is {mine}; {remedy}"
        )
    if teacher_tokenizer.chat_template != tokenizer.chat_template:
        raise ValueError(
            f"{fact.flag} {fact.path}: its chat template is not the student's; {remedy}"
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


def check_models(config) -> ModelFacts:
    """Checks student and teachers of a script's Config against each other; ValueError on the first
    mistake.
    """
    _check_residency(config)
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(config.model.student_model, trust)
    student = read_fact(
        "--student_model",
        config.model.student_model,
        tokenizer,
        trust,
        attn_implementation=config.model.attn_implementation,
    )
    teachers: dict[str, ModelFact] = {}
    for spec in config.teachers:
        if spec.is_served:
            continue  # it is asked for its tokenizer and context when the servers are
        flag = f"--teacher {spec.name}"
        teacher_tokenizer = load_tokenizer(spec.model, trust, flag=flag)
        teachers[spec.name] = fact = read_fact(
            flag, spec.model, teacher_tokenizer, trust, vllm=spec.backend == "vllm"
        )
        _check_same_tokenizer(fact, teacher_tokenizer, tokenizer)
        if not config.teacher.allow_template_mismatch:
            _check_same_dialect(fact, student, teacher_tokenizer, tokenizer)
    models = [student, *teachers.values()]
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    prompt_tokens, response_tokens = (
        config.data.max_prompt_tokens,
        config.rollout.max_response_tokens,
    )
    for fact in models:
        if num_tokens > fact.vocab_size:
            rows = f"its lm_head has {fact.vocab_size} rows"
            raise ValueError(
                f"{fact.flag} {fact.path}: the tokenizer has ids up to {num_tokens - 1}, {rows}; "
                f"resize it"
            )
        if fact.context is not None and prompt_tokens + response_tokens > fact.context:
            raise ValueError(
                f"--max_prompt_tokens {prompt_tokens} + --max_response_tokens {response_tokens}: "
                f"over the context of {fact.flag} {fact.path}, {fact.context} tokens; lower them"
            )
    by_vllm = [
        student,
        *(teachers[t.name] for t in config.teachers if t.name in teachers and t.backend == "vllm"),
    ]
    dtype, on_gpu = config.model.dtype, torch.cuda.is_available()
    for fact in by_vllm:
        check_agrees(
            fact.flag,
            fact.path,
            AutoConfig.from_pretrained(fact.path, trust_remote_code=trust),
            is_student=fact is student,
            exact=dtype == "float32" or (dtype == "auto" and not on_gpu),
            on_gpu=on_gpu,
            tokens=prompt_tokens + response_tokens,
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else student.eos_ids[0]
    return ModelFacts(
        student, teachers, pad_id, num_tokens, min(fact.vocab_size for fact in models)
    )


def check_tensor_parallel(config, facts: ModelFacts, world_size: int) -> None:
    """Every group of ranks is whole, and every rank of it gets an equal part of the model;
    ValueError otherwise.

    Where heads of keys and values are fewer than ranks, vLLM keeps copies of them; it refuses
    numbers without a common measure.
    """
    flag, size = "--rollout_tensor_parallel_size", config.rollout.rollout_tensor_parallel_size
    engines = [(f"{flag} {size}", size, facts.student)]
    for spec in config.teachers:
        if spec.is_served:
            continue
        size = spec.tensor_parallel_size
        engines.append(
            (f"--teacher {spec.name}: tensor_parallel_size {size}", size, facts.teachers[spec.name])
        )
    for flag, size, fact in engines:
        if world_size % size:
            fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
            raise ValueError(
                f"{flag}: does not divide the {world_size} ranks of this run; choose {fitting}"
            )
        for name, count in fact.divided.items():
            if count % size:
                raise ValueError(
                    f"{flag}: does not divide the {count} {name} of {fact.path}; choose a divisor"
                )
        if fact.kv_heads % size and size % fact.kv_heads:
            raise ValueError(
                f"{flag}: neither divides the {fact.kv_heads} key-value heads of {fact.path} nor "
                "is a multiple of them; choose another size"
            )


def _marked(token_ids: list[int], tokenizer) -> str:
    """Text with every special token in brackets."""
    special, parts, text = set(tokenizer.all_special_ids), [], []
    for token_id in [*token_ids, None]:
        if token_id is not None and token_id not in special:
            text.append(token_id)
            continue
        parts.append(tokenizer.decode(text) if text else "")
        parts.append("" if token_id is None else f"[{tokenizer.convert_ids_to_tokens(token_id)}]")
        text = []
    return "".join(parts)


def dry_run_report(
    config, prompt_set: PromptSet, tokenizer, facts: ModelFacts, *, memory: str
) -> str:
    """What a run would do: its configuration, its `memory` as the planner sees it, two prompts as
    the models will.
    """
    eos = ", ".join(f"{tokenizer.convert_ids_to_tokens(e)} ({e})" for e in facts.student.eos_ids)
    firsts = {prompt.domain: prompt for prompt in reversed(prompt_set.prompts)}
    chosen = [firsts[domain] for domain in prompt_set.domains[:2]]
    if len(chosen) < 2:
        chosen = list(prompt_set.prompts[:2])
    prompts = [
        f"--- prompt {p.prompt_id}, domain {p.domain}, {len(p.token_ids)} "
        f"tokens\n{_marked(p.token_ids, tokenizer)}<< the response starts here and ends with EOS: "
        f"{eos} >>"
        for p in chosen
    ]
    rows = ", ".join(
        f"{d} {n} ({prompt_set.overlong.get(d, 0)} over-long)" for d, n in prompt_set.counts.items()
    )
    return "\n\n".join(
        [
            "Configuration\n"
            + yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).rstrip(),
            memory,
            "\n".join(
                [f"Prompts: {rows}; special tokens in brackets", *prompt_set.notes, *prompts]
            ),
        ]
    )
