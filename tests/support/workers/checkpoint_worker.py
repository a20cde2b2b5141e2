"""Trains a tiny model under real DeepSpeed (ZeRO-3, gloo, CPU) and saves through
`opd.records.checkpoint`.

`checkpoint_worker.py JOB` is one rank of a launcher, or the only one. `checkpoint_worker.py serve`
reads a JOB per line, forks the job's ranks, waits for them and answers with one line: exit
statuses, standard error, the ranks' results. That saves the import of torch in each of dozens of
trials; the ranks are real processes all the same.

A JOB is a JSON object: `run_dir`, `num_steps`, and optionally `resume` (default auto), `keep` (2),
`world_size` (1; for `serve`), `fault` ("point:kill") with `fault_rank` and `strike_at` (the step
whose save is struck), `full_disk_rank`, `any_number` (of ranks may have written), `save_as`
(another run directory, where the last step is saved too), `optim` (fields of `OptimConfig`). With
`export_from` (a model directory) the job is one export of that model from under ZeRO-3. With
`shards_of` (a model directory), `stage` and `dtype` it trains that model and reads its shards.
"""

import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

from tests.support.processes import ROOT

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd import distributed, processes
from opd.config import OptimConfig
from opd.engines.deepspeed_engine import ShardedEngine
from opd.engines.shards import Shards
from opd.faults import fault_point
from opd.records import changes, checkpoint, export
from opd.types import LoopState

RANK_DEADLINE = 300  # seconds; a rank that hangs is ended by SIGALRM and its trial fails


class StruckWriter:
    """DeepSpeed's file writer with a place to strike after each shard."""

    def __init__(self, writer):
        self.writer = writer

    def __getattr__(self, name):
        return getattr(self.writer, name)

    def save(self, state_dict, path):
        self.writer.save(state_dict, path)
        fault_point("worker.first_shard")


def zero_3(optim: dict | None = None) -> ShardedEngine:
    ds_config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    return ShardedEngine(ds_config, OptimConfig(**(optim or {})), dtype=torch.float32)


def build(optim: dict | None = None) -> ShardedEngine:
    torch.manual_seed(0)
    sharded = zero_3(optim)
    sharded.attach(
        nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8)), ()
    )
    held_errors = sharded.engine.checkpoint_engine
    held_errors.writer = StruckWriter(held_errors.writer)
    return sharded


def train_step(sharded: ShardedEngine, step: int) -> None:
    """The data is a function of (step, rank), the learning rate of the step."""
    generator = torch.Generator().manual_seed(
        distributed.fold_seed("data", step, distributed.rank())
    )
    x_BH = torch.randn(4, 8, generator=generator)
    sharded.backward((sharded.engine(x_BH) - x_BH.roll(1)).square().mean(), last=True)
    sharded.step(learning_rate=0.01 / (1 + step))


def state_hash(sharded: ShardedEngine) -> str:
    """SHA-256 over the parameters, the fp32 masters and all of Adam's state, of all ranks."""
    digest = hashlib.sha256()
    for name, tensor in sharded.named_full_parameters(sharded.engine.module):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    optimizer = sharded.engine.optimizer
    for master in optimizer.fp32_partitioned_groups_flat:
        digest.update(master.detach().numpy().tobytes())
        states = optimizer.optimizer.state[master]
        assert {"exp_avg", "exp_avg_sq", "step"} <= states.keys(), states.keys()
        for key in sorted(states):
            digest.update(torch.as_tensor(states[key]).numpy().tobytes())
    return hashlib.sha256(
        "".join(distributed.gather_objects(digest.hexdigest())).encode()
    ).hexdigest()


def whole_hash(sharded: ShardedEngine) -> str:
    """SHA-256 over the same, whole, as DeepSpeed itself gathers it: no matter how many ranks."""
    from deepspeed import utils

    digest = hashlib.sha256()
    for name, parameter in sharded.engine.module.named_parameters():
        moments = [
            utils.safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")
        ]
        for tensor in (utils.safe_get_full_fp32_param(parameter), *moments):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for name, tensor in sharded.named_full_parameters(sharded.engine.module):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    adam = sharded.engine.optimizer.optimizer.state
    digest.update(json.dumps([int(state["step"]) for state in adam.values()][:1]).encode())
    return digest.hexdigest()


def save(job: dict, sharded: ShardedEngine, state: LoopState) -> None:
    checkpoint.save(Path(job["run_dir"]), state, sharded.save, {"seed": 0}, keep=job.get("keep", 2))


