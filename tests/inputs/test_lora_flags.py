"""Flags of a LoRA student: what is refused, in one line each, and what the names of layers mean."""

import json
import typing
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import train_gkd
import train_mopd
from opd.engines import vllm_process
from opd.inputs.arguments import parse
from opd.inputs.identity import allowed_changes, fingerprint_of
from opd.inputs.lora_rules import samples_with_adapter
from opd.inputs.models import check_models, load_tokenizer
from opd.inputs.shapes import read_model, shape_of
from opd.inputs.vllm_models import takes_adapters
from opd.lora_config import LoraConfig
from opd.ops.lora import (
    ADAPTER_RANKS,
    add_adapter,
    base_name,
    layout_of,
    lora_shapes,
    merged_layer,
    plain_name,
)
from tests.support import vision

REQUIRED = ["--student_model", "s", "--teacher", "t", "--data", "d", "--output_dir", "o"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def line(call, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def config_of(*flags, script=train_mopd):
    return parse(script.Config, [*REQUIRED, *flags])


ALONE = [
    ("--lora_r -1", "--lora_r -1: must be at least 0"),
    ("--lora_r 8 --lora_alpha 0", "--lora_alpha 0: must be at least 1"),
    ("--lora_r 8 --lora_alpha -3", "--lora_alpha -3: must be at least 1"),
    ("--lora_r 8 --lora_dropout 0.1", "--lora_dropout 0.1: must be 0; the student that trains"),
    ("--lora_r 8 --lora_dropout nan", "--lora_dropout nan: must be finite"),
    ("--lora_r 8 --lora_targets auto,q_proj", "auto stands alone"),
    ("--lora_r 8 --lora_targets all-linear q_proj", "all-linear stands alone"),
    ("--lora_r 8 --lora_targets ,", "--lora_targets: names no layer"),
    ("--lora_r 8 --freeze_vision", "--freeze_vision: with --lora_r all weights"),
    ("--lora_alpha 16", "--lora_alpha: is about an adapter, and there is none; set --lora_r"),
    ("--lora_targets q_proj", "--lora_targets: is about an adapter"),
    ("--lora_modules_to_save lm_head", "--lora_modules_to_save: is about an adapter"),
    ("--lora_sync merged", "--lora_sync: is about an adapter"),
    ("--merge_on_export", "--merge_on_export: is about an adapter"),
    ("--lora_dropout 0.1", "--lora_dropout: is about an adapter"),
    ("--lora_r 600 --lora_sync adapter", "--lora_sync adapter: vLLM takes ranks up to 512"),
    (
        "--lora_r 8 --lora_sync adapter --lora_modules_to_save norm",
        "--lora_sync adapter: vLLM takes no --lora_modules_to_save beside an adapter; use",
    ),
    (
        "--lora_r 8 --lora_sync adapter --rollout_tensor_parallel_size 2",
        "--lora_sync adapter: it was not tried with --rollout_tensor_parallel_size",
    ),
    ("--lora_r 8 --lora_sync adapter --mode async", "rollout servers get whole weights"),
]


@pytest.mark.parametrize(("flags", "message"), ALONE, ids=[flags for flags, _ in ALONE])
def test_flags_by_themselves(flags, message):
    assert message in line(config_of(*flags.split()).validate)


@pytest.mark.parametrize("script", [train_mopd, train_gkd], ids=["mopd", "gkd"])
def test_both_trainers_have_them(script):
    config_of("--lora_r", "8", "--merge_on_export", script=script).validate()
    assert "--lora_dropout" in line(
        config_of("--lora_r", "8", "--lora_dropout", "1", script=script).validate
    )


@pytest.mark.parametrize("flag", ["load_in_8bit", "load_in_4bit", "load-in-4bit"])
def test_quantised_bases_are_out_of_scope(flag, tmp_path):
    assert "quantised bases are out of scope" in line(config_of, f"--{flag}", "true")
    path = tmp_path / "c.yaml"
    path.write_text(f"{flag.replace('-', '_')}: true\n")
    assert "quantised bases are out of scope" in line(config_of, "--config", str(path))


# ---- With a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny):
    return read_model("--student_model", str(tiny.student))


@pytest.fixture(scope="module")
def tied(tiny_tied):
    return read_model("--student_model", str(tiny_tied))


NAMES = [
    (
        {"lora_targets": ["q_porj"]},
        "--lora_targets q_porj: no layer of qwen3 is called so; did you",
    ),
    ({"lora_targets": ["xyz"]}, "it has down_proj, gate_proj, k_proj"),
    ({"lora_targets": ["lm_head"]}, "--lora_targets lm_head: the loss reads the head's own weight"),
    ({"lora_targets": ["q_proj,lm_head"]}, "train it whole with --lora_modules_to_save lm_head"),
    ({"lora_targets": ["embed_tokens"]}, "--lora_targets embed_tokens: no linear layer of qwen3"),
    ({"lora_targets": ["norm"]}, "--lora_targets norm: no linear layer of qwen3"),
    ({"lora_targets": ["proj"]}, "--lora_targets proj: no layer of qwen3 is called so"),
    ({"lora_modules_to_save": ["lm_haed"]}, "--lora_modules_to_save lm_haed: no module of qwen3"),
    ({"lora_modules_to_save": ["q_proj"]}, "q_proj is in it and gets an adapter; choose one"),
    ({"lora_modules_to_save": ["mlp"]}, "is in it and gets an adapter; choose one"),
    ({"lora_modules_to_save": ["act_fn"]}, "it has no weights; leave it out"),
    ({"lora_r": 4096}, "--lora_r 4096: the adapter would be as large as the 14 layers"),
]


@pytest.mark.parametrize(("flags", "message"), NAMES, ids=[str(flags) for flags, _ in NAMES])
def test_names_and_sizes_that_do_not_fit_the_model(model, flags, message):
    assert message in line(layout_of, model, LoraConfig(**{"lora_r": 4, **flags}))


def test_the_largest_rank_is_named(model):
    message = line(layout_of, model, LoraConfig(lora_r=4096))
    most = int(message.split("take at most ")[1].split(",")[0])
    assert layout_of(model, LoraConfig(lora_r=most)).r == most
    line(layout_of, model, LoraConfig(lora_r=most + 1))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_head_is_not_trained_whole(tied, name):
    flags = LoraConfig(lora_r=4, lora_modules_to_save=[name])
    assert "the head is the embedding" in line(layout_of, tied, flags)


def test_what_the_names_mean(model):
    auto = layout_of(model, LoraConfig(lora_r=4))
    assert set(auto.short_targets) == set(ALL) and len(auto.targets) == 2 * len(ALL)
    assert layout_of(model, LoraConfig(lora_r=4, lora_targets=["all-linear"])) == auto
    two = layout_of(model, LoraConfig(lora_r=4, lora_targets=["q_proj , v_proj"]))
    assert two.short_targets == ("q_proj", "v_proj") and len(two.targets) == 4
    assert two == layout_of(model, LoraConfig(lora_r=4, lora_targets=["v_proj", "q_proj"]))
    one = layout_of(model, LoraConfig(lora_r=4, lora_targets=["layers.1.mlp.up_proj"]))
    assert one.targets == one.short_targets == ("model.layers.1.mlp.up_proj",)
    assert layout_of(model, LoraConfig()) is None


def test_sizes_are_those_of_peft(tiny):
    flags = LoraConfig(lora_r=4, lora_modules_to_save=["lm_head"])
    layout = layout_of(read_model("--student_model", str(tiny.student)), flags)
    trained, frozen = lora_shapes(read_model("--student_model", str(tiny.student)), layout)
    real = AutoModelForCausalLM.from_pretrained(tiny.student)
    add_adapter(real, layout, seed=0)
    named = list(real.parameters())
    assert trained == tuple(tuple(p.shape) for p in named if p.requires_grad)
    assert frozen == tuple(tuple(p.shape) for p in named if not p.requires_grad)


def test_adapters_begin_as_nothing_and_the_same_everywhere(tiny):
    ids = torch.arange(2, 10).view(1, 8)
    models = [AutoModelForCausalLM.from_pretrained(tiny.student).eval() for _ in range(3)]
    layout = layout_of(models[0], LoraConfig(lora_r=4))
    state = torch.random.get_rng_state()
    for seed, model in zip((1, 1, 2), models, strict=True):
        before = model(ids).logits
        add_adapter(model, layout, seed=seed)
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same, other = (dict(m.named_parameters()) for m in models)
    drawn = [name for name in first if ".lora_A." in name]
    assert all(
        torch.equal(first[n], same[n]) and not torch.equal(first[n], other[n]) for n in drawn
    )


def test_transposed_weights_are_merged_as_they_lie():
    """GPT-2's layers hold [I, O]."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    plain = AutoModelForCausalLM.from_config(config).eval()
    layout = layout_of(model, LoraConfig(lora_r=4))
    assert {"c_attn", "c_proj", "c_fc"} == set(layout.short_targets)
    assert layout.transposed == set(layout.targets)
    add_adapter(model, layout, seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    ids = torch.arange(2, 10).view(1, 8)
    plain.load_state_dict(dict(merged_layer(list(model.state_dict().items()), layout)))
    assert (plain(ids).logits - model(ids).logits).abs().max() < 1e-4
    for name in plain.state_dict():
        assert plain_name(base_name(name, layout)) == name


# ---- Who the sampler is, and what a run remembers ------------------------------------------------


def shape_with(path, cfg):
    return shape_of(
        read_model("--student_model", str(path)), "--student_model", str(path), cfg.lora
    )


@pytest.mark.parametrize(
    ("flags", "takes"),
    [
        ("", True),
        ("--lora_sync merged", False),
        ("--lora_sync adapter", True),
        ("--lora_modules_to_save norm", False),
        ("--rollout_tensor_parallel_size 2", False),
        ("--mode async", False),
        ("--lora_targets q_proj,v_proj", True),
    ],
)
def test_the_sampler_takes_adapters_where_vllm_does(tiny, flags, takes):
    cfg = config_of("--lora_r", "8", *flags.split())
    assert samples_with_adapter(cfg, shape_with(tiny.student, cfg)) is takes


def test_a_family_without_adapters_in_vllm_gets_merged_weights(tmp_path):
    for family, takes in (
        ("Qwen3ForCausalLM", True),
        ("GPT2LMHeadModel", False),
        ("Nobody", False),
    ):
        (tmp_path / family).mkdir()
        (tmp_path / family / "config.json").write_text(json.dumps({"architectures": [family]}))
        assert takes_adapters(str(tmp_path / family)) is takes
    assert not takes_adapters(str(tmp_path))


def test_a_run_without_adapters_samples_as_ever(tiny):
    cfg = config_of()
    assert not samples_with_adapter(cfg, shape_with(tiny.student, cfg))


def test_adapters_are_in_the_fingerprint_where_there_are_any(monkeypatch):
    monkeypatch.setattr("opd.inputs.identity.content_hash", lambda path: path)
    whole = fingerprint_of(config_of(), {"default": "h"}, "d")
    assert "lora" not in whole  # as checkpoints from before have it
    cfg = config_of("--lora_r", "8", "--lora_sync", "merged", "--merge_on_export")
    found = fingerprint_of(cfg, {"default": "h"}, "d")
    assert found.pop("lora") == {
        "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "lora_targets": ["auto"],
        "lora_modules_to_save": [],
    }  # fmt: skip
    assert found == whole
    for name in ("lora_r", "lora_alpha", "lora_targets"):
        changed = replace(cfg, run=replace(cfg.run, allow_change=[name]))
        assert "a run keeps it to its end" in line(allowed_changes, changed)


def test_an_adapter_is_no_student(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    message = line(load_tokenizer, str(tmp_path))
    assert "a LoRA adapter without its base" in message and "--merge_on_export" in message


@pytest.mark.parametrize("sync", ["adapter", "auto"])
def test_what_vllm_would_leave_out_is_no_adapter_of_its_own(tmp_path, tiny, sync):
    """Of a model that sees, vLLM takes adapters on the text model; on others sampler and student
    would differ.
    """
    vision.idefics3(tmp_path)
    flags = [
        *("--student_model", str(tmp_path), "--teacher", str(tmp_path), "--data", str(tiny.train)),
        *("--output_dir", str(tmp_path / "run"), "--lora_r", "2", "--lora_sync", sync),
        *("--lora_targets", "all-linear"),
        *("--max_prompt_tokens", "20", "--max_response_tokens", "8"),
    ]
    config, tokenizer = parse(train_mopd.Config, flags), load_tokenizer(str(tmp_path))
    if sync == "adapter":
        message = line(check_models, config, tokenizer)
        assert message.startswith("--lora_sync adapter: vLLM takes adapters on the text model")
    else:
        assert not samples_with_adapter(config, check_models(config, tokenizer).student)


def test_the_ranks_are_those_of_vllm():
    vllm_process.import_vllm()
    from vllm.config.lora import MaxLoRARanks

    assert typing.get_args(MaxLoRARanks) == ADAPTER_RANKS
