"""The planner against real tensors, and its predictions for published models against each other."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    Gemma3nTextConfig,
    Gemma4TextConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

import train_gkd
import train_mopd
from opd.config import GIB, AsyncConfig, TeacherSpec
from opd.inputs.arguments import parse
from opd.inputs.models import ModelFact, ModelFacts
from opd.inputs.shapes import ModelShape, layer_values, model_of, read_model, shape_of
from opd.lora_config import LoraConfig
from opd.options import groups_of, to_dict
from opd.plan import __main__ as plan_main
from opd.plan import apply, memory, planner
from opd.plan.job import OFFLOADS, PHASES, Machine, make_job
from opd.plan.memory import activations, sampler_cache
from opd.plan.planner import Plan, make_plan
from opd.plan.sharding import ZeroSettings, zero_shard
from opd.plan.view import as_json, remedies, table, verdict
from opd.run.prepare import prepare
from tests.support.processes import ROOT, worker_environment
from tests.support.ranks import run_ranks

# ---- Exact: what ZeRO holds, against the tensors of real engines ---------------------------------

ODD = {
    "vocab_size": 43,
    "hidden_size": 33,
    "intermediate_size": 67,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
}
ZEROS = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3_all_cut": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1500},
}
CASES = [
    (f"{zero}_{dtype}_{model}{'_lora' if lora_r else ''}", zero, dtype, model, lora_r)
    for zero in ZEROS
    for dtype in ("float32", "bfloat16")
    for model in ("untied", "tied")
    for lora_r in ((0, 3) if model == "untied" else (0,))
]


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory) -> dict[str, Path]:
    """Sizes that divide by nothing, so that every padding shows."""
    root = tmp_path_factory.mktemp("odd")
    for name in ("untied", "tied"):
        Qwen3ForCausalLM(Qwen3Config(**ODD, tie_word_embeddings=name == "tied")).save_pretrained(
            root / name
        )
    return {name: root / name for name in ("untied", "tied")}


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def counted(request, odd_models, tmp_path_factory) -> tuple[int, Path]:
    """(ranks, directory with a JSON file per case and rank)."""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    cases = [
        {
            "name": name,
            "zero": ZEROS[zero],
            "dtype": dtype,
            "model": str(odd_models[model]),
            "lora_r": lora_r,
        }
        for name, zero, dtype, model, lora_r in CASES
    ]
    (out / "job.json").write_text(json.dumps({"out": str(out), "cases": cases}))
    worker = ROOT / "tests/support/workers/zero_worker.py"
    run_ranks(worker, str(out / "job.json"), num_ranks=request.param, timeout_s=300)
    return request.param, out


@pytest.mark.parametrize(
    ("name", "zero", "dtype", "model", "lora_r"), CASES, ids=[case[0] for case in CASES]
)
def test_bytes_of_every_zero_stage_are_those_of_the_real_tensors(
    counted, odd_models, name, zero, dtype, model, lora_r
):
    """Of models that are trained whole, and of adapters beside frozen weights."""
    ranks, out = counted
    shape = planner_shape(odd_models[model], LoraConfig(lora_r=lora_r))
    assert bool(shape.frozen) == bool(lora_r)
    settings = ZeroSettings.of({"zero_optimization": ZEROS[zero]})
    width = getattr(torch, dtype).itemsize
    shard = zero_shard(shape.trained, settings, width=width, world_size=ranks, frozen=shape.frozen)
    for rank in range(ranks):
        real = json.loads((out / f"{name}.{rank}.json").read_text())
        assert dataclasses.asdict(shard) == {
            key: real[key] for key in ("parameters", "gradients", "masters", "moments")
        }
        if zero == "zero1":  # between micro-batches stage 1 keeps the gradients of all parameters
            assert real["open_gradients"] == 4 * shape.num_trained


def planner_shape(path: Path, lora: LoraConfig | None = None) -> ModelShape:
    flag = "--student_model"
    return shape_of(read_model(flag, str(path)), flag, str(path), lora)


def test_tied_embeddings_count_once(odd_models):
    untied, tied = (planner_shape(odd_models[name]) for name in ("untied", "tied"))
    assert tied.tied and not untied.tied
    assert untied.num_parameters - tied.num_parameters == ODD["vocab_size"] * ODD["hidden_size"]
    for name, shape in (("untied", untied), ("tied", tied)):
        assert (
            shape.num_parameters
            == Qwen3ForCausalLM.from_pretrained(odd_models[name]).num_parameters()
        )


def test_activations_are_near_what_autograd_saves():
    """Of a layer of the real model: the formula is an estimate, but not a guess."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(**ODD | sizes | heads))
    shape = shape_of(model, "--student_model", "m")
    saved: dict[int, int] = {}

    def note(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(40).view(1, 40).repeat(8, 1)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    kept = sum(size for ptr, size in saved.items() if ptr not in parameters)
    assert hidden.requires_grad
    assert shape.activations_per_token(4) * ids.numel() * 2 == pytest.approx(kept, rel=0.15)


def test_layers_that_differ_count_as_the_largest():
    """By transformers' overrides, whose global field may not be read, as Gemma 4's; and by lists,
    as Gemma 3n's.
    """
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    gemma = Gemma4TextConfig(
        **small,
        intermediate_size=48,
        head_dim=16,
        global_head_dim=32,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )
    with pytest.raises(RuntimeError, match="per-layer"):
        _ = gemma.head_dim
    shape = shape_of(model_of(gemma, "--x", "m"), "--x", "m")
    assert (shape.head_dim, shape.num_kv_heads, shape.num_layers) == (32, 1, 4)
    assert shape.kv_per_token == 3 * 2 * 16 + 2 * 32
    config = Qwen3Config(**small, intermediate_size=48, head_dim=16)
    config.per_layer_config = {0: {"num_key_value_heads": 2, "intermediate_size": 96}}
    assert layer_values(config, "num_key_value_heads") == [2, 1, 1, 1]
    assert layer_values(
        PreTrainedConfig(num_key_value_heads=[1, 2, None, 2]), "num_key_value_heads"
    ) == [1, 2, 2]
    gemma = Gemma3nTextConfig(
        **small,
        head_dim=16,
        intermediate_size=[48, 96, 48, 48],
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )
    assert shape_of(model_of(gemma, "--x", "m"), "--x", "m").mlp_size == 96


def test_a_configuration_that_does_not_say_enough_is_one_line():
    model = model_of(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4), "--x", "m"
    )
    with pytest.raises(ValueError, match=r"--x m: config\.json has no num_attention_heads"):
        shape_of(model, "--x", "m").check_plannable()


