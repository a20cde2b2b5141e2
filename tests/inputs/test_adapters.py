"""Bad adapters of teachers: each kind is one line that names the teacher, the adapter and what to
do, before a weight is loaded.
"""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import train_mopd
from opd.config import TeacherSpec
from opd.inputs.adapters import check_adapter, engines_of
from opd.inputs.arguments import parse, resolve_teachers
from opd.inputs.hub import with_models
from opd.inputs.models import check_models, load_tokenizer
from opd.inputs.shapes import read_model
from opd.options import to_dict
from tests.support import vision
from tests.support.adapters import LINEAR, make_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return make_adapter(tiny.student, tmp_path_factory.mktemp("adapter") / "good", seed=0)


@pytest.fixture
def copied(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "adapter")


def check(base, directory, **options):
    spec = TeacherSpec("own", str(base), "*", adapter=str(directory), **options)
    return check_adapter(spec, read_model("--teacher own", str(base), False))


def set_config(directory, **changes):
    content = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(content | changes))


def change_weights(directory, change):
    tensors = load_file(directory / WEIGHTS)
    save_file(change(tensors), directory / WEIGHTS)


def first(tensors, part="lora_A"):
    return next(name for name in tensors if part in name)


def without_first(tensors):
    return {name: value for name, value in tensors.items() if name != first(tensors)}


def with_head(tensors):
    return tensors | {"base_model.model.lm_head.weight": torch.zeros(40, 64)}


def in_eight_bits(tensors):
    return {name: value.to(torch.int8) for name, value in tensors.items()}


def as_model(directory):
    (directory / CONFIG).unlink()
    (directory / "config.json").write_text("{}")


def as_bin(directory):
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


def truncate(directory):
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def as_pointer(directory):
    (directory / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


KINDS = {
    "missing": (shutil.rmtree, "no such directory"),
    "a model": (as_model, "it is a model, not an adapter; give it as `model`"),
    "no configuration": (lambda d: (d / CONFIG).unlink(), "the directory holds no adapter_config"),
    "broken configuration": (lambda d: (d / CONFIG).write_text("{"), "cannot load its adapter_con"),
    "a list": (lambda d: (d / CONFIG).write_text("[]"), "holds no settings"),
    "another type": (lambda d: set_config(d, peft_type="LOHA"), "of the type LOHA, only LORA"),
    "no rank": (lambda d: set_config(d, r=0), r"its ranks are \[0\]"),
    "rank": (lambda d: set_config(d, r=1024), "its rank is 1024, vLLM takes up to 512; .*hf"),
    "dora": (lambda d: set_config(d, use_dora=True), "its use_dora is True, .*; merge it"),
    "bias": (lambda d: set_config(d, bias="all"), "its bias is all"),
    "lora bias": (lambda d: set_config(d, lora_bias=True), "its lora_bias is True"),
    "modules to save": (lambda d: set_config(d, modules_to_save=["lm_head"]), "its modules_to_sav"),
    "new tokens": (lambda d: set_config(d, trainable_token_indices=[3]), "trainable_token_indices"),
    "replication": (lambda d: set_config(d, layer_replication=[[0, 1]]), "layer_replication"),
    "activated": (lambda d: set_config(d, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "parameters": (lambda d: set_config(d, target_parameters=["a.b"]), "its target_parameters"),
    "of the future": (lambda d: set_config(d, use_new=True), "its use_new is True"),
    "pissa": (lambda d: set_config(d, init_lora_weights="pissa"), "changes the base too; convert"),
    "head": (lambda d: set_config(d, target_modules=["lm_head"]), "it changes lm_head; teachers"),
    "embedding": (lambda d: set_config(d, target_modules=["embed_tokens"]), "changes .*embed_tok"),
    "norm": (lambda d: set_config(d, target_modules=["norm"]), "peft cannot put it on its base"),
    "unknown target": (lambda d: set_config(d, target_modules=["wqkv"]), "peft cannot put it on"),
    "no file": (lambda d: (d / WEIGHTS).unlink(), "the directory holds no adapter_model.safet"),
    "bin": (as_bin, "convert adapter_model.bin"),
    "truncated": (truncate, "not a whole safetensors file"),
    "empty file": (lambda d: (d / WEIGHTS).write_bytes(b""), "is empty; fetch it again"),
    "pointer": (as_pointer, "is a git-lfs pointer"),
    "not whole": (lambda d: change_weights(d, without_first), "1 of 8 tensors are not in its file"),
    "with a head": (
        lambda d: change_weights(d, with_head),
        "holds base_model.model.lm_head.weight",
    ),
    "quantised": (lambda d: change_weights(d, in_eight_bits), "8 of its tensors are no floating"),
    "rank of the file": (lambda d: set_config(d, r=8), "8 tensors have another shape"),
    "fewer targets": (lambda d: set_config(d, target_modules=["q_proj"]), "have no place in"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_adapter_is_refused_in_one_line(kind, tiny, copied):
    damage, message = KINDS[kind]
    damage(copied)
    with pytest.raises(ValueError, match=message) as caught:
        check(tiny.student, copied)
    said = str(caught.value)
    assert said.startswith(f"--teacher own: adapter {copied}: ") and "\n" not in said


def test_one_of_another_base_is_refused_by_its_shapes(tiny, adapter):
    message = r"have (no place|another shape).*its base is .*student: give that as `model`"
    with pytest.raises(ValueError, match=message):
        check(tiny.addition, adapter)


def test_an_adapter_of_another_method_as_peft_saves_it_is_refused(tiny, tmp_path):
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.student), config).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="of the type IA3, only LORA is known; merge it"):
        check(tiny.student, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": LINEAR, "use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 2}},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
)
def test_a_good_one_is_counted(options, tiny, tmp_path):
    make_adapter(tiny.student, tmp_path, seed=1, **options)
    values = sum(value.numel() for value in load_file(tmp_path / WEIGHTS).values())
    rank = 8 if "rank_pattern" in options else 4
    assert check(tiny.student, tmp_path) == {"adapter_values": values, "adapter_rank": rank}


