"""Evaluation on held-out prompts: greedy answers, one score per prompt, and what teachers score on
the same prompts.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd import distributed
from opd.config import GIB, TeacherSpec
from opd.inputs.teacher_prompts import own_prompts
from opd.log import say
from opd.records import report
from opd.records.files import replace_text
from opd.records.hub_upload import push_model
from opd.records.memory_ledger import Ledger
from opd.records.metrics import Metrics
from opd.records.model_card import model_card
from opd.records.report import Scores
from opd.rollout import RolloutEngine
from opd.run import stopping
from opd.run.context import Inputs, Judge, Run
from opd.run.student_export import export_student
from opd.student import Student
from opd.types import Prompt


def _gather_scores(prompts: Sequence[Prompt], mine: list[float]) -> Scores:
    """All ranks' scores in the order of `prompts`; rank r scored prompts r, r + world_size, ..."""
    shares = distributed.gather_objects(mine)
    scores: Scores = {}
    for index, prompt in enumerate(prompts):
        share = shares[index % distributed.world_size()]
        scores.setdefault(prompt.domain, []).append(share[index // distributed.world_size()])
    return scores


def evaluate_student(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    judge: Judge,
    metrics: Metrics,
    *,
    may_leave: bool = False,
) -> Scores:
    """Greedy answers of the student, spread over the ranks; adds `eval/*` per domain.

    With `may_leave` it is left, and nothing added, when the run is asked to stop. Collective.
    """
    with distributed.agree_on_error("evaluating the student"), stopping.interruptible(may_leave):
        rollouts = engine.generate_greedily(prompts[distributed.rank() :: distributed.world_size()])
        mine = [judge(r.prompt, r.response_ids) for r in rollouts]
    for rollout, score in zip(rollouts, mine, strict=True):
        metrics.add(f"eval/accuracy/{rollout.prompt.domain}", score)
        metrics.add(f"eval/response_tokens/{rollout.prompt.domain}", len(rollout.response_ids))
        metrics.add(
            f"eval/truncated/{rollout.prompt.domain}", float(rollout.finish_reason == "length")
        )
    return _gather_scores(prompts, mine)


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


def asked(run: Inputs) -> str:
    """What decides held-out scores beside the model, as text: kept scores are good for the same
    question only.
    """
    data_hash = run.eval_set.content_hash if run.eval_set else ""
    answers = {
        k: run.writing_options[k] for k in ("dtype", "max_model_len", "eos_ids", "max_tokens")
    }  # not what fits
    return json.dumps([data_hash, run.cfg.run.eval_max_prompts, run.cfg.data.reward_fn, answers])


def evaluate_teachers(run: Run) -> Scores:
    """Greedy answers of each domain's teacher (of a mixture, the one of the largest weight) on the
    held-out prompts.

    Done once, before any engine of this process is built, and kept in `eval/teachers.json` under
    the hashes of teachers and data, so that a resumed run does not repeat it. A domain whose
    teacher cannot write has no scores. Collective.
    """
    path, hashes = run.run_dir / "eval" / "teachers.json", {**run.hashes, "asked": asked(run)}
    kept = distributed.broadcast_object(json.loads(path.read_text()) if path.exists() else None)
    if kept is not None and kept["hashes"] == hashes:
        return kept["scores"]
    chosen = {
        domain: max(entries, key=lambda entry: entry[1])[0]
        for domain, entries in run.routes.items()
    }
    scores: Scores = {}
    for spec in run.cfg.teachers:
        own = [p for p in run.eval_prompts if chosen[p.domain] == spec.name]
        if own and (reason := run.why_silent(spec)):
            say(f"teacher {spec.name}: its own score, and the recovery, stay unknown: {reason}")
        elif own:
            _say_privilege(run, spec, own)
            scores.update(_teacher_scores(run, spec, own))
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"hashes": hashes, "scores": scores}))
    return scores


def _say_privilege(run: Run, spec: TeacherSpec, prompts: Sequence[Prompt]) -> None:
    """Which prompts a teacher that has its own is evaluated on: its score is what it teaches."""
    if spec.name in own_prompts(run.cfg):
        own = sum(spec.name in prompt.teacher_ids for prompt in prompts)
        say(f"teacher {spec.name}: has its own prompt in {own} of {len(prompts)} held-out prompts")


def _teacher_scores(run: Run, spec: TeacherSpec, prompts: Sequence[Prompt]) -> Scores:
    with distributed.agree_on_error(f"evaluating teacher {spec.name}"):
        share = prompts[distributed.rank() :: distributed.world_size()]
        log = run.run_dir / "logs" / f"teacher_eval_{distributed.rank()}.log"
        samples = run.write(spec, share, log) if share else []
        mine = [run.judge(p, sample.token_ids) for p, sample in zip(share, samples, strict=True)]
    return _gather_scores(prompts, mine)


def evaluate(run: Run, rollout_engine: RolloutEngine, metrics: Metrics, step: int) -> None:
    """Held-out scores of the student after `step` steps, kept for the report; nothing without
    `--eval_data`.
    """
    if run.eval_prompts:
        with metrics.timed("eval"):
            scores = evaluate_student(
                rollout_engine, run.eval_prompts, run.judge, metrics, may_leave=run.works_alone
            )
        remember(run.run_dir, step, scores)


def _say_memory(run: Run, ledger: Ledger) -> None:
    found = ledger.compare(run.predicted)
    phases = [
        f"{name} {r['predicted'] / GIB:.2f}/{r['measured'] / GIB:.2f} GiB"
        for name, r in found.items()
    ]
    if phases:
        say(f"memory, predicted/measured: {', '.join(phases)}")


def _report(run: Run, teacher_scores: Scores, was_done: bool) -> dict[str, Any] | None:
    """The content of report.json, which is written here unless the run `was_done` and has one;
    None without held-out prompts.

    Collective.
    """
    path, num_steps = run.run_dir / "report.json", run.cfg.run.num_steps
    kept = json.loads(path.read_text()) if was_done and path.exists() else None
    # rank 0's, for all: it may write the file before another has looked for it
    if (kept := distributed.broadcast_object(kept)) is not None:
        return kept
    before = recall(run.run_dir, 0)
    after = recall(run.run_dir, num_steps)
    if before is None or after is None:
        return None
    result = report.recovery_report(
        before, after, teacher_scores, steps=num_steps, wall_s=round(time.time() - run.started, 1)
    )
    if distributed.rank() == 0:
        report.write_report(run.run_dir, result)
    return result


def finish_run(
    run: Run, student: Student, teacher_scores: Scores, ledger: Ledger, *, was_done: bool
) -> None:
    """Memory as predicted and measured, with held-out prompts the report, and the Hugging Face
    export, whose card shows it; last its upload, if that is asked for. Collective.

    `was_done`: this start had no step left to train.
    """
    _say_memory(run, ledger)
    result = _report(run, teacher_scores, was_done)
    model_dir = run.run_dir / "model"
    sees = run.facts.student.sees
    card = model_card(run.cfg, Path(sys.argv[0]).name, result, sees=sees)
    export_student(run, student, model_dir, card=card)
    if result is not None:
        say(report.render_report(result))
    if run.cfg.run.push_to_hub:
        push_model(model_dir, run.cfg.run.push_to_hub)
