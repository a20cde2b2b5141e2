"""What both trainers set up alike, and what they write down: checks, data, teachers, evaluation,
checkpoints, report.

Nothing here knows a loss. `prepare` finds every mistake of the user before a weight is loaded.
"""

import dataclasses
import functools
import sys
import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from opd import distributed, faults, processes
from opd.clients.served_checks import check_served, check_servers_see
from opd.config import TeacherSpec
from opd.engines.deepspeed_engine import check_ds_config
from opd.hub_names import as_named
from opd.inputs import content, hub, models, prompts, rewards, routing
from opd.inputs.dialects import check_dialects
from opd.inputs.dry_run import dry_run_report
from opd.inputs.identity import allowed_changes, check_output_dir, fingerprint_of, flag_of
from opd.inputs.own_prompts import warn_of_first_tokens, with_own_bounds
from opd.inputs.shapes import check_tensor_parallel
from opd.inputs.teacher_prompts import own_prompts
from opd.inputs.template_flags import read_template_flags
from opd.inputs.validation import check_wandb, load_ds_config
from opd.inputs.vision_rules import check_images, load_pixels
from opd.log import say, setup_logging
from opd.options import to_dict
from opd.plan.apply import plan_run
from opd.records import checkpoint
from opd.records.changes import FlagChange, check_fingerprint, record_changes
from opd.records.files import write_run_files
from opd.records.hub_upload import check_push
from opd.run import stopping
from opd.run.context import Inputs, Run
from opd.run.evaluation import asked

DOWNLOAD_TIMEOUT = timedelta(days=1)


@contextmanager
def user_errors():
    """A user's mistake, a ValueError in here, becomes one line on rank 0 and exit status 2."""
    try:
        yield
    except ValueError as error:
        if distributed.rank() == 0:
            line = as_named(" ".join(str(error).split()))
            print(f"error: {line}", file=sys.stderr, flush=True)
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
    check_push(cfg.run.push_to_hub)
    cfg, is_from_hub = _with_snapshots(cfg)
    with distributed.agree_on_error("checking the inputs"):
        check_wandb(cfg.run.report_to)
        inputs = read_inputs(cfg, need_response, moment)

    cfg, plan, memory = plan_run(inputs.cfg, inputs.facts)
    inputs = dataclasses.replace(inputs, cfg=cfg)
    if cfg.run.dry_run:
        say(dry_run_report(cfg, inputs.train_set, inputs.tokenizer, inputs.facts, memory=memory))
        distributed.barrier()  # nobody leaves while another is in a collective operation
        sys.exit(0)
    if is_from_hub:
        # one machine may have them already, while another downloads for hours
        with distributed.agree_on_error("downloading the models", timeout=DOWNLOAD_TIMEOUT):
            models.fetch_models(cfg)

    hashes = {t.name: _hash_of(t, inputs) for t in cfg.teachers}
    fingerprint = fingerprint_of(cfg, hashes, inputs.train_set.content_hash)
    if inputs.facts.stop_ids:
        fingerprint["stop_token_ids"] = sorted(inputs.facts.stop_ids)
    if cfg.model.freeze_vision:
        fingerprint["freeze_vision"] = True
    fingerprint["eval"] = asked(inputs)
    if inputs.train_set.moment:
        fingerprint[checkpoint.FIRST_START] = inputs.train_set.moment.isoformat()
    resume_from, changed = _open_run_dir(inputs, fingerprint)
    say(f"resumes from {resume_from}" if resume_from else "starts fresh")
    for change in changed:
        say(f"changes from here on: {change}")
    for name, prompt_set in (("training", inputs.train_set), ("held-out", inputs.eval_set)):
        if prompt_set is not None:
            say(f"{name} prompts: {prompt_set.summary}")
    return Run(
        **{field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)},
        device=device,
        run_dir=Path(cfg.run.output_dir),
        hashes=hashes,
        fingerprint=fingerprint,
        resume_from=resume_from,
        changes=changed,
        started=started,
        plan=plan,
    )


def _hash_of(spec: TeacherSpec, inputs: Inputs) -> str:
    """What a teacher is, by content: its model, its adapter, and how it follows the student."""
    if spec.is_served and not spec.has_local_model:
        return inputs.served[spec.name].identity
    parts = [content.content_hash(spec.model)]
    if spec.adapter:
        parts.append(content.content_hash(spec.adapter))
    if spec.follows:
        parts.append(spec.named_model)
    return " ".join(parts)


def _with_snapshots(cfg) -> tuple[Any, bool]:
    """The configuration with local directories in place of hub ids, and whether there was one.

    Rank 0 asks which commits they are, for all ranks: a branch may move. Collective.
    """
    with distributed.agree_on_error("finding the models"):
        found = hub.find_models(cfg) if distributed.rank() == 0 else {}
    pinned = {model: as_named(path) for model, path in found.items()}
    pinned = distributed.broadcast_object(pinned)
    with distributed.agree_on_error("finding the models"):
        cfg = hub.with_models(cfg, pinned)
        return hub.with_models(cfg, hub.find_models(cfg)), bool(pinned)


