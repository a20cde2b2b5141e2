"""What ZeRO really holds: the tensors of a real engine, counted, for many settings; one rank, or
one of a launcher's.

`zero_worker.py JOB`, a JSON file with `out` (a directory) and `cases`: {name, model, dtype, zero,
lora_r} with `zero` the `zero_optimization` section. Every rank writes `out/NAME.RANK.json`: bytes
of parameters, gradients (open ones: between two micro-batches), masters and moments.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from opd import distributed
from opd.config import OptimConfig
from opd.engines.deepspeed_engine import ShardedEngine
from opd.lora_config import LoraConfig
from opd.ops.lora import add_adapter, layout_of


def held(tensors) -> int:
    """Bytes of the tensors, each memory once however many views it has."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t is not None
    }
    return sum(storages.values())


def wanted(tensors) -> int:
    """Bytes of the tensors' values, whatever memory they are views of."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def parameters_of(module) -> list[torch.Tensor]:
    """What stays between two steps: the partitions under ZeRO-3, with the parameters too small to
    be partitioned.
    """
    found = []
    for p in module.parameters():
        if not hasattr(p, "ds_tensor"):
            found.append(p)
            continue
        found.append(p.ds_tensor)
        if p.ds_persist:
            found.append(p)
    return found


def gradients_of(engine, stage: int) -> list[torch.Tensor]:
    """After the last backward of a step."""
    if stage == 0:
        return [p.grad for p in engine.module.parameters()]
    if stage == 3:
        return [engine.optimizer.grad_partitions_flat_buffer]
    return [g for group in engine.optimizer.averaged_gradients.values() for g in group]


def masters_of(engine, dtype: torch.dtype, stage: int) -> list[torch.Tensor]:
    """The float32 copies that AdamW steps on, where they are not the parameters themselves."""
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if stage in (1, 2):
        return list(engine.optimizer.single_partition_of_fp32_groups)
    return (
        []
        if dtype is torch.float32
        else [p for group in engine.optimizer.fp32_groups for p in group]
    )


def run_case(case: dict, out: Path) -> None:
    dtype, stage = getattr(torch, case["dtype"]), case["zero"]["stage"]
    sharded = ShardedEngine({"zero_optimization": case["zero"]}, OptimConfig(), dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype)
    if layout := layout_of(model, LoraConfig(lora_r=case["lora_r"])):
        add_adapter(model, layout, seed=0)
    engine = sharded.attach(model, tuple(model.get_output_embeddings().parameters()))
    ids = torch.arange(8).view(1, 8)
    sharded.backward(engine(input_ids=ids, labels=ids).loss, last=False)
    open_ones = [
        getattr(p, "grad_accum", None) if p.grad is None else p.grad for p in model.parameters()
    ]
    record = {"open_gradients": wanted(open_ones)}
    sharded.backward(engine(input_ids=ids, labels=ids).loss, last=True)
    record["gradients"] = wanted(gradients_of(engine, stage))
    sharded.step(1e-3)
    moments = [t for state in engine.basic_optimizer.state.values() for t in state.values()]
    record |= {
        "parameters": held(parameters_of(engine.module)),
        "masters": held(masters_of(engine, dtype, stage)),
        "moments": held(moments),
    }
    (out / f"{case['name']}.{distributed.rank()}.json").write_text(json.dumps(record))
    engine.destroy()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    distributed.init()
    with distributed.exit_together():
        for case in job["cases"]:
            run_case(case, Path(job["out"]))
            gc.collect()


if __name__ == "__main__":
    main()
