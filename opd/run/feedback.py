"""Prompts that functions of the user make for teachers, of a prompt and its response: environment
feedback (SDPO, arXiv 2601.20802).

They are made as soon as a response is there, before any teacher hears of it. A resumed run makes
them again, so a function must say the same of the same response.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from opd.inputs.chats import with_user_text
from opd.inputs.teacher_prompts import BOUND_FLAG, own_prompts
from opd.inputs.templates import ChatTemplate, tokenize
from opd.inputs.vision_rules import load_pixels
from opd.log import one_line, warn
from opd.ops.pixels import Pixels
from opd.pictures import PromptImages
from opd.run.context import Run
from opd.types import Prompt, Rollout

Hear = Callable[[Rollout], None]


class FeedbackPrompts:
    """Gives rollouts the prompts of their teachers; without functions they stay as they are."""

    def __init__(self, run: Run):
        self.run, own = run, own_prompts(run.cfg)
        self.own = {name: own[name] for name in run.feedback}
        has_template = bool(self.own) and run.tokenizer.chat_template is not None
        moment = run.train_set.moment
        self.template = ChatTemplate(run.tokenizer, moment) if has_template else None
        self.overlong: Counter[str] = Counter()  # teacher -> too long ones of the last step
        self.pixels = self._load_pixels() if self.own and run.facts.student.sees else None
        self._warned = False
        self._made: dict[str, tuple[Prompt, list[str]]] = {}  # sample -> prompt, too long for whom

    def _load_pixels(self) -> Pixels:
        model = self.run.cfg.model
        return load_pixels("--student_model", model.student_model, model.trust_remote_code)

    def before(self, hear: Hear | None) -> Hear | None:
        """What a rollout engine should tell of a response, so that `hear` finds the prompts."""
        if hear is None or not self.own:
            return hear
        return lambda rollout: hear(self._completed(rollout))

    def of(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts of a step with what their teachers read.

        RuntimeError, with function and sample, for a function that fails.
        """
        self.overlong = Counter()
        if not self.own:
            return list(rollouts)
        completed = [self._completed(rollout) for rollout in rollouts]
        for rollout in completed:
            _, too_long = self._made.pop(rollout.sample_id)
            self.overlong.update(too_long)
        return completed

    def _completed(self, rollout: Rollout) -> Rollout:
        if rollout.sample_id not in self._made:  # servers may tell of it twice
            self._made[rollout.sample_id] = self._make(rollout)
        return replace(rollout, prompt=self._made[rollout.sample_id][0])

    def _make(self, rollout: Rollout) -> tuple[Prompt, list[str]]:
        prompt, too_long = rollout.prompt, []
        ids, images = dict(prompt.teacher_ids), dict(prompt.teacher_images)
        response = self.run.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        readers = [name for name, _ in self.run.routes[prompt.domain] if name in self.own]
        for name in readers:
            text = self.run.feedback[name](prompt, response, rollout.sample_id)
            if text is None:
                continue
            own = self._read(name, prompt, text, rollout.sample_id)
            if len(own.token_ids) > self.own[name].bound:
                too_long.append(name)
                self._warn(name, rollout, len(own.token_ids))
                continue
            ids[name] = own.token_ids
            if own.images is not None:
                images[name] = own.images
        return replace(prompt, teacher_ids=ids, teacher_images=images), too_long

    def _warn(self, name: str, rollout: Rollout, length: int) -> None:
        """Of the first one."""
        if not self._warned:
            self._warned = True
            warn(
                f"sample {rollout.sample_id}: {self.own[name].flag} makes a prompt of {length} "
                f"tokens, over {BOUND_FLAG} {self.own[name].bound}, so the teacher reads the "
                f"student's; teacher/overlong_prompt/{name} has the share of those"
            )

    def _read(self, name: str, prompt: Prompt, text: str, sample_id: str) -> Prompt:
        """The prompt with `text` as its last user message, as the teacher reads it."""
        where = f"{self.own[name].flag}: sample {sample_id}"
        try:
            if self.template is not None:
                chat = self.run.train_set.chats[prompt.prompt_id]
                chat = with_user_text(where, chat, text, self.run.cfg.data.images_key)
                text = self.template.render(where, self.own[name].with_variables(chat))
            (ids,) = tokenize([text], self.run.tokenizer)
            return self._expanded(where, prompt, text, ids)
        except ValueError as error:
            raise RuntimeError(str(error)) from None

    def _expanded(self, where: str, prompt: Prompt, text: str, ids: list[int]) -> Prompt:
        """With the images of the prompt, if it has any; ValueError for a placeholder too many."""
        if prompt.images is None:
            if {*self.run.facts.student.placeholder_ids} & {*ids}:
                raise ValueError(f"{where}: the placeholder of an image, and the prompt has none")
            return replace(prompt, token_ids=ids)
        pictures = prompt.images.pictures
        try:
            expanded_ids = self.pixels.expanded(text, pictures)
        except Exception as error:  # a processor is a program of others: it may fail in any way
            raise ValueError(f"{where}: the processor refuses it: {one_line(error)}") from None
        images = PromptImages(pictures, text, tuple(ids), len(expanded_ids))
        return replace(prompt, token_ids=expanded_ids, images=images)
