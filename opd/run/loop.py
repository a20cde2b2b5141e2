"""What always comes with the steps of a run, so that a script's loop holds its algorithm alone.

A phase is colocation, timing, agreement of all ranks on errors, and a checkpoint where a failure
would lose a step. Around the steps stand the ledgers, metrics, evaluation and checkpoints.
"""

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd import distributed
from opd.async_rollout import AsyncRolloutEngine
from opd.balance import deal
from opd.colocation import Colocation
from opd.config import is_async
from opd.inputs.arguments import trackers_of
from opd.log import say
from opd.mismatch import corrects, log_mismatch
from opd.options import to_dict
from opd.parity import Parity
from opd.past import PastTeachers
from opd.records import checkpoint
from opd.records.memory_ledger import Ledger
from opd.records.metrics import Metrics
from opd.records.report import Scores
from opd.records.sample_ledger import SampleLedger, sample_rows
from opd.rollout import RolloutEngine, dataset_rollouts, push_weights
from opd.run import stopping
from opd.run.build import build_rollout_engine, build_student, build_teacher_pool, build_teachers
from opd.run.context import Run
from opd.run.evaluation import evaluate, evaluate_teachers, finish_run, recall
from opd.run.feedback import FeedbackPrompts
from opd.run.pace import Pace, process_age_s
from opd.run.step_log import UnsharedTokens, log_own_prompts, log_servers, log_step
from opd.student import Student
from opd.teachers import TeacherPool
from opd.types import LoopState, LossOutput, MicroBatch, Prompt, Rollout, TeacherScores

# Phase -> what its ranks agree on, if one of them fails inside. In `train` nobody can be asked.
AGREED = {"rollout": "rollout", "score": "scoring"}
# Around these the weights are those of `LoopState`: a failure of all ranks saves them. In `sync`
# the push to servers is what they may agree on.
SAVED = ("rollout", "score", "sync")


def start(run: Run) -> "Loop":
    """Student, sampler and teachers on this rank's device, each asleep until its phase, with the
    checkpoint from which the run continues. Collective.
    """
    metrics = Metrics(
        run.run_dir,
        num_steps=run.cfg.run.num_steps,
        domains=run.domains,
        trackers=trackers_of(run.cfg.run.report_to),
        config=to_dict(run.cfg),
    )
    samples = SampleLedger(run.run_dir)
    teacher_scores = evaluate_teachers(run)  # in a child that is gone before the engines exist

    student, state, written = build_student(run), LoopState(), -1
    if run.resume_from is not None:  # `Loop.save_parts` has saved it
        student.load_shards(run.resume_from)
        state = checkpoint.load_state(run.resume_from)
        written = state.step
    metrics.truncate(written)
    samples.truncate(written)
    student.place(states=False, parameters=True)  # its optimizer states make room for the engines
    student.settle()
    rollout_engine = build_rollout_engine(run)
    if run.changes and is_async(run.cfg):
        say("responses that were written ahead are written again, with what has changed")
    elif run.resume_from is not None:
        rollout_engine.load(run.resume_from)

    engines, ledger = build_teachers(run), Ledger(run.run_dir / "ledger.jsonl", distributed.rank())
    colocation = Colocation(
        rollout_engine, student, engines, ledger, spare=run.spare, needs=run.teachers_of
    )
    teachers = build_teacher_pool(run, engines, colocation.turns)
    past = PastTeachers(engines, student)
    if run.resume_from is not None:
        past.load(run.resume_from, state.step)
    loop = Loop(
        run,
        student,
        rollout_engine,
        teachers,
        past,
        colocation,
        metrics,
        samples,
        state,
        teacher_scores,
    )
    loop.first_push()
    # DeepSpeed 0.19.8 and sleeping engines collect at every move. Most of what they visit is what
    # was imported, and takes .4 s each time.
    gc.collect()
    gc.freeze()
    stopping.listen()  # from here on there is something to save
    return loop


