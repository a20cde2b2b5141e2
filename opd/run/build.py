"""The participants of a run: student, rollout engine and teachers, each built on this rank and left
asleep.

What libraries print while they load goes to the rank's log.
"""

import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from opd import config, distributed
from opd.async_rollout import AsyncRolloutEngine
from opd.clients.served_checks import api_key_of, is_private
from opd.clients.served_teacher import ServedTeacher
from opd.distillation import payload_of
from opd.distributed import resolve_dtype
from opd.engines.deepspeed_engine import what_leaves
from opd.engines.hf_engine import HFEngine
from opd.engines.vllm_engine import HiddenStateEngine
from opd.faults import fault_point
from opd.inputs.adapters import engines_of
from opd.log import one_line, say, warn
from opd.ops.finite import all_finite
from opd.ops.heads import load_head, map_head
from opd.rollout import RolloutEngine
from opd.run.async_build import build_async_engine
from opd.run.context import Run
from opd.run.prepare import user_errors
from opd.student import LossSettings, Student
from opd.teachers import ColocatedTeacher, TeacherPool
from opd.types import CANARY_IDS


@contextmanager
def _console_to_log(run_dir: Path):
    """Sends this process's stdout and stderr, C++ warnings and progress bars included, to the
    rank's log for a while.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    console = {fd: os.dup(fd) for fd in (1, 2)}
    with (run_dir / "logs" / f"rank_{distributed.rank()}.log").open("ab") as log:
        for fd in console:
            os.dup2(log.fileno(), fd)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, saved in console.items():
            os.dup2(saved, fd)
            os.close(saved)


@contextmanager
def _building(run: Run, model: str):
    """Around the building of an engine and its first answer: what its library cannot do with a
    model is one line on all ranks.

    The traceback goes to the rank's log. `model` is what the user gave, with its flag.
    """
    try:
        with (
            distributed.agree_on_error("building its engine"),
            distributed.not_left_alone(),
            _console_to_log(run.run_dir),
        ):
            try:
                fault_point("build.engine")
                yield
            except Exception:
                traceback.print_exc()
                raise
    except (ValueError, distributed.RankError) as error:
        what = "" if isinstance(error, distributed.RankError) else "building its engine failed: "
        with user_errors():
            raise ValueError(
                f"{model}: {what}{one_line(error)}; the traceback is in {run.run_dir / 'logs'}"
            ) from None


def build_student(run: Run) -> Student:
    """The student under DeepSpeed. Collective: its weights are sharded while they load."""
    cfg = run.cfg
    leaves, why = what_leaves(
        run.ds_config,
        "none" if config.is_async(cfg) else cfg.model.offload_student,
        dtype=resolve_dtype(cfg.model.dtype),
        use_cuda=run.device.type == "cuda",
    )
    if why:
        say(f"--offload_student {cfg.model.offload_student}: {why}")
    with _console_to_log(run.run_dir):
        settings = LossSettings(
            temperature=cfg.loss.loss_temperature,
            shared_vocab=run.facts.shared_vocab,
            chunk_bytes=cfg.loss.chunk_bytes,
            packing=cfg.batch.packing,
            domains=run.domains,
            logprob_temperature=run.logprob_temperature,
        )
        student = Student(
            cfg.model,
            cfg.optim,
            run.ds_config,
            settings=settings,
            device=run.device,
            lora=cfg.lora,
            seed=distributed.fold_seed(cfg.run.seed, "lora"),
        )
    if cfg.batch.packing:
        with user_errors():
            student.check_packing()
    student.sharded.offloads = leaves
    return student


def build_teachers(run: Run) -> list[ColocatedTeacher]:
    """Every colocated teacher on this rank: an engine and a head for each model, put to sleep as
    soon as it stands.
    """
    built = []
    on_disk = run.cfg.teacher.teacher_residency == "disk"
    for specs in engines_of(run.cfg.teachers).values():
        spec, *others = specs
        names = " ".join(f"--teacher {each.name} {each.model}" for each in specs)
        with _building(run, names):
            maps = on_disk and not spec.follows
            head = (map_head if maps else load_head)(spec.model)
            if spec.follows:
                head = head.in_type(resolve_dtype(run.cfg.model.dtype))
            teacher = ColocatedTeacher(spec, _build_engine(run, specs), head, others)
            for each in specs:
                _check_computes(teacher, each.name)
        with distributed.agree_on_error(f"putting teacher {spec.name} to sleep"):
            teacher.sleep()
        built.append(teacher)
    return built


def _check_computes(teacher: ColocatedTeacher, name: str) -> None:
    (state_LH,) = teacher.states([CANARY_IDS], name)
    weight_VH = teacher.head.weight_VH
    if not (all_finite(state_LH) and all_finite(weight_VH)):
        raise ValueError("it computes no numbers: look for NaN and infinity in its weights")


def build_served_teachers(run: Run) -> list[ServedTeacher]:
    """The teachers that run elsewhere, connected: what their servers are, `prepare` has
    found out.
    """
    teachers = []
    for spec in (spec for spec in run.cfg.teachers if spec.is_served):
        open_to_all = [url for url in spec.urls if spec.api_key_env and not is_private(url)]
        if open_to_all and distributed.rank() == 0:
            warn(
                f"teacher {spec.name}: its key goes to {open_to_all[0]} unencrypted; use https or "
                "a tunnel (ssh -L)"
            )
        with distributed.agree_on_error(f"connecting to teacher {spec.name}"):
            teachers.append(
                ServedTeacher(
                    spec,
                    run.served[spec.name],
                    run.cfg.loss,
                    limits=run.limits,
                    api_key=api_key_of(spec),
                    shared_vocab=run.facts.shared_vocab,
                    needs_head="hidden" in payload_of(run.cfg.loss),
                )
            )
    return teachers


def build_teacher_pool(
    run: Run, engines: list[ColocatedTeacher], turns: Callable[[Collection[str]], Iterator[str]]
) -> TeacherPool:
    """All teachers of the run; those that are served are connected here."""
    cfg = run.cfg
    return TeacherPool(
        engines,
        run.routes,
        cfg.loss,
        served=build_served_teachers(run),
        streams=cfg.teacher.teacher_mode != "colocate",
        payload=payload_of(cfg.loss),
        cache_bytes=cfg.teacher.teacher_cache_bytes,
        shared_vocab=run.facts.shared_vocab,
        device=run.device,
        turns=turns,
    )


def _build_engine(run: Run, specs: Sequence[config.TeacherSpec]) -> HiddenStateEngine | HFEngine:
    """The engine of teachers of one model."""
    spec, residency = specs[0], run.cfg.teacher.teacher_residency
    adapters = {each.name: each.adapter for each in specs if each.adapter}
    if spec.backend == "hf":
        # it has no cache to size
        options = {k: v for k, v in run.engine_options.items() if k != "max_model_len"}
        if spec.follows and residency == "disk":
            residency = "host"  # no file has its weights
        return HFEngine(
            spec.name,
            spec.model,
            device=run.device,
            residency=residency,
            adapters=adapters,
            **options,
        )
    return HiddenStateEngine(
        spec.name,
        spec.model,
        tokenizer=run.cfg.model.student_model,
        kv_cache_gib=run.kv_cache_gib(spec),
        kv_cache_grows=run.cfg.teacher.teacher_kv_cache_gib == "auto",
        tensor_parallel_size=spec.tensor_parallel_size,
        residency=residency,
        adapters=adapters,
        images_per_prompt=run.images_per_prompt(run.facts.teachers[spec.name]),
        **run.engine_options | {"max_model_len": max(map(run.length_for, specs))},
    )


def build_rollout_engine(run: Run) -> RolloutEngine | AsyncRolloutEngine:
    """The sampler on this rank, or what asks the servers for it.

    It sleeps, without weights, until the first push.
    """
    if config.is_async(run.cfg):
        return build_async_engine(run)
    with _building(run, f"--student_model {run.cfg.model.student_model}"):
        engine = RolloutEngine(
            run.cfg.model.student_model,
            run.cfg.rollout,
            stop_ids=run.stop_ids,
            images_per_prompt=run.images_per_prompt(run.facts.student),
            seed=run.cfg.run.seed,
            kv_cache_gib=run.kv_cache_gib(),
            lora=run.sampler_adapter,
            **run.engine_options,
        )
        engine.try_out(run.shown)
    with distributed.agree_on_error("putting the rollout engine to sleep"):
        engine.sleep()
    return engine
