"""Published shapes: the plan's KV caches are what vLLM's own check wants; no weight is read."""

import pytest
import torch

import train_mopd
from opd.config import GIB
from opd.engines.vllm_process import as_transformers, import_vllm, kept_classes
from opd.inputs.arguments import parse
from opd.inputs.kv_cache import BLOCK, SMALL_BLOCK, one_sequence_bytes
from opd.inputs.shapes import model_of, read_model, shape_of
from opd.plan.job import Machine, make_job
from opd.plan.planner import check_caches, make_plan
from scripts.measure.families import FAMILIES, make_config
from tests.support.processes import ROOT
from tests.support.published import PARAMETERS, PUBLISHED, write_config

LENGTHS = {"short": 1024, "long": 16_384}  # --max_response_tokens, beside prompts of 1024
H100 = Machine(gpus=8, device_bytes=80 * GIB, host_bytes=2048 * GIB, pcie=25e9, is_gpu=True)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """name -> (directory, shape)."""
    root, found = tmp_path_factory.mktemp("published"), {}
    for name in PUBLISHED:
        path = write_config(name, root)
        found[name] = path, shape_of(read_model("--x", path), "--x", path)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_card(shapes, name):
    assert shapes[name][1].num_parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=0.001)


def job_of(shapes, student: str, teacher: str, response: int, *flags: str, machine=H100):
    argv = ["--student_model", shapes[student][0], "--teacher", shapes[teacher][0], *flags]
    argv += ["--data", "d", "--output_dir", "o", "--ds_config", str(ROOT / "ds_configs/zero3.json")]
    cfg = parse(train_mopd.Config, [*argv, "--max_response_tokens", str(response)])
    return make_job(cfg, shapes[student][1], {"default": shapes[teacher][1]}, machine)


@pytest.fixture(scope="module")
def needed_by_vllm(device, shapes):
    """(model directory, tokens, block) -> bytes that vllm 0.32 asks for, of the layers that it
    builds itself, on a device without memory.
    """
    import_vllm()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.worker import worker_base

    def needed(path: str, tokens: int, block: int | None = None) -> int:
        options = as_transformers() | {"load_format": "dummy", "enforce_eager": True}
        config = EngineArgs(
            model=path,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=tokens,
            block_size=block,
            max_num_batched_tokens=16_384,
            **options,
        ).create_engine_config()
        config.cache_config.block_size = block or config.cache_config.block_size
        with set_current_vllm_config(config):
            if parallel_state._WORLD is None:  # the first model is one with experts
                parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
                parallel_state.initialize_model_parallel(1, 1)
            dtype = set_default_torch_dtype(torch.bfloat16)
            with kept_classes(), torch.device("meta"), dtype:
                initialize_model(config)
        layers = config.compilation_config.static_forward_context.items()
        specs = {
            key: spec
            for key, layer in layers
            if isinstance(layer, AttentionLayerBase)
            and (spec := layer.get_kv_cache_spec(config)) is not None
        }
        backends = worker_base.get_current_attn_backends(config)
        layouts = [each.name for each in worker_base.get_supported_kv_cache_layouts(backends)]
        resolve_kv_cache_layout(config, [layouts], list(specs.values()))
        groups = kv_cache_utils.get_kv_cache_groups(config, specs)
        if not groups:
            return 0
        least = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
        return least + kv_cache_utils._pool_bytes_per_block(config, groups)

    needed(shapes["Qwen3-30B-A3B"][0], 64, 16)
    yield needed
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_default_flags_give_every_engine_the_cache_that_vllm_asks_for(
    shapes, needed_by_vllm, name, length
):
    response = min(LENGTHS[length], shapes[name][1].context - 1024)
    job = job_of(shapes, name, name, response)
    needed = needed_by_vllm(shapes[name][0], 1024 + response, 16)
    choices = make_plan(job, frozenset()).choices
    assert choices.kv_cache >= needed
    assert choices.teacher_kv["default"] * choices.tensor_parallel["default"] >= needed
    # what is given by hand is refused exactly where vLLM would
    for flag in ("--rollout_kv_cache_gib", "--teacher_kv_cache_gib"):
        check_caches(job_of(shapes, name, name, response, flag, repr(needed / GIB)))
    # of windows vLLM keeps what it computes at once, too, on a CPU in blocks of 32
    if all(layers.window is None for layers in job.student.cached):
        with pytest.raises(ValueError, match=r"--teacher_kv_cache_gib .*: one sequence of"):
            check_caches(
                job_of(
                    shapes, name, name, response, "--teacher_kv_cache_gib", repr((needed - 1) / GIB)
                )
            )