def save_on_full_disk(job: dict, sharded: ShardedEngine, state: LoopState) -> str:
    """On one rank no file can grow beyond a few bytes. Returns what `save` raised."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == job["full_disk_rank"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, unlimited[1]))
    try:
        save(job, sharded, state)
    except RuntimeError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return ""


def run(job: dict) -> dict:
    distributed.init()
    sharded = build(job.get("optim"))
    run_dir = Path(job["run_dir"])
    found = checkpoint.find(
        run_dir, job.get("resume", "auto"), any_number=job.get("any_number", False)
    )
    state = LoopState()
    if found is not None:
        changes.check_fingerprint(found, {"seed": 0})
        sharded.load(found)
        state = checkpoint.load_state(found)
    checkpoint.set_aside_newer(run_dir, found)
    result = {"resumed": state.step}
    while state.step < job["num_steps"]:
        train_step(sharded, state.step)
        state.step += 1
        state.policy_version = state.step
        state.tokens_seen += 4
        strikes = job.get("strike_at") == state.step
        os.environ["OPD_FAULT"] = job.get("fault", "") if strikes else ""
        os.environ["OPD_FAULT_RANK"] = str(job.get("fault_rank", 0))
        if strikes and "full_disk_rank" in job:
            result["full_disk_error"] = save_on_full_disk(job, sharded, state)
            result["after_full_disk"] = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
        save(job, sharded, state)
    if "save_as" in job:
        save({**job, "run_dir": job["save_as"]}, sharded, state)
    if job.get("any_number"):
        result["whole"] = whole_hash(sharded)
    if "optim" in job:
        groups = sharded.engine.optimizer.param_groups
        result["adam"] = [[g["weight_decay"], *g["betas"], g["eps"]] for g in groups]
    return {
        **result,
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "hash": state_hash(sharded),
    }


def export_job(job: dict) -> dict:
    distributed.init()
    sharded = zero_3()
    model = AutoModelForCausalLM.from_pretrained(job["export_from"], dtype=torch.float32)
    sharded.attach(model, ())
    tokenizer = AutoTokenizer.from_pretrained(job["export_from"])
    partitioned = all(parameter.numel() == 0 for parameter in model.parameters())
    tensors = sharded.named_full_parameters(model)
    export.export_huggingface(
        Path(job["run_dir"]) / "model", model, tokenizer, tensors, model.generation_config
    )
    return {"partitioned": partitioned}


def shards_job(job: dict) -> dict:
    """What the shards of a trained model say of its parameters against what DeepSpeed gathers."""
    distributed.init()
    dtype, folder = getattr(torch, job["dtype"]), Path(job["run_dir"])
    ds_config = json.loads((ROOT / "ds_configs" / f"zero{job['stage']}.json").read_text())
    sharded = ShardedEngine(ds_config, OptimConfig(), dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(job["shards_of"], dtype=dtype)
    sharded.attach(model, tuple(model.get_output_embeddings().parameters()))
    for step in range(2):
        ids = torch.arange(8).view(2, 4) + distributed.rank() + step
        sharded.backward(sharded.engine(input_ids=ids).logits.float().square().mean(), last=True)
        sharded.step(learning_rate=0.01)
    sharded.save(folder)
    distributed.barrier()
    read = dict(Shards(folder).parameters())
    live = {name: t.clone() for name, t in sharded.named_full_parameters(model)}
    untrained = AutoModelForCausalLM.from_pretrained(job["shards_of"], dtype=dtype).state_dict()
    return {
        "names": sorted(live),
        "equal": sorted(
            n
            for n, t in live.items()
            if t.dtype == read[n].dtype == dtype and torch.equal(t, read[n])
        ),
        "trained": sum(not torch.equal(t, untrained[n]) for n, t in live.items()),
    }


OTHER_JOBS = {"export_from": export_job, "shards_of": shards_job}


def run_rank(job: dict, rank: int, port: int, result_path: Path, stderr_path: Path) -> None:
    """A forked rank. It never returns."""
    status = 1
    try:
        signal.alarm(RANK_DEADLINE)
        processes.die_with_parent()
        descriptor = os.open(stderr_path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.get("world_size", 1))
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        work = next((w for key, w in OTHER_JOBS.items() if key in job), run)
        result_path.write_text(json.dumps(work(job)))
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)  # no orderly shutdown: it would wait for a killed rank


def serve() -> None:
    # What the ranks would otherwise import one by one, after the fork. None of it starts a thread.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    torch.optim.AdamW([torch.zeros(1)])
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            port, ranks = processes.free_port(), range(job.get("world_size", 1))
            files = [(Path(folder) / f"result{r}", Path(folder) / f"stderr{r}") for r in ranks]
            children = []
            for rank in ranks:
                pid = os.fork()
                if pid == 0:
                    run_rank(job, rank, port, *files[rank])
                children.append(pid)
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
            results = [json.loads(out.read_text()) if out.exists() else None for out, _ in files]
            answer = {
                "statuses": statuses,
                "stderr": [err.read_text() for _, err in files],
                "results": results,
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "serve":
        serve()
    else:
        with distributed.exit_together():
            print("RESULT " + json.dumps(run(json.loads(sys.argv[1]))))
