"""A student with adapters, its sampler and its exports: real engines on both routes, whole weights
that are merged on the way and vLLM's own adapters.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd import distributed
from opd.config import ModelConfig, OptimConfig, RolloutConfig
from opd.engines.vllm_process import adapter_request
from opd.inputs.validation import load_ds_config
from opd.lora_config import LoraConfig
from opd.padding import make_micro_batches
from opd.parity import UNSCORED, Parity
from opd.records.export import export_adapter
from opd.rollout import RolloutEngine, push_weights
from opd.run.student_export import export_student
from opd.student import LossSettings, Student
from opd.types import Prompt
from tests.support.processes import ROOT, leave_vllm

CUT = functools.partial(make_micro_batches, micro_batch_size=8, pad_id=0, domains=["d"])
PROMPTS = [
    Prompt(prompt_id=i, domain="d", token_ids=list(range(2 + i, 8 + 2 * i))) for i in range(8)
]
ROUTES = ("merged", "adapter")
TOLERANCE = 1e-4  # measured: 6e-6 at most on either route
R, ALPHA = 4, 8


def build_student(path, device, *, dtype="float32", stage=3, **lora) -> Student:
    return Student(
        ModelConfig(student_model=str(path), dtype=dtype),
        OptimConfig(),
        load_ds_config(str(ROOT / "ds_configs" / f"zero{stage}.json")),
        settings=LossSettings(),
        device=device,
        lora=LoraConfig(lora_r=R, lora_alpha=ALPHA, **lora),
        seed=3,
    )


@pytest.fixture(scope="module")
def process(device):
    """This process as a rank; vLLM's own groups go with it."""
    yield device
    leave_vllm()


@pytest.fixture(scope="module")
def student(process, tiny):
    return build_student(tiny.student, process)