def test_high_ranks_are_for_hf(tiny, tmp_path):
    make_adapter(tiny.student, tmp_path, seed=1, r=600)
    assert check(tiny.student, tmp_path, backend="hf")["adapter_rank"] == 600


def test_one_that_changes_what_reads_images_is_for_hf(tmp_path):
    """vLLM says so in its log alone, and scores without that part."""
    vision.idefics3(tmp_path / "base")
    for name, targets in (
        ("text", r".*text_model.*\.(q_proj|down_proj)"),
        ("tower", ["q_proj"]),
        ("connector", ["down_proj", "modality_projection.proj"]),
    ):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        get_peft_model(model, LoraConfig(r=4, target_modules=targets)).save_pretrained(
            tmp_path / name
        )
    base = str(tmp_path / "base")
    for name in ("text", "tower", "connector"):
        found = check(base, tmp_path / name, backend="hf")
        assert found["adapter_rank"] == 4
        if name == "text":
            assert check(base, tmp_path / name, backend="vllm") == found
            continue
        with pytest.raises(ValueError, match=r"changes what reads images .*backend: hf"):
            check(base, tmp_path / name, backend="vllm")


def test_a_base_of_another_name_is_warned_of(tiny, copied, capsys):
    set_config(copied, base_model_name_or_path="org/other-8B@main")
    check(tiny.student, copied)
    assert "it was trained on org/other-8B@main; make sure" in capsys.readouterr().err


def test_an_adapter_alone_is_no_model(adapter):
    with pytest.raises(ValueError, match=r"a LoRA adapter without its base; .*BASE\+ADAPTER"):
        load_tokenizer(str(adapter), flag="--teacher own")
    with pytest.raises(ValueError, match="a LoRA adapter without its base; give a whole model"):
        load_tokenizer(str(adapter))


# ---- Entries -------------------------------------------------------------------------------------


def test_the_short_form_names_base_and_adapter(tmp_path):
    (tmp_path / "c++").mkdir()
    specs = resolve_teachers(["a=base+own", f"b={tmp_path}/c++", f"c={tmp_path}/c+++d", "x/y+z"])
    assert [(s.model, s.adapter) for s in specs] == [
        ("base", "own"),
        (f"{tmp_path}/c++", ""),
        (f"{tmp_path}/c++", "d"),
        ("x/y", "z"),
    ]


