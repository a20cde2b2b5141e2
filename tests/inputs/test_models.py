"""What is refused before a weight is loaded, with tiny real models and tokenizers."""

import dataclasses
import importlib.util
import json
import math
import shutil
import string
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    DogeConfig,
    Gemma2Config,
    GenerationConfig,
    GptOssConfig,
    GraniteConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
    XGLMConfig,
)

from opd.config import (
    GIB,
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TeacherSpec,
)
from opd.inputs import vllm_models
from opd.inputs.arguments import parse
from opd.inputs.dry_run import dry_run_report
from opd.inputs.models import ModelFacts, check_models, load_tokenizer, read_checked
from opd.inputs.prompts import load_prompts
from opd.inputs.shapes import _divided, check_tensor_parallel, layer_values, read_model
from opd.inputs.vllm_models import check_agrees
from opd.lora_config import LoraConfig
from opd.ops.attention import attention_for
from opd.options import to_dict
from opd.plan.job import Machine, make_job
from opd.plan.planner import make_plan
from opd.plan.view import table
from opd.privilege import PrivilegeConfig
from tests.support.processes import ROOT

TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt "
    "%}<assistant>{% endif %}"
)
SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")
VOCABULARY = (*SPECIAL, *string.ascii_lowercase, "?")


@dataclass(frozen=True)
class Config:
    model: ModelConfig
    teacher: TeacherConfig
    privilege: PrivilegeConfig
    data: DataConfig
    rollout: RolloutConfig
    loss: LossConfig
    batch: BatchConfig
    optim: OptimConfig
    lora: LoraConfig
    run: RunConfig
    teachers: tuple[TeacherSpec, ...] = ()


def save_tokenizer(path: Path, tokens=VOCABULARY, eos="<eos>", chat_template=TEMPLATE) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=eos,
        unk_token="?",
        extra_special_tokens=["<user>", "<assistant>"],
        chat_template=chat_template,
    ).save_pretrained(path)


def tiny(**changes) -> Qwen3Config:
    values = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    return Qwen3Config(**{**values, **changes})


def save_model(path: Path, eos: int | list[int] | None = 1, tokenizer=None, **changes) -> str:
    """A model directory. `eos` goes into the generation config; None writes no such file."""
    model = Qwen3ForCausalLM(tiny(**changes))
    model.generation_config = GenerationConfig(eos_token_id=eos)
    model.save_pretrained(path)
    if eos is None:
        (path / "generation_config.json").unlink()
    save_tokenizer(path, **(tokenizer or {}))
    return str(path)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "student")


def make_config(student: str, teacher: str, *argv: str) -> Config:
    ds_config = ROOT / "ds_configs" / "zero3.json"
    required = (
        f"--data d --output_dir o --ds_config {ds_config} --max_prompt_tokens 24 "
        "--max_response_tokens 40"
    )
    return parse(
        Config,
        ["--student_model", student, "--teacher", f"math={teacher}", *required.split(), *argv],
    )


