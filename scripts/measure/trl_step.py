"""One timed run of TRL's DistillationTrainer: the other side of scripts/bench_step.py, which starts
it as a child process.

It trains on the models and prompts that bench_step.py wrote and leaves one JSON object in
``--out``: seconds of every step and of its parts, mean response lengths, losses, and the ZeRO stage
that DeepSpeed really ran. Float32, no gradient checkpointing, a constant learning rate, prompts in
the order of the file. TRL 1.16 needs two changes to run its in-process vLLM on a CPU and in the
same precision as the other side:

* vLLM's CPU build packs its linear weights, and TRL's parameter-wise ``load_weights`` then fails on
  them. The weights go
  through the engine's own ``reload_weights`` instead, in one call, from TRL's own iterator over
  gathered parameters.
* TRL leaves vLLM's dtype on ``auto``, which is not float32 for a float32 checkpoint.

DeepSpeed reduces through gloo on both sides: the shared-memory reduction is compiled on first use,
for a minute or more.

    PYTHONPATH=.trl python scripts/measure/trl_step.py --student S --teacher T --data prompts.jsonl
    --out result.json ...
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Seconds per step, from before the batch is generated to after the optimizer."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {"step": []}

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        for name, values in self.seconds.items():
            if name != "step":
                values.append(0.0)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds["step"].append(time.perf_counter() - self.started)

    def timed(self, function, name: str):
        """`function`, whose seconds count toward the phase `name` of the current step."""
        self.seconds[name] = []

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name][-1] += time.perf_counter() - started

        return wrapped


def repair_vllm() -> None:
    """Weights reach the packed layers of a CPU build, and the engine computes in float32."""
    from trl.generation import vllm_generation

    def sync_weights(self):
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(
            weights_iterator=((name, p.detach()) for name, p in self._iter_named_params())
        )
        self.llm.reset_prefix_cache()

    vllm_generation.VLLMGeneration.sync_weights = sync_weights
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32")


def make_trainer(args: argparse.Namespace, clock: Clock):
    """TRL's trainer with our models, prompts and loss, and a clock in it."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    on_cpu = not torch.cuda.is_available()
    if args.ds_config:
        import deepspeed

        if on_cpu:
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    use_vllm = args.generation == "vllm"
    if use_vllm:
        repair_vllm()
    # Before the configuration: it makes transformers partition models while they load, before the
    # ranks have met.
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)
        for p in (args.student, args.teacher)
    )
    config = DistillationConfig(
        output_dir=str(args.out.parent / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        max_completion_length=args.response_tokens,
        beta=1.0,
        temperature=1.0,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        seed=args.seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=False,
        deepspeed=args.ds_config,
        use_vllm=use_vllm,
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=args.prompt_tokens + args.response_tokens,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.student, padding_side="left"),
        callbacks=[clock],
    )
    trainer._generate = clock.timed(trainer._generate, "generate")
    trainer.compute_loss = clock.timed(trainer.compute_loss, "loss_forward")
    if use_vllm:  # a part of `generate`
        engine = trainer.vllm_generation
        engine.sync_weights = clock.timed(engine.sync_weights, "sync")
    return trainer


def result_of(trainer, clock: Clock) -> dict:
    """What a finished run measured."""
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = {name: values for name, values in clock.seconds.items() if values}
    if "sync" in seconds:
        seconds["generate"] = [
            g - s for g, s in zip(seconds["generate"], seconds["sync"], strict=True)
        ]
    parts = [values for name, values in seconds.items() if name != "step"]
    seconds["backward_and_optimizer"] = [
        step - sum(rest) for step, *rest in zip(seconds["step"], *parts, strict=True)
    ]
    engine = trainer.model_wrapped  # DeepSpeed's, if there is one
    return {
        "zero_stage": engine.zero_optimization_stage()
        if hasattr(engine, "zero_optimization_stage")
        else 0,
        "seconds": seconds,
        "response_tokens": [entry["completions/mean_length"] for entry in logged],
        "losses": [entry["loss"] for entry in logged],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("student", "teacher"):
        parser.add_argument(f"--{name}", required=True, help="model directory")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of {prompt: chat messages}")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--generation", choices=["hf", "vllm"], required=True)
    for name in ("steps", "batch", "prompt_tokens", "response_tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--ds_config", help="DeepSpeed configuration; absent: plain torch")
    args = parser.parse_args()
    clock = Clock()
    trainer = make_trainer(args, clock)
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        args.out.write_text(json.dumps(result_of(trainer, clock)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