def config_of(tiny, tmp_path, *teachers, flags=(), yaml=""):
    arguments = ["--student_model", str(tiny.student), "--data", str(tiny.train)]
    arguments += ["--output_dir", str(tmp_path / "run"), "--dtype", "float32", *flags]
    arguments += ["--max_prompt_tokens", "16", "--max_response_tokens", "8"]
    for teacher in teachers:
        arguments += ["--teacher", teacher]
    if yaml:
        (tmp_path / "teachers.yaml").write_text(yaml)
        arguments += ["--config", str(tmp_path / "teachers.yaml")]
    return parse(train_mopd.Config, arguments)


def test_teachers_of_one_base_are_one_engine(tiny, tmp_path, adapter):
    link = tmp_path / "link"
    link.symlink_to(tiny.student)
    cfg = config_of(
        tiny,
        tmp_path,
        f"a={tiny.student}+{adapter}",
        f"b={tiny.addition}",
        f"c={link}",
        "d=self@0",
        "e=self@-1",
        "f=self@ema:.9",
    )
    cfg = with_models(cfg, {})
    groups = {name: [s.name for s in specs] for name, specs in engines_of(cfg.teachers).items()}
    assert groups == {"a": ["a", "c", "d"], "b": ["b"], "e": ["e"], "f": ["f"]}
    assert [s.backend for s in cfg.teachers] == ["vllm"] * 4 + ["hf"] * 2


def test_a_recorded_entry_is_the_same_entry(tiny, tmp_path, adapter):
    cfg = with_models(config_of(tiny, tmp_path, f"a={tiny.student}+{adapter}", "b=self@-2"), {})
    kept = to_dict(cfg)["teachers"]
    assert kept[0]["adapter"] == str(adapter) and kept[1]["model"] == "self@-2"
    again = with_models(config_of(tiny, tmp_path, yaml=json.dumps({"teachers": kept})), {})
    assert again.teachers == cfg.teachers


BAD_ENTRIES = {
    "self@": "write self@0",
    "self@1": "write self@0",
    "self@-0": "write self@0",
    "self@ema:1": "write self@0",
    "self@ema:.0": "write self@0",
    "self@ema": "write self@0",
}


@pytest.mark.parametrize("model", BAD_ENTRIES)
def test_a_bad_form_of_the_students_past_is_refused(model, tiny, tmp_path):
    cfg = config_of(tiny, tmp_path, f"a={model}")
    with pytest.raises(ValueError, match=f"teachers: a: model {model}: {BAD_ENTRIES[model]}"):
        cfg.validate()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: a, model: self@-1, backend: vllm}", "which backend hf takes; set `backend: hf`"),
        ("{name: a, model: self@-1, adapter: x}", "it is the student here; remove adapter"),
        (
            "{name: a, model: m, adapter: x, backend: server, urls: ['http://127.0.0.1:1']}",
            "a server has its own weights; merge it",
        ),
        ("{name: a, model: m, past: '0'}", "unknown key `past`"),
    ],
)
def test_entries_that_contradict_themselves(entry, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_of(tiny, tmp_path, yaml=f"teachers: [{entry}]").validate()


def test_servers_write_for_no_past_but_the_start(tiny, tmp_path):
    ahead = ("--mode", "async", "--loss", "reverse_kl")
    config_of(tiny, tmp_path, "self@0", flags=ahead).validate()
    with pytest.raises(ValueError, match="--mode async: teacher default is self@-1, and respon"):
        config_of(tiny, tmp_path, "self@-1", flags=ahead).validate()


def test_too_many_copies_of_the_student_name_their_bytes(tiny, tmp_path):
    cfg = with_models(config_of(tiny, tmp_path, "self@-17"), {})
    with pytest.raises(ValueError, match=r"self@-17: 17 copies of the student are .* GiB .*16"):
        check_models(cfg, load_tokenizer(str(tiny.student)))


def test_an_adapters_own_tokenizer_is_its_teachers(tiny, tmp_path, copied):
    base = load_tokenizer(str(tiny.student))
    base.chat_template = "{{ 'of the adapter' }}"
    base.save_pretrained(copied)
    cfg = with_models(config_of(tiny, tmp_path, f"a={tiny.student}+{copied}"), {})
    facts = check_models(cfg, load_tokenizer(str(tiny.student)))
    assert facts.dialects[0].tokenizer.chat_template == "{{ 'of the adapter' }}"