@dataclass
class Loop:
    """A run between its first push and its last checkpoint."""

    run: Run
    student: Student
    rollout_engine: RolloutEngine | AsyncRolloutEngine
    teachers: TeacherPool
    past: PastTeachers
    colocation: Colocation
    metrics: Metrics
    samples: SampleLedger
    state: LoopState  # what the weights of now have been trained on
    teacher_scores: Scores

    def __post_init__(self):
        cfg = self.run.cfg
        dtype, every = self.student.model.dtype, cfg.rollout.parity_every
        self.parity = Parity(self.run.micro_batches, cfg.rollout, every=every, dtype=dtype)
        self._unshared = UnsharedTokens(self.run)
        self.feedback = FeedbackPrompts(self.run)
        self.pace = Pace(cfg.run, process_age_s())
        self._saved = self.state.step  # the newest step with a checkpoint; 0 needs none
        self._was_done = self.state.step == cfg.run.num_steps
        # Of the step under way:
        self._started, self._num_loss_tokens = 0.0, 0
        self._rollouts: Sequence[Rollout] = ()
        self._rows: Sequence[dict] = ()  # for the ledger of samples
        self._fresh: Sequence[Rollout] | None = None  # what parity judges, where it is due

    # ---- Phases ----------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of `opd/colocation.py`, timed. Where it has one answer, all ranks agree on it."""
        with ExitStack() as stack:
            if name in SAVED:
                stack.enter_context(self._saves_on_failure(has_line=name != "sync"))
            stack.enter_context(self.colocation.phase(name))
            stack.enter_context(self.metrics.timed(name))
            if name in AGREED:
                stack.enter_context(distributed.agree_on_error(AGREED[name]))
                stack.enter_context(stopping.interruptible(self.run.works_alone))
            yield
            if name == "train":
                self.teachers.release_head()

    @contextmanager
    def _saves_on_failure(self, *, has_line: bool) -> Iterator[None]:
        """If all ranks stop here, as without a teacher or when asked to, they save the step that is
        done.

        A checkpoint of other weights would train on a step twice. `has_line` says that the
        finished step has its line in `metrics.jsonl`. A run that has no step to save starts
        afresh, and repeats what it did.
        """
        try:
            yield
        except Exception as error:
            if not distributed.was_agreed(error):
                raise
            done, asked = self.state.step, stopping.asked_of_all()
            if done > 0 and not asked:
                say(
                    f"step {done + 1} cannot be done: saving step {done}; the same command "
                    "continues from there"
                )
            if done > 0 and not has_line:
                self.metrics.flush(done)
            self._save()
            if asked:
                self._end_by(asked)
            raise

    def _end_by(self, signal: int) -> None:
        """Ends the run as the signal asks, after all is saved. Collective."""
        done = self.state.step
        saved = f"step {done} is saved; the same command continues" if done else "nothing is done"
        say(f"asked to stop: {saved}")
        self.metrics.close()
        stopping.end_by(signal)

    def first_push(self) -> None:
        """Before the first step: the sampler gets the weights, and the student its first marks."""
        with self.colocation.phase("sync"):
            self.push()
        step, last = self.state.step, self.run.cfg.run.num_steps
        if not self.run.eval_prompts:
            return
        if step == 0:
            self._evaluate()
            self.metrics.flush(0)
        elif step == last and recall(self.run.run_dir, last) is None:  # it was asked to stop there
            self._evaluate()

    # ---- The parts of a step ---------------------------------------------------------------------

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Optimizer step `step` (0-based), from its prompts to its push."""
        self._started = time.perf_counter()
        self._fresh = None
        with self.colocation.step(step), self.metrics.timed("step"):
            yield

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The student's responses of this step, P * G; served teachers hear of each at once."""
        step = self.state.step
        is_due = self.parity.is_due(step)
        rollouts = self.rollout_engine.generate(
            prompts,
            step,
            with_logprobs=self.run.reads_logprobs or is_due,
            on_finished=self.feedback.before(self.teachers.hear),
        )
        rollouts = self.feedback.of(rollouts)
        if is_due:
            self._fresh = self.rollout_engine.fresh(rollouts, step)
        return rollouts

    def from_dataset(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The responses that stand beside the prompts, written by a data set or a teacher."""
        rollouts = dataset_rollouts(
            prompts,
            self.state.step,
            eos_ids=self.run.facts.student.eos_ids,
            policy_version=self.state.policy_version,
        )
        return self.feedback.of(rollouts)

    def balance(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        """This rank's share of the step, so that all ranks have about equal work. Collective.

        Where served teachers hear of responses while others are written, their answers come back to
        the rank that asked, and all stays as it is.
        """
        self._rollouts = rollouts  # what is logged of a rank is what it wrote
        if self.teachers.hear is not None:
            return rollouts
        routes, config = self.run.routes, self.student.model.config.get_text_config()
        return deal(
            rollouts, lambda r: tuple(n for n, _ in routes[r.prompt.domain]), config.hidden_size
        )

    def micro_batches(
        self, rollouts: Sequence[Rollout], scores: Sequence[tuple[TeacherScores, ...]]
    ) -> list[MicroBatch]:
        """Rollouts as the student computes them. Collective.

        Hidden states are copied. The samples are written to the ledger once the step is done.
        """
        self._rows = sample_rows(rollouts, scores, step=self.state.step + 1)
        return self.run.micro_batches(rollouts, scores)

    def with_old_policy(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The same with the log-probabilities of the old policy, where somebody reads them.

        The old policy is the sampler itself, the student before the step's first update, or that
        of a log-prob server. If the sampler is not the student, the run stops here. Collective.
        """
        cfg = self.run.cfg
        if self._fresh is not None:
            self.parity.check(self.student, self._fresh, self.state.step)
        if cfg.loss.old_logprobs == "server":  # the rollouts brought it
            self._log_mismatch(micro_batches)
        elif cfg.loss.old_logprobs == "recompute" or (
            self._fresh is not None and not corrects(cfg.loss)
        ):
            temperature = cfg.rollout.temperature
            micro_batches = [
                mb.with_old_logprobs(self.student.logprobs(mb, temperature)) for mb in micro_batches
            ]
            self._log_mismatch(micro_batches)
        return micro_batches

    def record(self, mb: MicroBatch, out: LossOutput, update: int) -> None:
        """The statistics of a micro-batch's loss in the step's inner update `update`."""
        self.metrics.merge(out.metrics)
        if update == 0 and out.logprobs_N is not None:  # of the weights that have sampled
            self._log_mismatch([mb.with_old_logprobs(out.logprobs_N)])

    def _log_mismatch(self, micro_batches: Sequence[MicroBatch]) -> None:
        log_mismatch(self.metrics, micro_batches, self.run.cfg.loss, domains=self.run.domains)

    def trained(self, num_loss_tokens: int, learning_rate: float, grad_norm: float) -> None:
        """The weights have seen the step's samples: from here on a checkpoint holds them."""
        self.samples.record(self._rows)
        self.state.step += 1
        self.state.tokens_seen += num_loss_tokens
        self._num_loss_tokens = num_loss_tokens
        self.metrics.add("optim/learning_rate", learning_rate)
        self.metrics.add("optim/grad_norm", grad_norm)

    def push(self) -> None:
        """The sampler gets the student's weights, teachers that follow it theirs. Collective."""
        version = self.state.step
        self.past.follow(version)
        self.state.policy_version = push_weights(self.student, self.rollout_engine, version=version)

    # ---- After a step, and after the last --------------------------------------------------------

    def after_step(self) -> None:
        """The step's line of metrics; evaluation and checkpoint, when they are due; the end, when
        the run is asked to stop or its time is over. Collective.
        """
        cfg, seconds = self.run.cfg.run, time.perf_counter() - self._started
        log_step(
            self.run,
            self.metrics,
            self.colocation.ledger,
            self.state,
            self._rollouts,
            num_loss_tokens=self._num_loss_tokens,
            seconds=seconds,
        )
        self._unshared.log(self.metrics, self._rollouts)
        log_own_prompts(self.run, self.metrics, self._rollouts, self.feedback.overlong)
        servers = (self.teachers, self.rollout_engine)
        log_servers(self.metrics, *servers, self._rollouts, step=self.state.step, seconds=seconds)
        self.pace.stepped()
        asked, is_late, is_over = self._wishes()
        if not asked and self._is_due(cfg.eval_every):
            asked = self._evaluate_unless_asked()
        # before the checkpoint: a step that can be resumed from has its line
        self.metrics.flush(self.state.step)
        is_due = self._is_due(0) or self.pace.is_due(self.state.step)
        if is_due or asked or is_late or is_over:
            with self.metrics.timed("checkpoint"):
                self._save()
        if asked:
            self._end_by(asked)
        if is_over and self.state.step < cfg.num_steps:
            say(
                f"--time_limit {cfg.time_limit}: step {self.state.step} is saved; the same command "
                "continues"
            )
            self._close()
            distributed.barrier()  # nobody leaves while another is in a collective operation
            sys.exit(0)

    def _wishes(self) -> tuple[int, bool, bool]:
        """The same on every rank: the signal that asks for the end, and what rank 0's clock says:
        whether to save, and whether the time is over.
        """
        clock = [False, False]
        if distributed.rank() == 0:
            clock = [self.pace.is_time_to_save, self.pace.is_over]
        asked, is_late, is_over = distributed.all_reduce([stopping.signal_here(), *clock], "max")
        return int(asked), bool(is_late), bool(is_over)

    def _is_due(self, every: int) -> bool:
        """After the last step, and at every multiple of `every` above 0."""
        step = self.state.step
        return step == self.run.cfg.run.num_steps or (every > 0 and step % every == 0)

    def _evaluate(self) -> None:
        with self.colocation.phase("rollout"):
            evaluate(self.run, self.rollout_engine, self.metrics, self.state.step)

    def _evaluate_unless_asked(self) -> int:
        """Evaluates; if the run is asked to stop meanwhile, nothing of it is kept, and the signal
        returned.
        """
        try:
            self._evaluate()
        except Exception as error:
            asked = stopping.asked_of_all() if distributed.was_agreed(error) else 0
            if not asked:
                raise
            return asked
        return 0

    def _save(self) -> None:
        """The checkpoint of the finished step, unless it has one."""
        run, started = self.run, time.perf_counter()
        if self._saved == self.state.step:
            return
        checkpoint.save(
            run.run_dir,
            self.state,
            self.save_parts,
            run.fingerprint,
            keep=run.cfg.run.keep_checkpoints,
        )
        self._saved = self.state.step
        self.pace.saved(time.perf_counter() - started)

    def save_parts(self, directory: Path) -> None:
        """This rank's part of a checkpoint, which `start` loads: its shards, responses of coming
        steps if some are written already, and what teachers that follow the student remember.
        """
        self.student.save_shards(directory)
        self.rollout_engine.save(directory)
        self.past.save(directory)

    def finish(self) -> None:
        """Ends engines and connections; the export, and the report. Collective."""
        stopping.unlisten()  # all is saved
        self._close()
        finish_run(
            self.run,
            self.student,
            self.teacher_scores,
            self.colocation.ledger,
            was_done=self._was_done,
        )

    def _close(self) -> None:
        self.rollout_engine.close()
        self.teachers.close()
        self.colocation.close()
        self.metrics.close()