def read_inputs(cfg, need_response: bool, moment: datetime | None = None) -> Inputs:
    """Models' configurations, tokenizer, prompts and routes, each checked against the others; no
    collective.
    """
    ds_config = load_ds_config(cfg.run.ds_config)
    tokenizer = models.load_tokenizer(cfg.model.student_model, cfg.model.trust_remote_code)
    facts = models.check_models(cfg, tokenizer)
    check_tensor_parallel(cfg, facts.student, facts.teachers, distributed.world_size())
    facts, served = check_served(cfg, tokenizer, facts)
    pixels = None
    if facts.student.sees:
        model, trust = cfg.model.student_model, cfg.model.trust_remote_code
        pixels = load_pixels("--student_model", model, trust)
        # of older families the template lies beside the processor
        tokenizer.chat_template = tokenizer.chat_template or pixels.processor.chat_template
    takes_all = next((t.name for t in cfg.teachers if t.domains == "*"), None)
    own = own_prompts(cfg)
    load = functools.partial(
        prompts.load_prompts,
        tokenizer=tokenizer,
        cfg=cfg.data,
        default_domain=takes_all,
        moment=moment,
        pixels=pixels,
        placeholder_ids=facts.student.placeholder_ids,
        own_prompts=own.values(),
        teachers=cfg.teachers,
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
        load(cfg.data.eval_data, flag="--eval_data", need_answer=True, is_held_out=True)
        if cfg.data.eval_data
        else None
    )
    prompt_sets = {"--data": train_set} | ({"--eval_data": eval_set} if eval_set else {})
    routes = routing.routes(cfg.teachers, list(prompt_sets.values()))
    read_template_flags(cfg.data).check_domains(routes)
    cfg = with_own_bounds(cfg, prompt_sets.values(), facts, served)
    check_dialects(facts.dialects, tokenizer, prompt_sets, routes)
    check_images(cfg, ds_config, facts, pixels, prompt_sets, routes)
    check_servers_see(cfg, served, prompt_sets, routes)
    warn_of_first_tokens(own.values(), tokenizer, prompt_sets.values())
    reward = rewards.load_rewards(cfg.data.reward_fn, routes)
    check_ds_config(cfg.run.ds_config, ds_config)
    inputs = Inputs(cfg, ds_config, tokenizer, facts, served, train_set, eval_set, routes, reward)
    inputs.feedback  # noqa: B018  refuses functions that are not there
    inputs.prompt_batch(0)  # refuses batch sizes and domain weights that do not fit
    judged = [*inputs.eval_prompts, *(train_set.prompts if cfg.loss.reward_weight > 0 else ())]
    rewards.check_answers(judged, cfg.data.reward_fn, routes)
    return inputs


def _open_run_dir(
    inputs: Inputs, fingerprint: dict[str, Any]
) -> tuple[Path | None, list[FlagChange]]:
    """The checkpoint that the run continues, if there is one, and what changes behind it, in a
    directory that is the run's own from here on. Collective.
    """
    cfg, changed = inputs.cfg, []
    run_dir = Path(cfg.run.output_dir)
    shards_parameters = inputs.ds_config.get("zero_optimization", {}).get("stage", 0) == 3
    resume_from = checkpoint.find(run_dir, cfg.run.resume, any_number=shards_parameters)
    # the fingerprint compares contents, so models and data may have moved
    if resume_from is not None:
        asks = inputs.eval_set is not None
        changed = _changes_since(resume_from, cfg, fingerprint, asks=asks)
    else:
        check_output_dir(run_dir, cfg.run.resume, cfg)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output_dir {run_dir}: cannot be made: {error}; choose another"
        ) from None
    checkpoint.set_aside_newer(run_dir, resume_from)
    processes.die_with_launcher(is_stopping=stopping.has_arrived)
    if distributed.rank() == 0:
        once = dataclasses.replace(cfg.run, allow_change=[])  # of this launch, and not of the run
        kept = to_dict(dataclasses.replace(cfg, run=once))
        write_run_files(run_dir, kept, sys.argv)
        step = checkpoint.load_state(resume_from).step if resume_from else 0
        record_changes(run_dir, step, changed)
    setup_logging(run_dir)
    return resume_from, changed


def _changes_since(
    resume_from: Path, cfg, fingerprint: dict[str, Any], *, asks: bool
) -> list[FlagChange]:
    """What `--allow_change` lets differ from the checkpoint; ValueError for anything else."""
    allowed = allowed_changes(cfg)
    # where nobody is asked, the question is only what follows from other flags
    if allowed and not asks:
        allowed.add("eval")
    changed = check_fingerprint(
        resume_from, fingerprint, allowed, functools.partial(flag_of, config=cfg)
    )
    done = checkpoint.load_state(resume_from).step
    if cfg.run.num_steps < done:
        raise ValueError(
            f"--num_steps {cfg.run.num_steps}: {resume_from} has done {done}; take at least as many"
        )
    return changed
