"""Gradients of many micro-batches in bfloat16, added up by real DeepSpeed engines.

`accumulation_worker.py JOB`, a JSON file with `out` (a file) and `cases`: {name: ds_config}. The
gradient of every weight is 256 in the first micro-batch and 1 in each of the MORE others: in
bfloat16, whose steps are 2 above 256, 256 + 1 is 256. Rank 0 writes {name: [norm, norm]}, of the
first step and of one more after the states have left and come back, if the stage knows that.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch import nn

SIZE, MORE = 16, 64


def run_case(ds_config: dict) -> list[float]:
    from opd.config import OptimConfig
    from opd.engines.deepspeed_engine import ShardedEngine

    stage = ds_config["zero_optimization"]["stage"]
    optim = OptimConfig(max_grad_norm=0.0)
    sharded = ShardedEngine(ds_config, optim, dtype=torch.bfloat16)
    sharded.offloads = frozenset({"states"} if stage else ())
    engine = sharded.attach(nn.Linear(SIZE, SIZE, bias=False).to(torch.bfloat16), ())
    norms = []
    for _ in range(2):
        sharded.place(states=True, parameters=True)
        for i in range(1 + MORE):
            x = torch.full((1, SIZE), 256.0 if i == 0 else 1.0, dtype=torch.bfloat16)
            sharded.backward(engine(x).sum(), last=i == MORE)
        norms.append(sharded.step(1e-3))
        sharded.place(states=False, parameters=True)
        sharded.settle()
    engine.destroy()
    return norms


def main() -> None:
    from opd import distributed

    job = json.loads(Path(sys.argv[1]).read_text())
    distributed.init()
    with distributed.exit_together():
        found = {}
        for name, ds_config in job["cases"].items():
            found[name] = run_case(ds_config)
            gc.collect()
        if distributed.rank() == 0:
            Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