def move(student: Student, seed: int) -> None:
    """Every matrix of the adapter changes, as by an optimizer with a bold learning rate."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in student.model.parameters() if p.requires_grad]
    gathered = student.sharded._deepspeed.zero.GatheredParameters(trained, modifier_rank=0)
    with gathered, torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.fixture(scope="module")
def engines(student, tiny):
    cfg = RolloutConfig(
        num_generations=1, max_response_tokens=24, rollout_kv_cache_gib=0.03, enforce_eager=True
    )
    options = {"dtype": "float32", "trust_remote_code": False, "max_model_len": 64, "seed": 0}
    built = {
        route: RolloutEngine(
            str(tiny.student),
            cfg,
            stop_ids=(1,),
            lora=student.lora if route == "adapter" else None,
            **options,
        )
        for route in ROUTES
    }
    for engine in built.values():
        engine.try_out()
    assert built["adapter"].takes_adapter and not built["merged"].takes_adapter
    assert built["adapter"].engine.sleep_level == 1  # it would lose what adapters stand beside
    return built


def base_of(student: Student) -> dict[str, torch.Tensor]:
    trained = {name for name, p in student.model.named_parameters() if p.requires_grad}
    return {n: t.clone() for n, t in student.named_full_parameters() if n not in trained}


@pytest.mark.parametrize("route", ROUTES)
def test_the_sampler_is_the_student_after_each_sync(route, student, engines):
    """And no more once the student has moved on; its own weights stay what they are."""
    engine, before = engines[route], base_of(student)
    parity = Parity(CUT, engine.cfg, every=1, dtype=torch.float32)
    texts = []
    for step in range(3):
        move(student, seed=step)
        push_weights(student, engine, step)
        rollouts = engine.generate(PROMPTS, 0)
        assert {r.policy_version for r in rollouts} == {step}
        parity.check(student, rollouts, step)
        (mb,) = CUT(rollouts, [UNSCORED] * len(rollouts))
        gap_N = student.logprobs(mb, 1.0) - mb.at_loss_tokens(mb.rollout_logprobs_BS)
        assert len(gap_N) > 40 and gap_N.abs().max() < TOLERANCE
        texts.append([r.response_ids for r in rollouts])
        engine._check_canary()
    assert texts[0] != texts[1] != texts[2]  # the same seeds: other weights have written
    move(student, seed=9)
    with pytest.raises(distributed.Stop, match="the sampler is not the student"):
        parity.check(student, engine.generate(PROMPTS, 0), 3)
    after = base_of(student)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_both_routes_sample_the_same(student, engines):
    move(student, seed=5)
    for engine in engines.values():
        push_weights(student, engine, 7)
    first, second = (engines[route].generate(PROMPTS, 0) for route in ROUTES)
    assert [r.response_ids for r in first] == [r.response_ids for r in second]
    assert [r.finish_reason for r in first] == [r.finish_reason for r in second]


def test_an_adapter_is_all_that_its_route_gathers_and_writes(student, engines):
    tensors = {name: t.clone() for name, t in student.adapter_tensors()}
    whole = sum(p.ds_numel for p in student.model.parameters())
    assert sum(t.numel() for t in tensors.values()) < whole / 4
    push_weights(student, engines["adapter"], 11)
    (file,) = [p for p in _files(engines["adapter"]) if p.suffix == ".safetensors"]
    assert load_file(file).keys() == tensors.keys()


def _files(engine):
    return list(Path(engine.engine._folder.name).rglob("*"))


# ---- Exports -------------------------------------------------------------------------------------


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 26).view(2, 12)).logits


def run_of(student: Student, path, *, merges: bool):
    """What `export_student` asks of a run."""
    return SimpleNamespace(
        cfg=SimpleNamespace(
            lora=SimpleNamespace(merge_on_export=merges),
            model=SimpleNamespace(student_model=str(path), trust_remote_code=False),
        ),
        facts=SimpleNamespace(student=SimpleNamespace(eos_ids=(1, 20))),
        tokenizer=AutoTokenizer.from_pretrained(path),
    )


@pytest.fixture(scope="module")
def exports(student, tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    move(student, seed=1)
    for name in ("adapter", "whole"):
        run = run_of(student, tiny.student, merges=name == "whole")
        export_student(run, student, root / name, card="A card.\n")
    return root


def test_peft_and_transformers_load_the_adapter(student, exports, tiny):
    directory = exports / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.float32)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(directory)))
    assert (expected - before).abs().max() > 1
    # from its configuration alone, which names the base: as transformers too does
    for load in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        found = logits(load.from_pretrained(str(directory), dtype=torch.float32))
        assert (found - expected).abs().max() < 1e-5
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny.student) and config["r"] == R
    assert sorted(config["target_modules"])[:2] == ["down_proj", "gate_proj"]
    assert GenerationConfig.from_pretrained(directory).eos_token_id == [1, 20]
    assert (directory / "README.md").read_text() == "A card.\n"
    assert AutoTokenizer.from_pretrained(directory).chat_template
    own = {name: t.clone() for name, t in student.adapter_tensors()}
    written = load_file(directory / "adapter_model.safetensors")
    assert all(torch.equal(own[name], written[name]) for name in own)


def test_a_merged_export_answers_as_the_adapter_does(exports, tiny):
    whole = AutoModelForCausalLM.from_pretrained(exports / "whole", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(exports / "adapter"))
    assert (logits(whole) - logits(adapted)).abs().max() < 1e-4
    assert (
        whole.state_dict().keys()
        == AutoModelForCausalLM.from_pretrained(tiny.student).state_dict().keys()
    )
    assert whole.generation_config.eos_token_id == [1, 20]
    assert not (exports / "whole" / "adapter_config.json").exists()


def test_vllm_loads_the_adapter(student, engines, exports):
    engine = engines["adapter"]
    push_weights(student, engine, 20)
    expected = engine.generate(PROMPTS, 0)
    push_weights(student, engine, 21)
    engine.engine._request = adapter_request(1000, str(exports / "adapter"))
    found = engine.generate(PROMPTS, 0)
    assert [r.response_ids for r in found] == [r.response_ids for r in expected]


def test_a_base_of_the_hub_is_named_with_its_commit(student, exports, tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.student)
    tensors = load_file(exports / "adapter" / "adapter_model.safetensors").items()
    export_adapter(
        tmp_path / "out",
        student.lora,
        tensors,
        tokenizer,
        GenerationConfig(eos_token_id=1),
        base="org/model@abc123",
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model" and config["revision"] == "abc123"


def test_modules_that_are_trained_whole_are_in_the_export(process, tiny, tmp_path):
    student = build_student(
        tiny.student, process, stage=0, lora_modules_to_save=["lm_head", "model.norm"]
    )
    with torch.no_grad():
        for p in student.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    export_student(
        run_of(student, tiny.student, merges=False), student, tmp_path / "adapter", card=""
    )
    base = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert (logits(adapted) - logits(student.model)).abs().max() < 1e-5
