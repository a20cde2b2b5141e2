"""What both trainers set up alike, and what they write down: checks, data, teachers, evaluation,
checkpoints, report.

Nothing here knows a loss. `prepare` finds every mistake of the user before a weight is loaded.
"""

import dataclasses
import functools
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch

from opd import config, distributed, faults, processes
from opd.clients.served_checks import check_served
from opd.engines.deepspeed_engine import check_ds_config
from opd.inputs import content, models, prompts, rewards
from opd.inputs.identity import check_output_dir, fingerprint_of
from opd.inputs.validation import load_ds_config
from opd.log import say, setup_logging
from opd.plan.apply import plan_run
from opd.records import checkpoint
from opd.records.files import write_run_files
from opd.run.context import Run
from opd.run.evaluation import asked


@contextmanager
def user_errors():
    """A user's mistake, a ValueError in here, becomes one line on rank 0 and exit status 2."""
    try:
        yield
    except ValueError as error:
        if distributed.rank() == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # rank 0 speaks first: launchers end all ranks when one has left
        sys.exit(2)


def prepare(cfg, *, need_response: bool = False) -> Run:
    """Joins the ranks and checks everything that can be checked before a weight is loaded; a
    `--dry_run` ends here.

    Raises ValueError with one line for whatever the user has to mend. A program calls it in
    `distributed.exit_together`.
    """
    started = time.time()
    faults.check()
    cfg.validate()
    device = distributed.init(cfg.run.local_rank)
    moment = checkpoint.first_start(Path(cfg.run.output_dir), cfg.run.resume)
    with distributed.agree_on_error("checking the inputs"):
        run = _read_inputs(cfg, device, need_response, moment)
    cfg, plan, memory = plan_run(cfg)
    run = dataclasses.replace(run, cfg=cfg, plan=plan)
    if cfg.run.dry_run:
        say(models.dry_run_report(cfg, run.train_set, run.tokenizer, run.facts, memory=memory))
        distributed.barrier()  # nobody leaves while another is in a collective operation
        sys.exit(0)

    hashes = {
        t.name: content.content_hash(t.model)
        if not t.is_served or t.has_local_model
        else run.served[t.name].identity
        for t in cfg.teachers
    }
    fingerprint = fingerprint_of(cfg, hashes, run.train_set.content_hash)
    fingerprint["eval"] = asked(run)
    if run.train_set.moment:
        fingerprint[checkpoint.FIRST_START] = run.train_set.moment.isoformat()
    resume_from = checkpoint.find(run.run_dir, cfg.run.resume)
    # the fingerprint compares contents, so models and data may have moved
    if resume_from is not None:
        checkpoint.check_fingerprint(resume_from, fingerprint)
    else:
        check_output_dir(run.run_dir, cfg.run.resume, cfg)
    try:
        run.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output_dir {run.run_dir}: cannot be made: {error}; choose another"
        ) from None
    checkpoint.set_aside_newer(run.run_dir, resume_from)
    processes.die_with_launcher()
    if distributed.rank() == 0:
        write_run_files(run.run_dir, config.to_dict(cfg), sys.argv)
    setup_logging(run.run_dir)
    say(f"resumes from {resume_from}" if resume_from else "starts fresh")
    for name, prompt_set in (("training", run.train_set), ("held-out", run.eval_set)):
        if prompt_set is not None:
            say(f"{name} prompts: {prompt_set.summary}")
    return dataclasses.replace(
        run, hashes=hashes, fingerprint=fingerprint, resume_from=resume_from, started=started
    )


def _read_inputs(
    cfg, device: torch.device, need_response: bool, moment: datetime | None = None
) -> Run:
    """Models' configurations, tokenizer, prompts and routes, each checked against the others; no
    collective.
    """
    ds_config = load_ds_config(cfg.run.ds_config)
    tokenizer = models.load_tokenizer(cfg.model.student_model, cfg.model.trust_remote_code)
    facts = models.check_models(cfg)
    models.check_tensor_parallel(cfg, facts, distributed.world_size())
    facts, served = check_served(cfg, tokenizer, facts)
    takes_all = next((t.name for t in cfg.teachers if t.domains == "*"), None)
    load = functools.partial(
        prompts.load_prompts,
        tokenizer=tokenizer,
        cfg=cfg.data,
        default_domain=takes_all,
        moment=moment,
    )
    train_set = load(
        cfg.data.data,
        flag="--data",
        need_answer=cfg.loss.reward_weight > 0,
        need_response=need_response,
        max_response_tokens=cfg.rollout.max_response_tokens,
        eos_ids=facts.student.eos_ids,
    )
    eval_set = (
        load(cfg.data.eval_data, flag="--eval_data", need_answer=True)
        if cfg.data.eval_data
        else None
    )
    routes = prompts.routes(cfg.teachers, [s for s in (train_set, eval_set) if s])
    reward = rewards.load_rewards(cfg.data.reward_fn, routes)
    models.check_downloads(cfg)
    check_ds_config(cfg.run.ds_config, ds_config)
    run = Run(
        cfg=cfg,
        device=device,
        run_dir=Path(cfg.run.output_dir),
        ds_config=ds_config,
        tokenizer=tokenizer,
        facts=facts,
        train_set=train_set,
        eval_set=eval_set,
        routes=routes,
        reward=reward,
        hashes={},
        served=served,
        fingerprint={},
        resume_from=None,
        started=0.0,
    )
    run.prompt_batch(0)  # refuses batch sizes and domain weights that do not fit
    judged = [*run.eval_prompts, *(train_set.prompts if cfg.loss.reward_weight > 0 else ())]
    rewards.check_answers(judged, cfg.data.reward_fn, routes)
    return run
