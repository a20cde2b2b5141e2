"""Prompts to rollouts: sampled by the student's engine, or written by a teacher in a child process.

P prompts, G samples per prompt, L response length.
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from opd import distributed, processes
from opd.config import LocalBackend, RolloutConfig
from opd.engines.hf_engine import HFGenerator
from opd.engines.vllm_engine import GeneratorEngine
from opd.faults import fault_point
from opd.ops.lora import LoraLayout
from opd.pictures import PromptImages
from opd.types import CANARY_IDS, Prompt, Rollout, Sample, WeightSource, WeightTarget

OWN_CANARY_TOLERANCE = 0.05  # nats; kernels may add up in another order


class RolloutEngine:
    """The student's sampler on this rank: stamps each rollout with the version of the weights that
    wrote it.
    """

    name = "rollout"

    def __init__(
        self,
        model: str,
        cfg: RolloutConfig,
        *,
        stop_ids: tuple[int, ...],
        seed: int,
        dtype: str,
        max_model_len: int,
        trust_remote_code: bool,
        kv_cache_gib: float | None = None,
        images_per_prompt: int | None = None,
        lora: LoraLayout | None = None,
    ):
        """Where the configuration leaves the KV cache to the plan, `kv_cache_gib` is its size. With
        `adapter` it takes the student's adapters instead of whole weights. A response ends at one
        of `stop_ids`.
        """
        given = cfg.rollout_kv_cache_gib
        self.cfg, self.stop_ids, self.seed = cfg, stop_ids, seed
        self.policy_version = 0
        self._canary, self._canary_version = None, -1
        self.engine = GeneratorEngine(
            model,
            dtype=dtype,
            max_model_len=max_model_len,
            kv_cache_gib=(kv_cache_gib or 0) if given == "auto" else given,
            kv_cache_grows=given == "auto",
            seed=seed,
            trust_remote_code=trust_remote_code,
            enforce_eager=cfg.enforce_eager,
            tensor_parallel_size=cfg.rollout_tensor_parallel_size,
            lora=lora,
            images_per_prompt=images_per_prompt,
        )

    @property
    def takes_adapter(self) -> bool:
        """Whether `load_weights` takes an adapter's tensors instead of whole weights."""
        return self.engine.lora is not None

    @property
    def awake(self) -> bool:
        return self.engine.awake

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self, tags: list[str] | None = None) -> None:
        was_ready = self.engine.ready
        self.engine.wake(tags)
        if self.engine.can_sleep and self.engine.ready and not was_ready:
            self._check_canary()

    def try_out(self, prompts: Sequence[Prompt] = ()) -> None:
        """Writes two tokens, and behind each of `prompts` one.

        Kernels that vLLM does not have for a model are missed when it first computes; so are images
        that it expands to other tokens than the student's processor does.
        """
        write = functools.partial(self.engine.generate, temperature=self.cfg.temperature)
        write([CANARY_IDS], [0], (), max_tokens=2)
        write(
            [p.token_ids for p in prompts],
            [0] * len(prompts),
            (),
            images=[p.images for p in prompts],
            max_tokens=1,
        )

    def _check_canary(self) -> None:
        """One greedy token of the engine that woke: known if its weights are, and never what a
        model without weights says.

        Level 2 drops the weights, so a wake that no load followed would sample from noise; and a
        cache that outlived a load would answer for old weights.
        """
        (sample,) = self.engine.generate([CANARY_IDS], [0], (), max_tokens=1, temperature=0.0)
        found = (sample.token_ids[0], sample.logprobs[0])
        known = self._canary if self._canary_version == self.policy_version else None
        if known is not None and (
            known[0] != found[0] or not abs(known[1] - found[1]) <= OWN_CANARY_TOLERANCE
        ):
            raise RuntimeError(
                f"rollout engine woke up with other weights: its canary is {found} (token, "
                f"log-probability), and was {known} under the same version {self.policy_version}"
            )
        if not math.isfinite(found[1]) or abs(found[1] + math.log(self.engine.vocab_size)) < 1e-6:
            raise RuntimeError(
                "rollout engine woke up without weights: its canary has the log-probability "
                f"{found[1]}"
            )
        self._canary, self._canary_version = found, self.policy_version

    def generate(
        self,
        prompts: Sequence[Prompt],
        step: int,
        *,
        with_logprobs: bool = True,
        on_finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """`num_generations` rollouts per prompt, prompt by prompt.

        The seed of a sample is a function of (seed, step, prompt, place in the global batch,
        sample): the same whatever the number of ranks and whatever else is in the batch.
        Log-probabilities cost the sampler time: without importance weights, a PPO ratio or a parity
        check nothing reads them. `on_finished` hears of each rollout as soon as it is complete,
        while others are still being written.
        """
        fault_point("rollout")
        places = places_of(prompts)
        repeated = [
            (p, i, g)
            for p, i in zip(prompts, places, strict=True)
            for g in range(self.cfg.num_generations)
        ]
        seeds = [sample_seed(self.seed, step, p, i, g) for p, i, g in repeated]

        def rollout(index: int, sample: Sample) -> Rollout:
            prompt, place, g = repeated[index]
            return self._rollout(sample_id_of(step, place, g), prompt, sample)

        samples = self.engine.generate(
            [p.token_ids for p, _, _ in repeated],
            seeds,
            self.stop_ids,
            images=[p.images for p, _, _ in repeated],
            max_tokens=self.cfg.max_response_tokens,
            temperature=self.cfg.temperature,
            top_p=self.cfg.top_p,
            top_k=self.cfg.top_k,
            with_logprobs=with_logprobs,
            on_finished=None
            if on_finished is None
            else lambda index, sample: on_finished(rollout(index, sample)),
        )
        fault_point("rollout.sampled")
        return [rollout(index, sample) for index, sample in enumerate(samples)]

    def fresh(self, rollouts: Sequence[Rollout], step: int) -> Sequence[Rollout]:
        """Those of a step's rollouts that the weights of now have written: here all."""
        return rollouts

    def generate_greedily(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response per prompt at temperature 0, for evaluation."""
        samples = self.engine.generate(
            [p.token_ids for p in prompts],
            [0] * len(prompts),
            self.stop_ids,
            images=[p.images for p in prompts],
            max_tokens=self.cfg.max_response_tokens,
            temperature=0.0,
            with_logprobs=False,
        )
        return [
            self._rollout(f"greedy/{p.prompt_id}/0", p, s)
            for p, s in zip(prompts, samples, strict=True)
        ]

    def _rollout(self, sample_id: str, prompt: Prompt, sample: Sample) -> Rollout:
        return Rollout(
            sample_id=sample_id,
            prompt=prompt,
            source="student",
            response_ids=sample.token_ids,
            rollout_logprobs=sample.logprobs,
            finish_reason="stop" if sample.stopped else "length",
            policy_version=self.policy_version,
        )

    def save(self, directory: Path) -> None:
        """Nothing: what it wrote is trained on before a checkpoint."""

    def load(self, directory: Path) -> None:
        """Nothing: `save` has written nothing."""

    def close(self) -> None:
        """Nothing: the engine ends with its process."""

    def load_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        load = self.engine.load_adapter if self.takes_adapter else self.engine.load_weights
        load(named_parameters)
        self.policy_version = version


def places_of(prompts: Sequence[Prompt]) -> range:
    """Where this rank's prompts stand in the global batch, which was dealt one by one
    to the ranks.
    """
    return range(
        distributed.rank(), distributed.world_size() * len(prompts), distributed.world_size()
    )


def sample_id_of(step: int, place: int, generation: int) -> str:
    """Unique in a run, and the same however often the run is killed and resumed."""
    return f"{step}/{place}/{generation}"


def sample_seed(seed: int, step: int, prompt: Prompt, place: int, generation: int) -> int:
    """The sampler's seed: whoever samples, and whenever."""
    return distributed.fold_seed(seed, step, prompt.prompt_id, place, generation, "rollout")


def dataset_rollouts(
    prompts: Sequence[Prompt], step: int, *, eos_ids: tuple[int, ...], policy_version: int
) -> list[Rollout]:
    """The prompts' own responses as rollouts, for off-policy distillation."""
    return [
        Rollout(
            sample_id=sample_id_of(step, place, 0),
            prompt=prompt,
            source="dataset",
            response_ids=prompt.target_ids,
            rollout_logprobs=None,
            finish_reason="stop" if prompt.target_ids[-1] in eos_ids else "length",
            policy_version=policy_version,
        )
        for place, prompt in zip(places_of(prompts), prompts, strict=True)
    ]


def with_rewards(
    rollouts: Sequence[Rollout], rewards: Sequence[float], advantages: Sequence[float]
) -> list[Rollout]:
    """Copies of `rollouts` that carry their task rewards and advantages."""
    return [
        replace(rollout, reward=reward, task_advantage=advantage)
        for rollout, reward, advantage in zip(rollouts, rewards, advantages, strict=True)
    ]


def write_with_model(
    model: str,
    prompts: Sequence[Prompt],
    *,
    log: Path,
    backend: LocalBackend = "vllm",
    adapter: str = "",
    **sampling,
) -> list[Sample]:
    """Responses of `model`, with a LoRA adapter or without, to `prompts`, from a child process of
    this rank that is gone afterwards, and its memory with it.

    Teachers write for two reasons only: once for the report, and once for `--seq_kd`. An engine
    that generates would cost the trainer a KV cache and an `lm_head` for the whole run. `sampling`
    is what `GeneratorEngine.generate` takes, plus dtype, max_model_len, kv_cache_gib (which grows
    to what one sequence takes), eos_ids, seed, trust_remote_code, enforce_eager and
    images_per_prompt. Raises
    RuntimeError with the end of the child's log if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        items = [
            {
                "prompt_id": p.prompt_id,
                "token_ids": p.token_ids,
                "images": p.images and p.images.to_json(),
            }
            for p in prompts
        ]
        asked = {"model": model, "backend": backend, "adapter": adapter, "prompts": items}
        request.write_text(json.dumps(asked | sampling))
        command = [sys.executable, "-m", "opd.rollout", str(request), str(answer), str(os.getpid())]
        with log.open("ab") as output:
            status = subprocess.run(
                command, stdout=output, stderr=output, env=_child_environment(), check=False
            ).returncode
        if status != 0:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(
                f"{model}: writing responses failed with status {status}: {' '.join(tail)}; see "
                f"{log}"
            )
        return [Sample(**sample) for sample in json.loads(answer.read_text())]


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OPD_FAULT")


def _child_environment() -> dict[str, str]:
    """This process's, for a child that is no rank and has this rank's GPU."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in LAUNCHED and not k.startswith("TORCHELASTIC_")
    }
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")])
    if "LOCAL_RANK" in os.environ and "CUDA_VISIBLE_DEVICES" in env:
        visible = env["CUDA_VISIBLE_DEVICES"].split(",")
        env["CUDA_VISIBLE_DEVICES"] = visible[int(os.environ["LOCAL_RANK"])]
    elif "LOCAL_RANK" in os.environ:
        env["CUDA_VISIBLE_DEVICES"] = os.environ["LOCAL_RANK"]
    return env


def _child_main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("request")
    parser.add_argument("answer")
    parser.add_argument("parent", type=int)
    args = parser.parse_args()
    processes.die_with_parent()
    if os.getppid() != args.parent:
        sys.exit("the trainer is gone")
    device = distributed.init()
    job = json.loads(Path(args.request).read_text())
    options = {name: job[name] for name in ("dtype", "trust_remote_code", "adapter")}
    if job["backend"] == "hf":
        generate = HFGenerator(job["model"], device=device, **options).generate
    else:
        engine = GeneratorEngine(
            job["model"],
            max_model_len=job["max_model_len"],
            kv_cache_gib=job["kv_cache_gib"],
            kv_cache_grows=True,
            seed=job["seed"],
            enforce_eager=job["enforce_eager"],
            images_per_prompt=job["images_per_prompt"],
            **options,
        )
        generate = functools.partial(engine.generate, with_logprobs=False)
    samples = generate(
        [item["token_ids"] for item in job["prompts"]],
        [
            distributed.fold_seed(job["seed"], item["prompt_id"], "teacher")
            for item in job["prompts"]
        ],
        tuple(job["eos_ids"]),
        images=[
            item["images"] and PromptImages.from_json(item["images"]) for item in job["prompts"]
        ],
        max_tokens=job["max_tokens"],
        temperature=job["temperature"],
    )
    rows = [
        {"token_ids": s.token_ids, "logprobs": s.logprobs, "stopped": s.stopped} for s in samples
    ]
    Path(args.answer).write_text(json.dumps(rows))


def push_weights(student: WeightSource, rollout_engine: WeightTarget, version: int) -> int:
    """Replaces the rollout engine's weights by the student's and returns the version that it
    samples with from now on.

    Collective: under ZeRO-3 every rank gathers the same buckets and feeds its own engine. The
    engine resets its caches and stamps what it samples from now on with `version`; if the load
    fails halfway the version is not stamped.
    """
    fault_point("sync.before")
    adapter = rollout_engine.takes_adapter
    tensors = student.adapter_tensors() if adapter else student.checkpoint_tensors()
    rollout_engine.load_weights(tensors, version)
    return rollout_engine.policy_version


if __name__ == "__main__":
    with distributed.exit_together():
        _child_main()
