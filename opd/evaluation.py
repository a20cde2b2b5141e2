"""Evaluation on held-out prompts: greedy answers, one score per prompt, and what teachers score on the same prompts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from opd import distributed
from opd.config import TeacherSpec
from opd.data import PromptSet
from opd.metrics import Metrics
from opd.rollout import RolloutEngine
from opd.run_files import replace_text
from opd.types import Prompt
from opd.vllm_engine import Sample

Scores = dict[str, list[float]]  # domain -> the score of each prompt, in prompt order
Judge = Callable[[Prompt, list[int]], float]  # (prompt, response ids) -> score
Write = Callable[[TeacherSpec, Sequence[Prompt], Path], list[Sample]]  # (teacher, prompts, log) -> its responses


def held_out(prompt_set: PromptSet, max_per_domain: int) -> list[Prompt]:
    """The prompts to evaluate on: all, or the first `max_per_domain` of each domain."""
    ids = prompt_set.ids_by_domain.values()
    return [prompt_set.prompts[i] for own in ids for i in (own[:max_per_domain] if max_per_domain else own)]


def _gather_scores(prompts: Sequence[Prompt], mine: list[float]) -> Scores:
    """All ranks' scores in the order of `prompts`; rank r scored prompts r, r + world_size, ..."""
    shares = distributed.gather_objects(mine)
    scores: Scores = {}
    for index, prompt in enumerate(prompts):
        share = shares[index % distributed.world_size()]
        scores.setdefault(prompt.domain, []).append(share[index // distributed.world_size()])
    return scores


def evaluate_student(engine: RolloutEngine, prompts: Sequence[Prompt], judge: Judge, metrics: Metrics) -> Scores:
    """Greedy answers of the student, spread over the ranks; adds `eval/*` per domain. Collective."""
    with distributed.agree_on_error("evaluating the student"):
        rollouts = engine.generate_greedily(prompts[distributed.rank() :: distributed.world_size()])
        mine = [judge(r.prompt, r.response_ids) for r in rollouts]
        for rollout, score in zip(rollouts, mine, strict=True):
            metrics.add(f"eval/accuracy/{rollout.prompt.domain}", score)
            metrics.add(f"eval/response_tokens/{rollout.prompt.domain}", len(rollout.response_ids))
            metrics.add(f"eval/truncated/{rollout.prompt.domain}", float(rollout.finish_reason == "length"))
    return _gather_scores(prompts, mine)


def evaluate_teachers(
    teachers: Sequence[TeacherSpec], routes: dict[str, tuple[tuple[str, float], ...]], prompts: Sequence[Prompt],
    judge: Judge, *, run_dir: Path, hashes: dict[str, str], write: Write,
) -> Scores:  # fmt: skip
    """Greedy answers of each domain's teacher (of a mixture, the one of the largest weight) on the same prompts.

    Done once, before the trainer's engines exist, and kept in `eval/teachers.json` under the teachers' and the data's
    hashes, so that a resumed run does not repeat it. `write(teacher, prompts, log)` gives a teacher's responses. A domain
    whose teacher is not among `teachers` has no scores. Collective.
    """
    path = run_dir / "eval" / "teachers.json"
    kept = distributed.broadcast_object(json.loads(path.read_text()) if path.exists() else None)
    if kept is not None and kept["hashes"] == hashes:
        return kept["scores"]
    chosen = {domain: max(entries, key=lambda entry: entry[1])[0] for domain, entries in routes.items()}
    scores: Scores = {}
    for spec in teachers:
        own = [p for p in prompts if chosen[p.domain] == spec.name]
        if not own:
            continue
        with distributed.agree_on_error(f"evaluating teacher {spec.name}"):
            share = own[distributed.rank() :: distributed.world_size()]
            log = run_dir / "logs" / f"teacher_eval_{distributed.rank()}.log"
            samples = write(spec, share, log) if share else []
            mine = [judge(p, sample.token_ids) for p, sample in zip(share, samples, strict=True)]
        scores.update(_gather_scores(own, mine))
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"hashes": hashes, "scores": scores}))
    return scores


def remember(run_dir: Path, step: int, scores: Scores) -> None:
    """Keeps the student's scores of a step; a resumed run needs those of step 0 for its report."""
    if distributed.rank() == 0:
        path = run_dir / "eval" / f"step_{step}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(scores))


def recall(run_dir: Path, step: int) -> Scores | None:
    """The scores that `remember` kept, the same on every rank. Collective."""
    path = run_dir / "eval" / f"step_{step}.json"
    return distributed.broadcast_object(json.loads(path.read_text()) if path.exists() else None)