def error(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and "\n" not in message, message
    return message


def read(config: Config) -> ModelFacts:
    return check_models(config, load_tokenizer(config.model.student_model))


def refusal(student: str, teacher: str, *argv: str) -> str:
    return error(read, make_config(student, teacher, *argv))


# ------------------------------------------------------------------------------ facts of good pairs


def test_facts(student, tmp_path):
    """The teacher is wider, deeper and has a padded vocabulary."""
    teacher = save_model(
        tmp_path / "t",
        hidden_size=32,
        num_hidden_layers=2,
        vocab_size=64,
        max_position_embeddings=128,
    )
    facts = read(make_config(student, teacher))
    assert facts.student.eos_ids == facts.teachers["math"].eos_ids == (1,)
    assert (
        facts.pad_id == 0
        and facts.num_tokens == facts.shared_vocab == facts.student.vocab_size == len(VOCABULARY)
    )
    math = facts.teachers["math"]
    assert (math.vocab_size, math.hidden_size, math.context) == (64, 32, 128)
    assert (facts.student.hidden_size, facts.student.context) == (16, 64)
    for fact in (facts.student, math):
        model = AutoModelForCausalLM.from_pretrained(fact.path)
        assert fact.num_parameters == model.num_parameters()
        assert fact.head_parameters == model.lm_head.weight.numel()


def test_tied_embeddings_count_once(tmp_path):
    path = save_model(tmp_path / "t", tie_word_embeddings=True)
    fact = read(make_config(path, path)).student
    assert fact.num_parameters == AutoModelForCausalLM.from_pretrained(path).num_parameters()


@pytest.mark.parametrize(
    ("generation", "model", "eos_ids"),
    [([1, 5], 1, (1, 5)), (None, [1, 6], (1, 6)), (None, 7, (7,)), (None, None, (1,))],
)
def test_eos_from_generation_config_then_config_then_tokenizer(
    tmp_path, generation, model, eos_ids
):
    path = save_model(tmp_path / "m", eos=generation, eos_token_id=model)
    assert read(make_config(path, path)).student.eos_ids == eos_ids


# ---------------------------------------------------------------------------------------- bad pairs


def test_another_tokenizer_of_the_same_size(student, tmp_path):
    swapped = [*VOCABULARY]
    swapped[10], swapped[11] = swapped[11], swapped[10]
    teacher = save_model(tmp_path / "t", tokenizer={"tokens": swapped})
    message = refusal(student, teacher, "--allow", "eos,template,rendering")
    assert (
        "--teacher math" in message
        and "2 tokens differ, first 'g' (id 11, the student's 10)" in message
    )


def add_tokens(path: str, *tokens: str) -> str:
    tokenizer = load_tokenizer(path)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(path)
    return path


def test_added_tokens_that_only_one_of_them_has(student, tmp_path):
    """Their ids are kept for whoever looks at prompts and responses."""
    size = len(VOCABULARY)
    teacher = add_tokens(save_model(tmp_path / "t", vocab_size=64), "<think>")
    (dialect,) = read(make_config(student, teacher)).dialects
    assert (dialect.foreign.ids, dialect.foreign.texts) == ({size}, ("<think>",))
    (dialect,) = read(make_config(teacher, save_model(tmp_path / "u", vocab_size=64))).dialects
    assert (dialect.foreign.ids, dialect.foreign.texts) == ({size}, ())
    one, two = (
        add_tokens(save_model(tmp_path / name, vocab_size=64), *tokens)
        for name, tokens in (("a", ("<a>", "<b>")), ("b", ("<b>", "<c>")))
    )
    (dialect,) = read(make_config(one, two)).dialects
    assert (dialect.foreign.ids, dialect.foreign.texts) == ({size, size + 1}, ("<c>",))
    assert not read(make_config(one, one)).dialects[0].foreign.ids


def test_an_added_token_that_ends_responses(student, tmp_path):
    own = add_tokens(save_model(tmp_path / "s", vocab_size=64), "<|im_end|>")
    teacher = save_model(tmp_path / "t", vocab_size=64)
    read(make_config(own, teacher))
    message = refusal(own, teacher, "--stop_token_ids", "<|im_end|>")
    assert f"another token {len(VOCABULARY)}, or none" in message
    assert "'<|im_end|>', ends or pads responses" in message


def test_a_teacher_without_a_row_for_an_added_token(student, tmp_path):
    own = add_tokens(save_model(tmp_path / "s", vocab_size=64), "<think>")
    assert f"ids up to {len(VOCABULARY)}, its lm_head has {len(VOCABULARY)} rows" in refusal(
        own, student
    )


def test_another_eos(student, tmp_path):
    teacher = save_model(tmp_path / "t", eos=[3])
    message = refusal(student, teacher)
    assert "its EOS is ['<assistant>'], the student's is ['<eos>']" in message
    assert message.endswith("accept it with --allow math=eos") and "stop_token" not in message
    facts = read(make_config(student, teacher, "--allow", "math=eos"))
    assert facts.student.eos_ids == (1,) and facts.teachers["math"].eos_ids == (3,)


def test_a_teacher_that_ends_at_more_tokens_than_a_base_student(student, tmp_path):
    """As Qwen3 to Qwen3-Base. The tokens that it ends at too may be given by id or name."""
    teacher = save_model(tmp_path / "t", eos=[3, 1])
    assert "let responses end there too with --stop_token_ids 3, or choose" in refusal(
        student, teacher
    )
    for values in (["3"], ["<assistant>"], ["3", "<assistant>", "1"]):
        facts = read(make_config(student, teacher, "--stop_token_ids", *values))
        assert facts.student.eos_ids == (1, 3) and facts.own_eos_ids == (1,)
        assert facts.stop_ids == (3,)
    # more than the teacher's own is the user's choice, and no mismatch
    facts = read(make_config(student, teacher, "--stop_token_ids", "3", "z"))
    assert facts.student.eos_ids == (1, 3, load_tokenizer(student).get_vocab()["z"])


@pytest.mark.parametrize("value", ["999", "ab", "", "-1"])
def test_stop_tokens_that_are_none(student, value):
    message = refusal(student, student, f"--stop_token_ids={value}")
    assert f"--stop_token_ids {value!r}: not one token of the student's tokenizer" in message


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_context(student, tmp_path, who):
    short = save_model(tmp_path / "short", max_position_embeddings=63)
    message = refusal(*((short, student) if who == "student" else (student, short)))
    assert "--max_prompt_tokens 24 + --max_response_tokens 40" in message and "63 tokens" in message
    assert ("--student_model" if who == "student" else "--teacher math") in message


def test_a_tokenizer_that_is_larger_than_the_model(tmp_path):
    path = save_model(tmp_path / "m", vocab_size=20)
    assert f"ids up to {len(VOCABULARY) - 1}" in refusal(path, path)


@pytest.mark.parametrize(
    ("eos", "message"),
    [
        (99, f"EOS token [99] is not one of its {len(VOCABULARY)} tokens"),
        ([], "has no EOS token; name one in its generation"),
    ],
)
def test_an_eos_that_is_no_token(tmp_path, eos, message):
    path = save_model(
        tmp_path / "m", eos=eos, eos_token_id=None, tokenizer={"eos": None} if eos == [] else None
    )
    assert message in refusal(path, path)


# ----------------------------------------------------------------------- models that cannot be used

SMALL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}


