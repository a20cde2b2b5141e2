"""Optimizer steps of a student with adapters on a fixed batch, many times over: one rank, or one of
a launcher's.

`lora_worker.py JOB`, a JSON file with `models` (name -> directory), `out` (a directory) and
`cases`. Rank 0 writes of each case `out/NAME.safetensors`, what is trained before (`start.`) and
after (`end.`) the steps and the merged weights at the end (`merged.`), and `out/NAME.json`.
"""

import dataclasses
import functools
import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from opd import distributed
from opd.config import ModelConfig, OptimConfig
from opd.distillation import payload_of
from opd.inputs.validation import load_ds_config
from opd.lora_config import LoraConfig
from opd.ops.heads import OutputHead
from opd.padding import count_loss_tokens
from opd.student import LossSettings, Student
from opd.teachers import ColocatedTeacher, TeacherPool
from tests.support.processes import ROOT
from tests.support.workers.gradient_worker import (
    ADAM_EPS,
    DOMAINS,
    LOSSES,
    VOCAB,
    Case,
    TeacherSpec,
    heads,
    my_micro_batches,
)
from train_mopd import token_loss

R, ALPHA, LEARNING_RATE = 4, 8, 0.5


@dataclass(frozen=True, kw_only=True)
class LoraCase:
    name: str
    model: str = "student"
    stage: int = 0
    steps: int = 2
    micro_batch_size: int = 8
    gradient_checkpointing: bool = False
    packing: bool = False
    dtype: str = "float32"
    targets: tuple[str, ...] = ("auto",)
    saved: tuple[str, ...] = ()
    deal: tuple[int, ...] | None = None
    threshold: int | None = None  # values up to which ZeRO-3 keeps a parameter whole
    save_to: str = ""  # writes a checkpoint at the end
    load_from: str = ""  # a checkpoint that the steps go on from
    learning_rate: float = LEARNING_RATE


def build(case: LoraCase, models: dict[str, str], device: torch.device, seed: int) -> Student:
    lora = LoraConfig(
        lora_r=R,
        lora_alpha=ALPHA,
        lora_targets=list(case.targets),
        lora_modules_to_save=list(case.saved),
    )
    ds_config = load_ds_config(str(ROOT / "ds_configs" / f"zero{case.stage}.json"))
    if case.threshold is not None:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = case.threshold
    return Student(
        ModelConfig(
            student_model=models[case.model],
            dtype=case.dtype,
            gradient_checkpointing=case.gradient_checkpointing,
        ),
        OptimConfig(learning_rate=case.learning_rate, adam_eps=ADAM_EPS, max_grad_norm=0.0),
        ds_config,
        device=device,
        settings=LossSettings(shared_vocab=VOCAB, packing=case.packing, domains=tuple(DOMAINS)),
        lora=lora,
        seed=seed,
    )


def frozen_of(student: Student) -> dict[str, torch.Tensor]:
    """The model's own weights, as they lie beside the adapters."""
    trained = {n for n, p in student.model.named_parameters() if p.requires_grad}
    return {n: t.clone() for n, t in student.named_full_parameters() if n not in trained}


def run_case(case: LoraCase, models: dict[str, str], out: Path, device: torch.device) -> None:
    from safetensors.torch import save_file

    student = build(case, models, device, seed=1 + bool(case.load_from))
    if case.load_from:
        student.load_shards(Path(case.load_from))
    teachers = [
        ColocatedTeacher(TeacherSpec(name, name, "*"), None, OutputHead(h.to(student.model.dtype)))
        for name, h in heads().items()
    ]
    cfg = LOSSES["full"]
    pool = TeacherPool(
        teachers, {}, cfg, payload=payload_of(cfg), cache_bytes=1 << 30, shared_vocab=VOCAB,
        device=device, turns=iter,
    )  # fmt: skip
    loss_of_token = functools.partial(token_loss, teachers=pool, cfg=cfg)
    start = {name: t.clone() for name, t in student.adapter_tensors()}
    before = frozen_of(student)
    cut = Case(
        name="", micro_batch_size=case.micro_batch_size, packing=case.packing, deal=case.deal
    )
    micro_batches = my_micro_batches(cut)
    num_loss_tokens = count_loss_tokens(micro_batches)
    losses, norms = [], []
    for _ in range(case.steps):
        total = 0.0
        for mb in micro_batches:
            loss = student.loss(mb, loss_of_token)
            scale = distributed.world_size() / num_loss_tokens
            student.backward(loss.loss_sum * scale, last=mb is micro_batches[-1])
            total += loss.loss_sum.item()
        norms.append(student.step(case.learning_rate))
        losses.append(distributed.all_reduce([total])[0] / num_loss_tokens)
    end = {name: t.clone() for name, t in student.adapter_tensors()}
    merged = {name: t.clone() for layer in student.full_layers() for name, t in layer}
    after = frozen_of(student)
    frozen = [p for p in student.model.parameters() if not p.requires_grad]
    record = {
        "losses": losses,
        "norms": norms,
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
        "frozen": sorted(before),
        "with_gradient": sum(p.grad is not None for p in frozen),
        "dtypes": sorted({str(t.dtype) for t in before.values()}),
        "moments": sum(
            v.numel()
            for state in student.engine.basic_optimizer.state.values()
            for v in state.values()
            if torch.is_tensor(v) and v.ndim
        ),
    }
    if case.threshold == 0:
        sizes = {p.numel() for p in frozen}  # of what is here
        assert sizes == {0}, sizes
    if case.save_to:
        student.save_shards(Path(case.save_to))
        distributed.barrier()
        files = (p for p in Path(case.save_to).rglob("*") if p.is_file())
        record["saved_bytes"] = sum(p.stat().st_size for p in files)
    if distributed.rank() == 0:
        parts = {"start": start, "end": end, "merged": merged}
        flat = {
            f"{part}.{name}": tensor.contiguous()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
        save_file(flat, out / f"{case.name}.safetensors")
        (out / f"{case.name}.json").write_text(json.dumps(record))
    student.engine.destroy()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    device = distributed.init()
    with distributed.exit_together():
        for fields in job["cases"]:
            names = {f.name for f in dataclasses.fields(LoraCase)}
            assert fields.keys() <= names
            run_case(LoraCase(**fields), job["models"], Path(job["out"]), device)
            gc.collect()


if __name__ == "__main__":
    main()