# ---- Published shapes ----------------------------------------------------------------------------

COMMON = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
DENSE = {  # hidden, layers, heads, MLP, tied, parameters in billions as published
    "0.6B": (1024, 28, 16, 3072, True, 0.596),
    "1.7B": (2048, 28, 16, 6144, True, 1.72),
    "4B": (2560, 36, 32, 9728, True, 4.02),
    "8B": (4096, 36, 32, 12_288, False, 8.19),
    "32B": (5120, 64, 64, 25_600, False, 32.8),
}
MOE = Qwen3MoeConfig(
    **{**COMMON, "num_key_value_heads": 4},
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def published() -> dict[str, ModelShape]:
    configs = {
        name: Qwen3Config(
            **COMMON,
            hidden_size=H,
            num_hidden_layers=L,
            num_attention_heads=A,
            intermediate_size=mlp,
            tie_word_embeddings=tied,
        )
        for name, (H, L, A, mlp, tied, _) in DENSE.items()
    }
    configs["30B-A3B"] = MOE
    return {
        name: shape_of(model_of(config, "--x", name), "--x", name)
        for name, config in configs.items()
    }


def run_config(*argv: str, script=train_mopd):
    required = ["--student_model", "s", "--data", "d", "--output_dir", "o", "--ds_config"]
    return parse(script.Config, [*required, str(ROOT / "ds_configs/zero3.json"), *argv])


def job_of(
    shapes,
    student: str,
    teachers: list[str],
    *argv: str,
    gpus=8,
    gib=80.0,
    stage=3,
    host=1024.0,
    is_gpu=True,
):
    names = [f"t{i}" for i in range(len(teachers))]
    cfg = run_config(*(word for name in names for word in ("--teacher", f"{name}={name}")), *argv)
    machine = Machine(gpus, int(gib * GIB), int(host * GIB), 25e9, is_gpu)
    found = make_job(
        cfg, shapes[student], {n: shapes[t] for n, t in zip(names, teachers, strict=True)}, machine
    )
    return replace(found, zero=replace(found.zero, stage=stage))


@pytest.mark.parametrize("name", DENSE)
def test_parameter_counts_are_those_published(published, name):
    assert published[name].num_parameters / 1e9 == pytest.approx(DENSE[name][-1], rel=0.005)


def test_a_mixture_of_experts_counts_all_experts_and_computes_few(published):
    moe = published["30B-A3B"]
    assert moe.num_parameters / 1e9 == pytest.approx(30.5, rel=0.005)
    assert moe.mlp_size == 8 * 768
    assert published["8B"].kv_per_token == 2 * 36 * 8 * 128


def test_more_parameters_take_more_and_more_ranks_and_stages_take_less(published):
    def peak(size="4B", **settings):
        return make_plan(job_of(published, size, ["8B"], **settings)).peak

    sizes = [peak(size) for size in DENSE]
    assert sizes == sorted(sizes)
    ranks = [make_plan(job_of(published, "32B", ["8B"], gpus=n)).peak for n in (2, 4, 8)]
    assert ranks == sorted(ranks, reverse=True)

    def shards(zero):
        return [
            sum(dataclasses.astuple(job_of(published, "8B", ["8B"], stage=stage, gpus=zero).shard))
            for stage in range(4)
        ]

    # 1 and 2 end a step alike
    assert shards(8) == sorted(shards(8), reverse=True) and len(set(shards(8))) == 3


def test_rollout_servers_take_nothing_of_the_trainers_devices(published):
    here = make_plan(job_of(published, "1.7B", ["8B"]))
    elsewhere = make_plan(job_of(published, "1.7B", ["8B"], "--mode", "async"))
    names, others = ({row.participant for row in made.rows} for made in (here, elsewhere))
    states = {
        f"{name}, pinned copy" for name in ("student gradients", "fp32 masters", "AdamW moments")
    }
    assert names - others == states | {
        "rollout engine weights",
        "rollout KV cache",
        "rollout engine, working memory (estimate)",
        "rollout engine, CUDA graphs (estimate)",
    }
    (graphs,) = [row for row in here.rows if "CUDA graphs" in row.participant]
    assert min(graphs.bytes[phase] for phase in PHASES) > 0, "they do not sleep"
    assert others - names == {"weights for the servers, in shared memory"}
    assert elsewhere.bytes_of("rollout") < here.bytes_of("rollout")


def test_the_rows_of_a_phase_add_up_to_it(published):
    made = make_plan(job_of(published, "1.7B", ["8B", "4B"]))
    for phase in PHASES:
        device = sum(row.bytes[phase] for row in made.rows if row.kind == "device")
        host = sum(row.bytes[phase] for row in made.rows if row.kind == "host")
        assert (made.bytes_of(phase), made.host_bytes(phase)) == (device, host)
    assert made.peak == max(made.bytes_of(phase) for phase in PHASES)
    names = [(row.kind, row.participant) for row in made.rows]
    assert len(set(names)) == len(names)


def test_four_teachers_take_the_device_memory_of_the_largest(published):
    alone = make_plan(job_of(published, "1.7B", ["8B"]))
    four = make_plan(job_of(published, "1.7B", ["8B", "4B", "1.7B", "0.6B"]))
    for phase in PHASES:
        assert four.bytes_of(phase) == alone.bytes_of(phase)
        copies = sum((published[n].num_parameters - 0) * 2 for n in ("4B", "1.7B", "0.6B"))
        heads = sum(published[n].head_parameters * 2 for n in ("4B", "1.7B", "0.6B"))
        assert four.host_bytes(phase) - alone.host_bytes(phase) == copies + heads
    assert four.transfer_seconds > alone.transfer_seconds


def test_offloaded_states_leave_the_device_between_their_phases(published):
    job = job_of(published, "4B", ["8B"])
    base = make_plan(job)
    kept = planner.Plan(
        job,
        replace(base.choices, offload=()),
        memory.memory_rows(job, replace(base.choices, offload=())),
    )
    assert base.choices.offload == OFFLOADS[:2]
    assert kept.bytes_of("train") == base.bytes_of("train")
    assert (
        kept.bytes_of("rollout") - base.bytes_of("rollout")
        >= job.shard.optimizer + job.shard.gradients
    )
    assert (
        base.host_bytes("score") - kept.host_bytes("score")
        == job.shard.optimizer + job.shard.gradients
    )


def test_a_teacher_on_a_cpu_sleeps_only_if_it_can(published):
    engines = make_plan(job_of(published, "0.6B", ["1.7B", "0.6B"], is_gpu=False, gpus=1))
    assert engines.host_bytes("score") == 0
    row = {r.participant: r.bytes for r in engines.rows}
    assert len(set(row["teacher t1"].values())) == 1 and row["teacher t1"]["train"] > 0
    small = published["0.6B"]
    weights = small.num_parameters + small.head_parameters  # the embedding is packed beside itself
    weights += int(
        memory.KEPT_BY_HEAP * (small.num_parameters - small.head_parameters - norms(small))
    )
    assert row["teacher t1"]["train"] == weights * 4 + engines.choices.teacher_kv["t1"]


ENGINE_CHILD = """
import sys
from opd import distributed
from opd.engines.vllm_engine import HiddenStateEngine

def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))

with distributed.exit_together():
    distributed.init()
    engines = []
    for name, model in (("first", sys.argv[1]), ("second", sys.argv[2])):  # the first one brings the libraries
        before = resident()
        options = {"tokenizer": sys.argv[1], "dtype": "float32", "max_model_len": 64, "trust_remote_code": False}
        engines.append(HiddenStateEngine(name, model, kv_cache_gib=float(sys.argv[3]), **options))
    print("grown", resident() - before)
"""  # noqa: E501


@pytest.mark.skipif(torch.cuda.is_available(), reason="about an engine on the CPU")
def test_an_engine_on_a_cpu_takes_what_is_predicted(tiny, tmp_path):
    """Embedding twice, linear layers once, and the KV cache that the flag says: 1 GiB while
    VLLM_CPU_KVCACHE_SPACE was set.
    """
    wide = {"vocab_size": 30_000, "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**ODD | wide | heads))
    model.save_pretrained(tmp_path / "wide")
    shape = {"wide": shape_of(model, "--teacher", "wide")}
    job = job_of(shape, "wide", ["wide"], "--teacher_kv_cache_gib=.25", is_gpu=False, gpus=1)
    planned = memory.teacher_awake(job, "t0", make_plan(job).choices)
    models = [str(tiny.student), str(tmp_path / "wide")]
    run = subprocess.run(
        [sys.executable, "-c", ENGINE_CHILD, *models, "0.25"],
        env=worker_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    grown = int(run.stdout.split("grown")[1].split()[0])
    assert grown == pytest.approx(planned, rel=0.1)


def norms(shape: ModelShape) -> int:
    return sum(size for (size,) in (s for s in shape.parameters if len(s) == 1))


# ---- Choices -------------------------------------------------------------------------------------


def test_choices_fit_where_there_is_room_and_keep_states_on_the_gpu(published):
    made = make_plan(job_of(published, "0.6B", ["1.7B"], "--prompts_per_step", "64"), frozenset())
    assert made.fits and made.choices.offload == () and made.choices.support == "auto"
    _, wanted = sampler_cache(made.job)
    assert wanted <= made.choices.kv_cache < wanted + planner.KV_STEP


def test_less_memory_offloads_more_and_caches_less(published):
    def chosen(gib: float) -> Plan:
        return make_plan(
            job_of(published, "8B", ["8B"], "--prompts_per_step", "512", gib=gib), frozenset()
        )

    plans = [chosen(gib) for gib in (141, 80, 60, 44)]
    assert [p.fits for p in plans] == [True] * 4
    assert [len(p.choices.offload) for p in plans] == sorted(len(p.choices.offload) for p in plans)
    assert [p.choices.kv_cache for p in plans] == sorted(
        (p.choices.kv_cache for p in plans), reverse=True
    )
    assert [p.choices.max_tokens for p in plans] == sorted(
        (p.choices.max_tokens for p in plans), reverse=True
    )
    assert plans[-1].choices.kv_cache >= sampler_cache(plans[-1].job)[0]
    tight = plans[-2]
    more = replace(tight.choices, max_tokens=tight.choices.max_tokens + 200)
    # as many tokens as fit, not fewer
    beyond = Plan(tight.job, more, memory.memory_rows(tight.job, more)).bytes_of("train")
    assert tight.bytes_of("train") <= planner.FILLED * 60 * GIB < beyond


def test_a_teacher_too_large_for_one_gpu_is_shared(published):
    made = make_plan(job_of(published, "1.7B", ["32B"], gpus=4, gib=48), frozenset())
    assert made.choices.tensor_parallel == {"t0": 2} and made.fits


def test_hidden_states_that_find_no_room_become_top_k(published):
    argv = ("--prompts_per_step", "8192", "--max_response_tokens", "8192", "--num_generations", "4")
    assert (
        make_plan(job_of(published, "0.6B", ["8B"], *argv), frozenset()).choices.support
        == "teacher_topk"
    )
    explicit = frozenset({"support"})
    assert make_plan(job_of(published, "0.6B", ["8B"], *argv), explicit).choices.support == "auto"


def test_explicit_flags_win(published):
    argv = ("--rollout_kv_cache_gib", "3", "--micro_batch_size", "2", "--support", "union_topk")
    job = job_of(published, "1.7B", ["8B"], *argv)
    assert {"rollout_kv_cache_gib", "micro_batch_size", "support"} <= job.cfg.explicit
    made = make_plan(job, job.cfg.explicit)
    assert (made.choices.kv_cache, made.choices.max_tokens, made.choices.support) == (
        3 * GIB,
        0,
        "union_topk",
    )
    assert apply.apply(job.cfg, made)[0].rollout == job.cfg.rollout


def test_apply_says_each_change_and_writes_it_where_config_yaml_will_have_it(published):
    job = job_of(published, "1.7B", ["8B"])
    made = make_plan(job, frozenset())
    cfg, lines = apply.apply(job.cfg, made)
    flat = to_dict(cfg)
    assert flat["rollout_kv_cache_gib"] == "auto", "of the machine, not of the run"
    assert flat["max_tokens_per_micro_batch"] == made.choices.max_tokens >= job.longest - 1
    assert lines == [
        f"plan: --max_tokens_per_micro_batch {made.choices.max_tokens}",
        f"plan: --loss_chunk_bytes {4 * GIB}",
        "plan: --offload_student none",
    ]


def test_what_does_not_fit_names_changes_that_do(published):
    made = make_plan(job_of(published, "8B", ["8B"], stage=0, gpus=8, gib=80), frozenset())
    assert not made.fits and "try --ds_config ds_configs/zero3.json" in verdict(made)
    assert next(remedies(made)) == ("--ds_config ds_configs/zero3.json",)
    hopeless = make_plan(job_of(published, "32B", ["8B"], gpus=1, gib=24), frozenset())
    assert verdict(hopeless).startswith("does not fit") and "smaller student" in verdict(hopeless)
    lone = make_plan(job_of(published, "0.6B", ["32B"], gpus=1, gib=24), frozenset())
    assert verdict(lone).endswith("; take a smaller teacher, or more GPUs")


def test_what_only_vllm_knows_is_said(published):
    job = job_of(published, "0.6B", ["8B"], gpus=8, gib=80)
    assert "only vLLM knows" not in verdict(make_plan(job, frozenset()))
    job = replace(job, student=replace(job.student, keeps_states=True))
    said = verdict(make_plan(job, frozenset()))
    assert said.startswith("fits: ") and "0.6B, which only vLLM knows" in said


def test_a_host_that_is_too_small_does_not_fit(published):
    large = make_plan(job_of(published, "1.7B", ["8B", "4B"], host=1024))
    small = make_plan(job_of(published, "1.7B", ["8B", "4B"], host=100))
    assert large.fits and not small.fits and small.peak == large.peak


def test_a_second_teacher_is_prefetched_where_both_fit(published):
    assert make_plan(job_of(published, "1.7B", ["8B", "4B"])).prefetches
    assert not make_plan(job_of(published, "1.7B", ["32B", "8B"], gib=80)).prefetches
    assert not make_plan(job_of(published, "1.7B", ["8B"])).prefetches


def test_recomputing_activations_takes_less(published):
    jobs = (job_of(published, "4B", ["8B"], *argv) for argv in ((), ("--gradient_checkpointing",)))
    kept, again = (activations(job, make_plan(job).choices, 8192) for job in jobs)
    assert again < kept / 4


def test_an_adapter_takes_a_fraction_of_full_training(published):
    """Of states; weights stay, and how they reach the sampler decides who keeps a copy."""
    H, L, A, mlp, tied, _ = DENSE["8B"]
    config = Qwen3Config(
        **COMMON,
        hidden_size=H,
        num_hidden_layers=L,
        num_attention_heads=A,
        intermediate_size=mlp,
        tie_word_embeddings=tied,
    )
    flags = LoraConfig(lora_r=16)
    shapes = published | {"lora": shape_of(model_of(config, "--x", "8B"), "--x", "8B", flags)}
    whole = job_of(published, "8B", ["8B"], gpus=1)
    jobs = {
        route: job_of(shapes, "lora", ["8B"], "--lora_r", "16", "--lora_sync", route, gpus=1)
        for route in ("merged", "adapter")
    }
    shard = jobs["merged"].shard
    assert shard.optimizer < whole.shard.optimizer / 100
    assert shard.gradients < whole.shard.gradients / 100
    assert whole.shard.parameters < shard.parameters < 1.01 * whole.shard.parameters
    names = {route: {row.participant for row in memory_rows_of(job)} for route, job in jobs.items()}
    assert "gradient of the student's lm_head" in {row.participant for row in memory_rows_of(whole)}
    assert not any("gradient of the student's lm_head" in found for found in names.values())
    assert names["merged"] - names["adapter"] == {"merged layer of the weight sync"}
    assert names["adapter"] - names["merged"] == {"rollout engine, pinned copy"}


def memory_rows_of(job):
    return make_plan(job).rows


# ---- Command line --------------------------------------------------------------------------------


@pytest.fixture
def run_yaml(tiny, tmp_path) -> Path:
    content = {
        "student_model": str(tiny.student),
        "teachers": [{"name": "addition", "model": str(tiny.addition), "domains": "*"}],
        "ds_config": str(ROOT / "ds_configs" / "zero3.json"),
        "max_prompt_tokens": 16,
        "max_response_tokens": 16,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


def command(capsys, *argv: str) -> tuple[int, str, str]:
    status = plan_main.plan_command(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_prints_a_table_a_verdict_and_a_plot(run_yaml, capsys):
    machine = ("--gpus", "2", "--gpu_memory", "24", "--host_memory", "64")
    png = run_yaml.with_suffix(".png")
    gkd = ("--lmbda", "0.5", "--seq_kd")
    status, out, _ = command(capsys, "--config", str(run_yaml), *machine, "--plot", str(png), *gkd)
    lines = out.splitlines()
    assert status == 0 and lines[-1].startswith("fits")
    assert len({len(line) for line in lines[1:3]}) == 1 and "rollout" in lines[1]
    assert any("total" in line for line in lines)
    assert png.read_bytes().startswith(b"\x89PNG")
    status, out, _ = command(capsys, "--config", str(run_yaml), *machine, "--json")
    assert status == 0
    answer = json.loads(out)
    assert answer["fits"] and answer["bytes"]["train"] == sum(
        row["bytes"]["train"] for row in answer["rows"] if row["kind"] == "device"
    )
    assert command(capsys, "--config", str(run_yaml), "--gpus", "1", "--gpu_memory", "1")[0] == 1


ALONE = {
    train_gkd: {"lmbda", "seq_kd", "seq_kd_temperature", "sft_alpha"},
    train_mopd: {f.name for f in dataclasses.fields(AsyncConfig)},
}


@pytest.mark.parametrize("script", [train_mopd, train_gkd], ids=["mopd", "gkd"])
def test_the_planner_takes_every_flag_of_the_trainers(script):
    """By their own Config; that of train_gkd.py where only it has a flag that is given."""
    for group in groups_of(script.Config).values():
        for field in dataclasses.fields(group):
            found = plan_main.trainer_config([f"--{field.name.replace('_', '-')}", "1"])
            assert field.name in {
                f.name for g in groups_of(found).values() for f in dataclasses.fields(g)
            }
            assert found is (train_gkd if field.name in ALONE[train_gkd] else train_mopd).Config
    assert plan_main.trainer_config(["--nonsense"]) is train_mopd.Config


def test_only_configurations_are_read(run_yaml, tiny, tmp_path, capsys):
    """No weight, no tokenizer and no data: a laptop plans for GPUs that are elsewhere."""
    alone = []
    for name in ("student", "addition"):
        (tmp_path / "alone" / name).mkdir(parents=True)
        config = (getattr(tiny, name) / "config.json").read_text()
        (tmp_path / "alone" / name / "config.json").write_text(config)
        alone.append(str(tmp_path / "alone" / name))
    flags = ("--student_model", alone[0], "--teacher", alone[1], "--data", "/nope.jsonl")
    assert command(capsys, "--config", str(run_yaml), *flags)[0] == 0


@pytest.fixture
def async_yaml(run_yaml) -> Path:
    content = yaml.safe_load(run_yaml.read_text()) | {
        "mode": "async",
        "max_staleness": 2,
        "rollout_gpus": "4,5,6,7",
        "rollout_replicas": 2,
        "rollout_tensor_parallel_size": 2,
        "teachers": [
            *yaml.safe_load(run_yaml.read_text())["teachers"],
            {"name": "far", "backend": "server", "urls": ["http://127.0.0.1:9"]},
        ],
    }
    path = run_yaml.with_name("async.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_asynchronous_run_is_planned_without_its_servers(async_yaml, run_yaml, capsys):
    """On a trainer of one GPU: its servers, which share a model between two, are no ranks of it."""
    machine = ("--gpus", "1", "--gpu_memory", "24", "--host_memory", "64", "--prompts_per_step=8")
    status, out, err = command(capsys, "--config", str(async_yaml), *machine, "--json")
    assert status == 0, err
    answer = json.loads(out)
    rows = {row["participant"]: row for row in answer["rows"]}
    assert not [name for name in rows if "rollout" in name or "far" in name]
    assert "teacher addition" in rows
    # what the trainer offloads nowhere stays on the GPU in every phase
    assert answer["choices"]["offload"] == []
    assert len(set(rows["AdamW moments"]["bytes"].values())) == 1
    assert answer["choices"]["rollout_kv_cache_gib"] == 0, "the servers size their own"
    weights = rows["weights for the servers, in shared memory"]
    assert weights["kind"] == "host" and weights["bytes"]["train"] > 0
    status, out, _ = command(capsys, "--config", str(async_yaml), *machine)
    assert "servers are not in this table" in out
    assert "servers are not in this table" not in command(capsys, "--config", str(run_yaml))[1]
    status, _, err = command(capsys, "--config", str(async_yaml), *machine, "--sync_every", "9")
    assert status == 2 and err.startswith("error: --max_staleness 2: with --sync_every 9")
    small = ("--rollout_kv_cache_gib", "0.00001")
    status, _, err = command(capsys, "--config", str(async_yaml), *machine, *small)
    assert status == 2 and err.startswith("error: --rollout_kv_cache_gib 1e-05: one sequence of")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--config", "nope.yaml"), "--config nope.yaml: no such file"),
        (("--gpus", "0"), "--gpus 0: must be above 0"),
        (("--gpu_memory", "-1"), "--gpu_memory -1: must be above 0"),
        (("--host_memory", "inf"), "--host_memory inf: must be above 0 and finite"),
        (
            ("--gpus", "8", "--prompts_per_step", "12"),
            "--prompts_per_step 12: must be a multiple of the 8 ranks",
        ),
        (
            ("--gpus", "3", "--prompts_per_step", "3", "--rollout_tensor_parallel_size", "2"),
            "--rollout_tensor_parallel_size 2: does not",
        ),
        (("--student_model", "/nope"), "--student_model /nope: no such model directory"),
        (("--plot", "/nope/x.png"), "--plot /nope/x.png: cannot be written"),
        (
            ("--max_response_tokens", "300000"),
            "--max_prompt_tokens 16 + --max_response_tokens 300000: over the context of",
        ),
        (("--ds_config", "nope.json"), "--ds_config nope.json: no such file"),
    ],
)
def test_mistakes_are_one_line(run_yaml, capsys, argv, message):
    rest = () if argv[0] == "--config" else ("--config", str(run_yaml))
    status, _, err = command(capsys, *rest, *argv)
    assert (
        status == 2 and err.startswith(f"error: {message}") and len(err.strip().splitlines()) == 1
    )


@pytest.fixture
def says_too_little(tmp_path) -> Path:
    broken = tmp_path / "m"
    broken.mkdir()
    (broken / "config.json").write_text(
        json.dumps(
            {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
        )
    )
    return broken


def test_a_model_that_says_too_little(run_yaml, says_too_little, capsys):
    status, _, err = command(
        capsys, "--config", str(run_yaml), "--student_model", str(says_too_little)
    )
    assert (
        status == 2
        and "config.json has no num_attention_heads" in err
        and str(says_too_little) in err
    )


@pytest.mark.parametrize(
    ("size", "ranks", "what"), [(64, 64, "32 attention heads"), (3, 8, "8 ranks")]
)
def test_tensor_parallelism_that_does_not_divide(published, size, ranks, what):
    job = job_of(published, "1.7B", ["8B"])
    cfg = replace(job.cfg, teachers=(TeacherSpec("t0", "t0", ("t0",), tensor_parallel_size=size),))
    with pytest.raises(
        ValueError, match=f"teachers: t0: tensor_parallel_size {size}: does not divide the {what}"
    ):
        make_job(cfg, job.student, job.teachers, replace(job.machine, gpus=ranks))


SERVED = (("math", 8000), ("code", 8001))


def test_a_served_teacher_takes_no_memory_here(run_yaml, capsys):
    teachers = [f"--teacher={name}=http://127.0.0.1:{port}" for name, port in SERVED]
    status, out, err = command(capsys, "--config", str(run_yaml), *teachers)
    assert status in (0, 1), err
    assert "teacher math" not in out and "teacher code" not in out
    gpu = ("--gpus", "2", "--gpu_memory", "24", "--host_memory", "64")
    status, _, err = command(capsys, "--config", str(run_yaml), *teachers, *gpu)
    assert status == 0, err


def test_json_is_plain_data(published):
    made = make_plan(job_of(published, "0.6B", ["1.7B"]))
    assert json.loads(json.dumps(as_json(made)))["choices"]["prefetch"] is False
    assert "total on the host" in table(made)


# ---- In the trainers -----------------------------------------------------------------------------


def trainer_flags(tiny, output_dir) -> list[str]:
    return [
        *("--student_model", str(tiny.student), "--output_dir", str(output_dir)),
        *("--data", str(tiny.train), "--ds_config", str(ROOT / "ds_configs/zero3.json")),
        *(f"--teacher=addition={tiny.addition}", f"--teacher=reversal={tiny.reversal}"),
        *("--prompts_per_step", "8", "--max_prompt_tokens", "16", "--max_response_tokens", "8"),
    ]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("script", [train_mopd, train_gkd], ids=["mopd", "gkd"])
def test_auto_changes_what_no_flag_said_and_says_so(tiny, tmp_path, capsys, script):
    flags = trainer_flags(tiny, tmp_path / "run")
    if script is train_gkd:
        flags = [flag for flag in flags if not flag.startswith("--teacher=reversal")]
        flags = [
            f"--teacher={tiny.addition}" if flag.startswith("--teacher=") else flag
            for flag in flags
        ]
        flags += ["--lmbda", "1"]
    run = prepare(parse(script.Config, [*flags, "--teacher_kv_cache_gib", "0.5"]))
    said = capsys.readouterr().out
    assert "plan: --max_tokens_per_micro_batch 184" in said and "plan: fits: " in said
    assert run.kv_cache_gib() == 1 / 16 and run.kv_cache_gib(run.cfg.teachers[0]) == 0.5
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["rollout_kv_cache_gib"] == "auto" and written["teacher_kv_cache_gib"] == 0.5
    assert (
        written["max_tokens_per_micro_batch"] == run.cfg.batch.max_tokens_per_micro_batch == 8 * 23
    )
    assert (
        run.plan.bytes_of("train")
        > run.plan.bytes_of("rollout")
        > 0
        == run.plan.host_bytes("train")
    )


@pytest.mark.usefixtures("device")
def test_off_changes_nothing_and_plans_all_the_same(tiny, tmp_path, capsys):
    cfg = parse(train_mopd.Config, [*trainer_flags(tiny, tmp_path / "run"), "--plan", "off"])
    run = prepare(cfg)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan:")]
    assert run.cfg == cfg and len(said) == 1 and said[0].startswith("plan: fits: ")
    assert 0 < run.plan.choices.kv_cache < GIB and run.plan.fits


@pytest.mark.usefixtures("device")
def test_what_does_not_fit_does_not_start(tiny, tmp_path, monkeypatch):
    small = Machine(1, 256 << 20, 0, 25e9, is_gpu=False)
    monkeypatch.setattr(apply, "machine_here", lambda world_size: small)
    flags = trainer_flags(tiny, tmp_path / "run")
    with pytest.raises(ValueError, match=r"the run does not fit: .* with --ignore_plan"):
        prepare(parse(train_mopd.Config, flags))
    assert not (tmp_path / "run").exists()
    run = prepare(parse(train_mopd.Config, [*flags, "--ignore_plan"]))
    assert not run.plan.fits and run.resume_from is None


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("flag", ["--rollout_kv_cache_gib", "--teacher_kv_cache_gib"])
def test_a_cache_that_vllm_would_refuse_is_a_line(tiny, tmp_path, flag):
    flags = [*trainer_flags(tiny, tmp_path / "run"), flag, "1e-5"]
    line = rf"{flag} 1e-05: one sequence of 24 tokens takes 0\.\d+ GiB of .*; give as much, or auto"
    with pytest.raises(ValueError, match=line):
        prepare(parse(train_mopd.Config, flags))


def test_a_resumed_run_keeps_the_support_that_was_planned(tiny, tmp_path):
    """Memory that is free at another moment must not make it another run."""
    run_dir = tmp_path / "run"
    flags = [
        f"--student_model={tiny.student}",
        f"--teacher={tiny.addition}",
        f"--data={tiny.train}",
        f"--output_dir={run_dir}",
        *("--max_prompt_tokens", "16", "--max_response_tokens", "8"),
    ]
    cfg = parse(train_mopd.Config, flags)
    assert apply._with_choices_of(cfg) == cfg, "a fresh run"
    run_dir.mkdir()
    recorded = (
        "support: teacher_topk\nmax_tokens_per_micro_batch: 96\ngradient_checkpointing: true\n"
    )
    (run_dir / "config.yaml").write_text(recorded)
    kept = apply._with_choices_of(cfg)
    assert kept.loss.support == "teacher_topk" and "support" in kept.explicit
    assert kept.batch.max_tokens_per_micro_batch == 96 and kept.model.gradient_checkpointing
    longer = apply._with_choices_of(
        parse(train_mopd.Config, [*flags, "--max_response_tokens", "200"])
    )
    assert longer.batch.max_tokens_per_micro_batch == 0, "a response of 215 tokens is chosen for"
    assert "max_tokens_per_micro_batch" not in longer.explicit and "support" in longer.explicit
    words = ["--support", "full", "--micro_batch_size", "2", "--gradient_checkpointing=no"]
    given = parse(train_mopd.Config, [*flags, *words])
    assert apply._with_choices_of(given) == given, "a flag is the user's word"
    (run_dir / "config.yaml").write_text("[")
    assert apply._with_choices_of(cfg) == cfg


def test_without_a_prediction_a_run_goes_on(tiny, says_too_little, tmp_path, capsys):
    cfg = parse(
        train_mopd.Config, [*trainer_flags(tiny, tmp_path), "--student_model", str(says_too_little)]
    )
    student = ModelFact(**vars(planner_shape(says_too_little)), eos_ids=(1,))
    facts = ModelFacts(student, {}, pad_id=0, num_tokens=40, shared_vocab=40)
    same, made, text = apply.plan_run(cfg, facts)
    assert same is cfg and made is None and not text
    assert "memory is not predicted: " in (said := capsys.readouterr().out)
    assert "no num_attention_heads" in said


@pytest.mark.parametrize(
    ("gib", "is_gpu", "mib"),
    [(64, False, 320), (16, True, 1024), (80, True, 4096), (141, True, 5120)],
)
def test_chunks_of_the_loss_are_large_on_a_gpu(published, gib, is_gpu, mib):
    def chosen(*argv: str) -> int:
        job = job_of(published, "0.6B", ["0.6B"], *argv, gib=gib, is_gpu=is_gpu)
        return make_plan(job, frozenset()).choices.chunk

    assert chosen() == mib << 20
    assert chosen("--loss_chunk_bytes", "7") == 7


def test_a_chunk_of_the_loss_leaves_room_before_activations_are_computed_again(published):
    made = make_plan(
        job_of(published, "8B", ["8B"], "--prompts_per_step", "512", gib=44), frozenset()
    )
    assert made.fits and not made.choices.checkpointing and made.choices.chunk < 44 * GIB // 20