ENCODER = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, head_dim=8),
        CohereConfig(**SMALL),
        GraniteConfig(**SMALL, logits_scaling=8.0),
        PhiConfig(**SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_heads_with_a_bias_a_scale_or_a_soft_cap_are_fine(student, tmp_path, config):
    """What the head and its form express, in student and teacher; tests/ops/test_heads.py shows
    that they do.
    """
    shutil.copytree(student, tmp_path / "m")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    facts = read(make_config(str(tmp_path / "m"), str(tmp_path / "m")))
    assert facts.student.vocab_size == facts.teachers["math"].vocab_size == len(VOCABULARY)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RecurrentGemmaConfig(**SMALL), "logits_soft_cap = 30.0"),
        (Qwen3Config(**SMALL, logit_scale=0.5), "logit_scale = 0.5"),
        (BertConfig(**ENCODER), "cls.predictions.transform.dense.weight"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_logits_that_hidden_states_and_head_do_not_give(student, tmp_path, config, message, who):
    shutil.copytree(student, tmp_path / "m")
    config.save_pretrained(tmp_path / "m")
    odd = str(tmp_path / "m")
    found = refusal(*((odd, student) if who == "student" else (student, odd)))
    assert message in found and config.model_type in found and odd in found and "choose a" in found
    assert found.startswith("--student_model" if who == "student" else "--teacher math")


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(
            vocab_size=len(VOCABULARY), hidden_size=16, n_layer=1, n_head=2, eos_token_id=1
        ),
        GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    ],
    ids=lambda config: config.model_type,
)
def test_families_without_the_attention_that_is_asked_for(student, tmp_path, config):
    """The student's is the user's choice; a teacher of backend hf takes what its class has."""
    shutil.copytree(student, tmp_path / "m")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    odd = str(tmp_path / "m")
    message = refusal(odd, odd, "--attn_implementation", "sdpa", "--allow", "eos")
    assert message.startswith(
        f"--attn_implementation sdpa: not for --student_model {odd}; choose auto or eager"
    )
    for attention in ("auto", "eager"):
        read_checked("--student_model", odd, False, attn_implementation=attention)
    read(make_config(student, odd, "--teacher_backend", "hf"))