@pytest.mark.parametrize("name", PUBLISHED)
def test_on_a_cpu_blocks_are_larger(shapes, needed_by_vllm, name):
    cpu = Machine(1, 512 * GIB, 0, 25e9, is_gpu=False)
    job = job_of(shapes, name, name, 1024, "--dtype", "bfloat16", machine=cpu)
    needed = needed_by_vllm(shapes[name][0], 2048, 128)
    least = make_plan(job).choices.teacher_kv["default"]
    assert needed <= least


KNOWN = [family for family in FAMILIES if family.is_known]
CHOSEN = {"gemma4", "falcon", "minicpm3", "deepseek_v3"}
EACH_SIXTH = [f for i, f in enumerate(KNOWN) if f.name in CHOSEN or i % 6 == 0]


@pytest.mark.parametrize(
    ("families", "least"),
    [
        pytest.param(EACH_SIXTH, 12, id="each sixth"),
        pytest.param(KNOWN, 76, id="all", marks=pytest.mark.long),  # ten minutes
    ],
)
def test_every_family_gets_enough_and_none_is_refused_that_would_run(
    families, least, needed_by_vllm, tmp_path
):
    """The families of docs/models.md that vLLM builds without weights; those that keep states too
    are never refused, and their engines take what vLLM says.
    """
    built = {}
    for family in families:
        path = tmp_path / family.name
        config = make_config(family, 0, 1)
        model = model_of(config, "--x", family.name)
        config.architectures = [type(model).__name__]
        config.save_pretrained(path)
        shape = shape_of(read_model("--x", str(path)), "--x", family.name)
        try:
            needed = needed_by_vllm(str(path), 500)
        # vLLM does not have it, or wants its weights
        except (AssertionError, AttributeError, NotImplementedError, ValueError):
            continue
        most, fewest = (
            one_sequence_bytes(shape.cached, 500, width=2, in_flight=tokens, block=block)
            for tokens, block in ((2 * 16_384, BLOCK), (2048, SMALL_BLOCK))
        )
        built[family.name] = shape.keeps_states or fewest <= needed <= most
    assert [name for name, is_right in built.items() if not is_right] == []
    assert len(built) >= least and built.keys() >= CHOSEN


def test_the_run_of_two_large_teachers_is_planned_without_a_flag(shapes):
    """A student of 4B, teachers of 32B and 30B-A3B, responses of 16k, eight GPUs of 80 GB."""
    (student, small), (dense, large), (moe, sparse) = (
        shapes[name] for name in ("Qwen3-4B", "Qwen3-32B", "Qwen3-Coder-30B-A3B")
    )
    argv = ["--student_model", student, "--teacher", f"math={dense}", "--teacher", f"code={moe}"]
    argv += ["--data", "d", "--output_dir", "o", "--ds_config", str(ROOT / "ds_configs/zero3.json")]
    cfg = parse(train_mopd.Config, [*argv, "--max_response_tokens", "16384"])
    teachers = {"math": large, "code": sparse}
    narrow = Machine(8, 80 * GIB, 768 * GIB, 25e9, is_gpu=True)
    made = make_plan(make_job(cfg, small, teachers, narrow), cfg.explicit)
    assert made.fits and made.choices.checkpointing
    assert made.choices.max_tokens >= 17_407 and made.choices.support == "auto"
    # copies of sleeping teachers are shared: 927 GiB by themselves
    assert max(made.choices.tensor_parallel.values()) > 1
    ahead = parse(
        train_mopd.Config,
        [*argv, "--max_response_tokens", "16384", "--mode", "async", "--rollout_gpus", "0,1"],
    )
    held = make_plan(make_job(ahead, small, teachers, narrow))
    states = [row for row in held.rows if row.participant in ("fp32 masters", "AdamW moments")]
    assert all(len(set(row.bytes.values())) == 1 for row in states), "they stay on the GPU"


def test_a_teacher_that_writes_has_a_cache_of_its_own(shapes):
    """The sampler's would be too large beside 32B; and 32B does not write on a GPU of 64 GB."""
    job = job_of(shapes, "Qwen3-4B", "Qwen3-32B", 16_384)
    made = make_plan(job, job.cfg.explicit)
    size, fits = made.teacher_writes("default")
    assert fits and 4.25 * GIB < size < (0.92 * 80 - 61) * GIB
    narrow = Machine(8, 64 * GIB, 2048 * GIB, 25e9, is_gpu=True)
    job = job_of(shapes, "Qwen3-4B", "Qwen3-32B", 16_384, machine=narrow)
    assert not make_plan(job, job.cfg.explicit).teacher_writes("default")[1]