def test_an_attention_that_leaves_out_a_part_of_the_model(student, tmp_path):
    """PyTorch's own does not know the soft-cap of Gemma 2, and says nothing."""
    shutil.copytree(student, tmp_path / "m")
    config = Gemma2Config(**SMALL, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    odd = str(tmp_path / "m")
    message = refusal(odd, odd, "--attn_implementation", "sdpa")
    assert (
        "leaves out the soft-cap of gemma2 (attn_logit_softcapping = 50.0)" in message
        and "choose auto" in message
    )
    assert attention_for(config) == "eager" and attention_for(config, "eager") == "eager"
    assert attention_for(Gemma2Config(attn_logit_softcapping=None)) is None
    read(make_config(odd, odd))


def test_flash_attention_where_it_is_usable(monkeypatch):
    """It needs a GPU, so that it is installed is pretended; what decides on it is real."""
    half, qwen = torch.bfloat16, Qwen3Config(**SMALL)
    assert attention_for(qwen, dtype=half) is None, "not here"
    monkeypatch.setattr("opd.ops.attention.is_flash_attn_2_available", lambda: True)
    assert attention_for(qwen, dtype=half) == "flash_attention_2"
    assert attention_for(qwen, "sdpa", half) == "sdpa", "what is asked for stays"
    assert attention_for(qwen) is None and attention_for(qwen, dtype=torch.float32) is None
    wide = Qwen3Config(**SMALL, head_dim=512)
    assert attention_for(wide, dtype=half) is None, "its kernels end at 256"
    # it knows the soft-cap; gpt-oss has sinks, for which it has a kernel of its own
    assert attention_for(Gemma2Config(**SMALL, head_dim=8), dtype=half) == "flash_attention_2"
    assert attention_for(GptOssConfig(**SMALL, head_dim=8), dtype=half) is None
    assert attention_for(BloomConfig(), dtype=half) is None, "it has no flash attention"


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (
            BloomConfig(
                vocab_size=len(VOCABULARY), hidden_size=16, n_layer=1, n_head=2, eos_token_id=1
            ),
            [],
            "bfloat16",
        ),
        (
            GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
            [],
            "it can be a teacher",
        ),
        (
            Cohere2Config(**SMALL, head_dim=8, sliding_window=16),
            ["--max_prompt_tokens", "16"],
            "window of 16 tokens",
        ),
    ],
    ids=["bloom", "gpt_oss", "cohere2"],
)
def test_students_whose_sampler_is_known_to_differ(student, tmp_path, config, flags, message):
    shutil.copytree(student, tmp_path / "m")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    odd = str(tmp_path / "m")
    found = refusal(odd, odd, *flags)
    assert message in found and odd in found and "\n" not in found


def test_teachers_that_vllm_computes_otherwise(student, tmp_path):
    """Nobody judges a teacher; transformers runs it right."""
    shutil.copytree(student, tmp_path / "m")
    config = DogeConfig(**SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    odd = str(tmp_path / "m")
    found = refusal(student, odd)
    assert (
        found.startswith("--teacher math")
        and "without its dynamic mask" in found
        and "`backend: hf`" in found
    )
    read(make_config(student, odd, "--teacher_backend", "hf"))
    options = {"is_student": False, "exact": True, "tokens": 8}
    config = AutoConfig.for_model("gemma3n_text")
    with pytest.raises(ValueError, match="on a CPU"):
        check_agrees("--teacher", "t", config, on_gpu=False, **options)
    check_agrees("--teacher", "t", config, on_gpu=True, **options)
    config = AutoConfig.for_model("zamba2")
    with pytest.raises(ValueError, match="bfloat16, or set `backend: hf`"):
        check_agrees("--teacher", "t", config, on_gpu=True, **options)
    check_agrees("--teacher", "t", config, on_gpu=True, **options | {"exact": False})


def test_a_path_that_vllm_takes_for_a_pattern(student, tmp_path):
    odd = str(shutil.copytree(student, tmp_path / "m[1]"))
    assert (
        refusal(odd, student)
        == f"--student_model {odd}: vLLM takes [, * and ? in a path for a pattern; rename the "
        f"directory"
    )
    read(make_config(student, odd, "--teacher_backend", "hf"))


def test_an_attention_that_nobody_has(student):
    message = refusal(student, student, "--attn_implementation", "quick")
    assert (
        message.startswith("--attn_implementation quick: not for --student_model")
        and "choose" in message
    )


# ---------------------------------------------------------------------- models that vLLM cannot run


def test_architectures_of_the_configuration(student, tmp_path):
    """vLLM takes its class from there, transformers from the model type."""
    shutil.copytree(student, tmp_path / "m")
    path = str(tmp_path / "m")
    for names in (["Qwen3Model"], ["Qwen3ForSequenceClassification"], ["QwenForCausalLM"]):
        edit_json(tmp_path / "m" / "config.json", architectures=names)
        for message in (refusal(path, student), refusal(student, path)):
            assert (
                f"architectures {names}" in message and 'set it to ["Qwen3ForCausalLM"]' in message
            )
        read(make_config(student, path, "--teacher_backend", "hf"))
    for names in (["Qwen3ForCausalLM"], ["Qwen3Model", "Qwen3ForCausalLM"], None, []):
        edit_json(tmp_path / "m" / "config.json", architectures=names)
        read(make_config(path, path))


def test_a_family_that_vllm_does_not_know(student, tmp_path):
    config = XGLMConfig(
        vocab_size=len(VOCABULARY),
        d_model=16,
        ffn_dim=32,
        num_layers=1,
        attention_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=0,
        max_position_embeddings=64,
    )
    shutil.copytree(student, tmp_path / "m")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    path, eager = str(tmp_path / "m"), ("--attn_implementation", "eager")
    assert "vLLM does not run XGLMForCausalLM; choose another model" in refusal(
        path, student, *eager
    )
    assert "or `backend: hf` in its entry" in refusal(student, path)
    read(make_config(student, path, "--teacher_backend", "hf"))


def test_reasons_why_vllm_cannot_run_a_class_here():
    """A module is imported, in another process, only if it reads images and what they need is not
    installed.
    """
    needs = importlib.util.find_spec("torchvision") is None
    started = time.monotonic()
    assert vllm_models._why_not_importable("qwen3", "Qwen3ForCausalLM") is None
    assert vllm_models._why_not_importable("transformers", "TransformersForCausalLM") is None
    assert time.monotonic() - started < 2, "no import"
    if needs:
        assert "No module named 'torchvision'" in vllm_models._why_not_importable(
            "qwen3_5", "Qwen3_5ForCausalLM"
        )


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="what it needs is installed"
)
def test_a_class_whose_imports_fail_is_refused_with_the_reason(student, tmp_path):
    shutil.copytree(student, tmp_path / "m")
    config = Qwen3_5TextConfig(
        **SMALL, head_dim=8, layer_types=["full_attention"], max_position_embeddings=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    message = refusal(str(tmp_path / "m"), student)
    assert message.startswith(
        f"--student_model {tmp_path / 'm'}: vLLM cannot run Qwen3_5ForCausalLM here "
        "(ModuleNotFoundError: "
    )
    assert "'torchvision'" in message and "choose another model" in message
    read(make_config(student, str(tmp_path / "m"), "--teacher_backend", "hf"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_checkpoint_is_refused(student, tmp_path, file):
    shutil.copytree(student, tmp_path / "t")
    edit_json(tmp_path / "t" / file, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "t" / "evil.py").write_text("raise SystemExit('ran')\n")
    for call in (
        lambda: refusal(student, str(tmp_path / "t")),
        lambda: error(load_tokenizer, str(tmp_path / "t")),
    ):
        assert "auto_map" in (message := call()) and "--trust_remote_code" in message


def break_missing_directory(path: Path) -> None:
    shutil.rmtree(path)


def break_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def break_no_config(path: Path) -> None:
    (path / "config.json").unlink()


def break_model_type(path: Path) -> None:
    edit_json(path / "config.json", model_type="no-such-model")


def break_encoder(path: Path) -> None:
    edit_json(path / "config.json", model_type="vit")


def break_no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def break_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")


def break_no_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def break_shard(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-2-of-2.safetensors"}})
    )


def break_weights(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, path / "model.safetensors")


def break_generation_config(path: Path) -> None:
    (path / "generation_config.json").write_text("{")


def wrong(file: str, content: str):
    return lambda path: (path / file).write_text(content)


def wrong_key(file: str, **changes):
    return lambda path: edit_json(path / file, **changes)


def break_vocabulary(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {}
    (path / "tokenizer.json").write_text(json.dumps(content))


def break_link(path: Path) -> None:
    (path / "generation_config.json").unlink(missing_ok=True)
    (path / "generation_config.json").symlink_to("generation_config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing_directory, "no such model directory"),
        (break_config, "config.json"),
        (break_no_config, "config.json"),
        (break_model_type, "no-such-model"),
        (break_encoder, "cannot load its architecture"),
        (break_no_tokenizer, "no tokenizer"),
        (break_tokenizer, "tokenizer"),
        (break_no_weights, "no .safetensors weights in the directory; convert the .bin files"),
        (break_shard, "1 of 1 weight files are missing, first model-2-of-2.safetensors"),
        (break_generation_config, "generation_config.json"),
        (break_link, "generation_config.json"),
        (wrong("generation_config.json", "[1]"), "generation_config.json"),
        (wrong("generation_config.json", "null"), "generation_config.json"),
        (wrong("generation_config.json", '{"eos_token_id": ["1"]}'), "its eos_token_id is ['1']"),
        (wrong("generation_config.json", '{"eos_token_id": 1.0}'), "its eos_token_id is 1.0"),
        (
            wrong("generation_config.json", '{"eos_token_id": [1, null]}'),
            "its eos_token_id is [1, None]",
        ),
        (wrong("tokenizer_config.json", "null"), "tokenizer"),
        (wrong_key("tokenizer_config.json", model_max_length="x"), "tokenizer"),
        (break_vocabulary, "tokenizer"),
        (break_weights, "1 of 14 weights are not in its files, first model.norm.weight"),
    ],
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_damaged_directories_name_the_flag(student, tmp_path, damage, message, who):
    shutil.copytree(student, tmp_path / "m")
    damage(tmp_path / "m")
    damaged = str(tmp_path / "m")
    found = refusal(*((damaged, student) if who == "student" else (student, damaged)))
    assert message in found and damaged in found
    assert found.startswith("--student_model" if who == "student" else "--teacher math")


def test_teachers_that_sleep_on_the_disk(student, tmp_path, monkeypatch):
    disk, hf = ("--teacher_residency", "disk"), ("--teacher_backend", "hf")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = refusal(student, student, *disk)
    assert (
        "--teacher_residency disk" in found
        and "teacher math" in found
        and "--teacher_backend hf" in found
    )
    read(make_config(student, student, *disk, *hf))
    read(make_config(student, student, "--teacher_residency", "gpu"))
    shutil.copytree(student, tmp_path / "t")
    break_no_weights(tmp_path / "t")
    assert "convert the .bin files" in refusal(student, str(tmp_path / "t"), *disk, *hf)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    read(make_config(student, student, *disk))


def test_tensor_parallel_divides_every_layer(student):
    """Layers of 4 and of 6 key-value heads go to 2 GPUs, not to 4."""
    config = tiny(num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=4)
    config.per_layer_config = {1: {"num_key_value_heads": 6, "intermediate_size": 48}}
    shape = dataclasses.replace(
        read(make_config(student, student)).student,
        common_kv_heads=math.gcd(*layer_values(config, "num_key_value_heads")),
        divided=_divided(config),
    )
    assert shape.common_kv_heads == 2
    assert shape.divided == {"attention heads": 12, "intermediate channels": 16}
    assert [n for n in (1, 2, 3, 4, 6) if shape.why_not_shared(n) is None] == [1, 2, 4]
    assert "the 16 intermediate channels of" in shape.why_not_shared(3)


def test_a_file_is_not_a_model(student, tmp_path):
    (tmp_path / "f").write_text("")
    assert "no such model directory" in error(load_tokenizer, str(tmp_path / "f"))
    assert "--teacher x" in error(lambda: load_tokenizer(str(tmp_path / "f"), flag="--teacher x"))


# ------------------------------------------------------------------------------------------ dry run


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Weights of which the disk holds the header alone: the rest of the file is a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [end, end := end + 2 * math.prod(shape)],
        }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_dry_run_report_loads_no_weights(student, tmp_path):
    """Of a model of 800 GB, which is more than this machine can load."""
    model = tmp_path / "m"
    shutil.copytree(student, model)
    large = tiny(
        hidden_size=65536,
        intermediate_size=262144,
        num_hidden_layers=8,
        num_attention_heads=8,
        head_dim=2048,
    )
    large.architectures = ["Qwen3ForCausalLM"]
    large.save_pretrained(model)
    shapes = {
        name: tuple(p.shape)
        for name, p in read_model("--student_model", str(model)).named_parameters()
    }
    write_header(model / "model.safetensors", shapes)
    assert (model / "model.safetensors").stat().st_size > 800e9
    rows = [
        {"data_source": d, "prompt": p}
        for d, p in (("math", "abc"), ("math", "def"), ("code", "xyz"))
    ]
    rows[1]["chat_template_kwargs"] = {"thinking": False}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(str(model), str(model), "--teacher", f"code={model}")
    tokenizer = load_tokenizer(str(model))
    facts = read(config)
    prompts = load_prompts([str(tmp_path / "d.jsonl")], tokenizer, config.data, flag="--data")
    machine = Machine(gpus=2, device_bytes=GIB, host_bytes=GIB, pcie=1e9, is_gpu=True)
    memory = table(make_plan(make_job(config, facts.student, facts.teachers, machine)))
    report = dry_run_report(config, prompts, tokenizer, facts, memory=memory)
    assert (
        "[<user>]abc[<assistant>]<< the response starts here and ends with EOS: <eos> (1) >>"
        in report
    )
    assert "[<user>]xyz[<assistant>]" in report and "def" not in report.split("Prompts:")[1]
    assert yaml.safe_load(report.split("\n\n")[0].removeprefix("Configuration\n")) == to_dict(
        config
    )
    assert (
        "1 rows set 'thinking' in `chat_template_kwargs`, which the chat template does not mention"
        in report
    )
    assert "math 2 (0 over-long)" in report and "2 ranks" in report and "total" in report


def test_a_served_teacher_is_not_read_here(student):
    config = make_config(student, "http://127.0.0.1:9", "--teacher_residency", "disk")
    facts = read(config)
    assert facts.teachers == {} and facts.shared_vocab == facts.student.vocab_size
    check_tensor_parallel(config, facts.student, facts.teachers, 1)
