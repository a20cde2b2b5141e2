"""Prompt sets: rows, rendered with the chat template and tokenised.

Rows are never skipped in silence: a row that cannot be used is an error that names its file and
line, and over-long prompts are counted.
"""

import dataclasses
import functools
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from opd.config import DataConfig, TeacherSpec
from opd.inputs.chats import KWARGS, Chat, read_chat, read_plain, user_text
from opd.inputs.columns import domain_column, text_column
from opd.inputs.images import BadImage, read_pictures
from opd.inputs.rows import Place, read_rows
from opd.inputs.targets import End, targets_of, turn_end
from opd.inputs.teacher_prompts import OwnPrompt, OwnRows, claimants, expanded_own, read_own_rows
from opd.inputs.template_flags import KWARGS_FLAG, SYSTEM_FLAG, read_template_flags
from opd.inputs.templates import ChatTemplate, tokenize
from opd.log import cut, one_line
from opd.ops.pixels import Pixels
from opd.pictures import Picture, PromptImages
from opd.types import Prompt

MOST_SAMPLES = 64  # chats of a domain that a teacher's template is tried on


@dataclass(frozen=True)
class RenderedChat:
    """A chat of the data, and what the student's template made of it."""

    where: str  # flag, file and line
    chat: Chat
    text: str


@dataclass(frozen=True)
class PromptSet:
    """Every usable prompt of a data set; `prompts[i].prompt_id == i`."""

    prompts: tuple[Prompt, ...]
    domains: tuple[str, ...]  # sorted
    content_hash: str  # sha256 over token ids, domains, answers and responses, in order
    counts: dict[str, int]  # domain -> prompts kept
    overlong: dict[str, int]  # domain -> prompts dropped or truncated
    notes: tuple[str, ...]  # what the user should know of rows that are right
    # the time that is written in the prompts; None for a chat template that writes none
    moment: datetime | None
    # domain -> some of its chats; nothing for a tokenizer without a chat template
    samples: dict[str, tuple[RenderedChat, ...]]
    # teacher with prompts of its own -> the same of those
    own_samples: dict[str, dict[str, tuple[RenderedChat, ...]]]
    # of every prompt, where a function of the user makes another one of it
    chats: tuple[Chat, ...]

    def samples_of(self, teacher: str) -> dict[str, tuple[RenderedChat, ...]]:
        """Some of the chats that a teacher reads, by domain."""
        return self.samples | self.own_samples.get(teacher, {})

    def longest_of(self, teacher: str) -> int:
        """Tokens of the longest prompt that the teacher alone reads; 0 without any."""
        own = (prompt.teacher_ids.get(teacher, ()) for prompt in self.prompts)
        return max(map(len, own), default=0)

    @property
    def summary(self) -> str:
        """Counts of prompts per domain, and what else the user should know, in one line."""
        counts = ", ".join(f"{domain} {count}" for domain, count in self.counts.items())
        overlong = sum(self.overlong.values())
        return "; ".join(
            [
                counts,
                *([f"{overlong} over-long ones dropped or cut"] if overlong else []),
                *self.notes,
            ]
        )

    @functools.cached_property
    def ids_by_domain(self) -> dict[str, list[int]]:
        ids = {domain: [] for domain in self.domains}
        for prompt in self.prompts:
            ids[prompt.domain].append(prompt.prompt_id)
        return ids


def _domains(
    rows: list[tuple[Place, dict[str, Any]]], cfg: DataConfig, default_domain: str | None
) -> list[str]:
    if default_domain is not None and not any(cfg.domain_key in row for _, row in rows):
        return [default_domain] * len(rows)
    return [domain_column(where, row, cfg.domain_key) for where, row in rows]


@dataclass(frozen=True)
class _Read:
    """The rows of a data set as the chat template has them; without one there are no chats."""

    rows: list[tuple[Place, dict[str, Any]]]
    domains: list[str]
    pictures: list[tuple[Picture, ...]]
    bad_images: Counter[str]  # domain -> rows that were left out
    template: ChatTemplate | None
    chats: list[Chat]
    texts: list[str]  # what is tokenised, with the beginning of the answer
    variables: Collection[str]  # of the template, that flags set

    def samples(self, kept: Iterable[int]) -> dict[str, tuple[RenderedChat, ...]]:
        """Chats of each domain: one of each kind that there is, then some spread over the rest."""
        by_domain: dict[str, list[int]] = {}
        for row in kept if self.template else ():
            by_domain.setdefault(self.domains[row], []).append(row)
        found = {}
        for domain, own in by_domain.items():
            kinds = {self.chats[row].kind: row for row in reversed(own)}
            spread = own[:: max(1, len(own) // MOST_SAMPLES)]
            chosen = list(dict.fromkeys([*kinds.values(), *spread]))[:MOST_SAMPLES]
            found[domain] = tuple(
                RenderedChat(self.rows[row][0], self.chats[row], self.texts[row]) for row in chosen
            )
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """Rows that were left out, and variables that the template does not mention."""
        bad = self.bad_images.total()
        left_out = [f"{bad} rows left out whose images cannot be read"] if bad else []
        return (*left_out, *self._unknown_variables)

    @property
    def _unknown_variables(self) -> tuple[str, ...]:
        counts = Counter(name for chat in self.chats for name in chat.kwargs)
        unknown = self.template.unknown(counts) if self.template else []
        return tuple(
            f"{f'{KWARGS_FLAG} sets' if name in self.variables else f'{counts[name]} rows set'} "
            f"{cut(name)}{'' if name in self.variables else f' in `{KWARGS}`'}, which the chat "
            "template does not mention"
            for name in unknown
        )


def _read_prompts(
    paths: Sequence[str],
    flag: str,
    tokenizer,
    cfg: DataConfig,
    default_domain: str | None,
    moment: datetime | None,
    sees: bool,
) -> _Read:
    rows = read_rows(paths, flag)
    rows, pictures, bad_images = _with_pictures(rows, cfg, default_domain, sees=sees)
    domains = _domains(rows, cfg, default_domain)
    flags = read_template_flags(cfg)
    flags.check_tokenizer(tokenizer)
    if tokenizer.chat_template is None:
        for (where, _), own in zip(rows, pictures, strict=True):
            if own:
                raise ValueError(
                    f"{where}: column `{cfg.images_key}` needs a chat template, and the tokenizer "
                    "has none"
                )
        texts = [read_plain(where, row, cfg.prompt_key) for where, row in rows]
        return _Read(rows, domains, pictures, bad_images, None, [], texts, flags.variables)
    template = ChatTemplate(tokenizer, moment)
    chats, texts = [], []
    for (where, row), domain, shown in zip(rows, domains, pictures, strict=True):
        shows = {"num_images": len(shown), "images_key": cfg.images_key, "sees": sees}
        own = read_chat(where, row, cfg.prompt_key, tokenizer, **shows)
        chats.append(flags.completed(own, domain))
        texts.append(_text(f"{where}: column `{cfg.prompt_key}`", template, chats[-1], own))
    return _Read(rows, domains, pictures, bad_images, template, chats, texts, flags.variables)


def _with_pictures(
    rows: list[tuple[Place, dict[str, Any]]],
    cfg: DataConfig,
    default_domain: str | None,
    *,
    sees: bool,
) -> tuple[list, list[tuple[Picture, ...]], Counter[str]]:
    """(rows, the pictures of each, domain -> rows left out for a bad image)."""
    kept, pictures, bad = [], [], Counter()
    for where, row in rows:
        try:
            shown = read_pictures(where, where.folder, row, cfg.images_key, cfg.allow_urls)
        except BadImage:
            if cfg.bad_images == "error":
                raise
            bad[_domains([(where, row)], cfg, default_domain)[0]] += 1
            continue
        if shown and not sees:
            raise ValueError(
                f"{where}: column `{cfg.images_key}` has an image, and the student sees none; "
                "choose another --images_key, or a vision-language student"
            )
        kept.append((where, row))
        pictures.append(shown)
    if not kept:
        raise ValueError(f"--bad_images drop: no row of {where.rpartition(',')[0]} is left")
    return kept, pictures, bad


def _text(where: str, template: ChatTemplate, chat: Chat, own: Chat) -> str:
    """The rendering of `chat`, which is the row's `own` with what flags add."""
    try:
        return template.render(where, chat)
    except ValueError as error:
        if len(chat.messages) == len(own.messages):
            raise
        template.render(where, dataclasses.replace(chat, messages=own.messages))
        raise ValueError(
            f"{SYSTEM_FLAG}, in front of {error}; remove the flag, or write its text into the "
            "prompts"
        ) from None


def load_prompts(
    paths: Sequence[str],
    tokenizer,
    cfg: DataConfig,
    *,
    flag: str,
    need_answer: bool = False,
    need_response: bool = False,
    max_response_tokens: int | None = None,
    default_domain: str | None = None,
    eos_ids: Sequence[int] = (),
    moment: datetime | None = None,
    pixels: Pixels | None = None,
    placeholder_ids: Collection[int] = (),
    own_prompts: Collection[OwnPrompt] = (),
    teachers: Sequence[TeacherSpec] = (),
    is_held_out: bool = False,
) -> PromptSet:
    """Reads and renders the prompts of `paths`.

    `flag` ("--data") is what error messages name. `default_domain` is every row's domain when no
    row has the column `cfg.domain_key`: for a run whose only teacher takes every domain. `eos_ids`
    end the student's responses, by default the tokenizer's EOS does. `moment` is the time that a
    chat template writes, by default now. `pixels` is the processor of a student that sees, and
    `placeholder_ids` the tokens that stand for images and the like. `own_prompts` are those that
    some of the `teachers` read in place of the student's. Any row that cannot be used is a
    ValueError.
    """
    sees = pixels is not None
    read = _read_prompts(paths, flag, tokenizer, cfg, default_domain, moment, sees)
    end = turn_end(tokenizer, eos_ids, read.template, read.chats) if need_response else None
    of_teacher = functools.partial(_of_teacher, read, cfg, tokenizer, teachers, is_held_out, sees)
    theirs = {own.name: of_teacher(own) for own in own_prompts}
    rest = _Rest(cfg, tokenizer, need_answer, end, max_response_tokens, pixels, placeholder_ids)
    prompts, overlong = _prompts(read, theirs, rest)
    found = _prompt_set(prompts, overlong, flag, cfg, read, _open_end(tokenizer, eos_ids, read))
    return _with_own_prompts(found, prompts, read, theirs)


@dataclass(frozen=True)
class _Rest:
    """What else decides what becomes of rows; as `load_prompts` says."""

    cfg: DataConfig
    tokenizer: Any
    need_answer: bool
    end: End | None
    max_response_tokens: int | None
    pixels: Pixels | None
    placeholder_ids: Collection[int]


def _prompts(
    read: _Read, theirs: dict[str, OwnRows], rest: _Rest
) -> tuple[dict[int, Prompt], Counter[str]]:
    """(prompts by row, domain -> rows that are too long)."""
    prompts, overlong, cfg = {}, Counter(), rest.cfg
    for i, student_ids in enumerate(tokenize(read.texts, rest.tokenizer)):
        (where, row), domain = read.rows[i], read.domains[i]
        if not student_ids:
            raise ValueError(
                f"{where}: column `{cfg.prompt_key}`: the prompt is empty after tokenisation"
            )
        # read of every row, dropped or not: a row that cannot be used is an error
        answer = text_column(where, row, cfg.answer_key, "--answer_key", is_needed=rest.need_answer)
        target_ids = _target_ids(where, row, rest)
        show = functools.partial(_images, pictures=read.pictures[i], pixels=rest.pixels)
        try:
            images = show(where, read.texts[i], student_ids)
            token_ids = _expanded(where, student_ids, images, rest)
            if len(token_ids) > cfg.max_prompt_tokens:
                overlong[domain] += 1
                if cfg.overlong_prompts == "drop" or images is not None:
                    continue
            own_ids, own_images = expanded_own(
                where, i, student_ids, theirs,
                show=show, pixels=rest.pixels, never=rest.placeholder_ids,
            )  # fmt: skip
        except BadImage:
            if cfg.bad_images == "error":
                raise
            read.bad_images[domain] += 1
            continue
        prompts[i] = Prompt(
            prompt_id=len(prompts),
            domain=domain,
            token_ids=token_ids[-cfg.max_prompt_tokens :],
            target_ids=target_ids,
            answer=answer,
            images=images,
            text=(read.chats and user_text(read.chats[i])) or read.texts[i],
            teacher_ids=own_ids,
            teacher_images=own_images,
        )
    return prompts, overlong


def _target_ids(where: str, row: dict[str, Any], rest: _Rest) -> list[int] | None:
    """The dataset response of a row, where one is needed."""
    key = rest.cfg.response_key
    if rest.end is None:
        return None
    target_ids = targets_of(where, row, key, rest.tokenizer, rest.end)
    if set(rest.placeholder_ids) & {*target_ids}:
        raise ValueError(
            f"{where}: column `{key}`: a response shows no image; remove the placeholder"
        )
    return target_ids[: rest.max_response_tokens]


def _expanded(
    where: str, student_ids: list[int], images: PromptImages | None, rest: _Rest
) -> list[int]:
    """The prompt of a row with a token for every embedding of its images."""
    if images is not None:
        return rest.pixels.expanded(images.text, images.pictures)
    if set(rest.placeholder_ids) & {*student_ids}:
        raise ValueError(
            f"{where}: column `{rest.cfg.prompt_key}`: the placeholder of an image, and column "
            f"`{rest.cfg.images_key}` has none; remove it from the text"
        )
    return student_ids


def _of_teacher(
    read: _Read,
    cfg: DataConfig,
    tokenizer,
    teachers: Sequence[TeacherSpec],
    is_held_out: bool,
    sees: bool,
    own: OwnPrompt,
) -> OwnRows:
    """What a teacher reads of the rows of its domains."""
    flags = read_template_flags(cfg)
    takes = {d: own.name in {t.name for t in claimants(teachers, d)} for d in set(read.domains)}
    rows = {
        i: (where, row, read.chats[i] if read.template else read.texts[i])
        for i, (where, row) in enumerate(read.rows)
        if takes[read.domains[i]]
    }

    def read_column(i: int) -> Chat:
        shows = {"num_images": len(read.pictures[i]), "images_key": cfg.images_key, "sees": sees}
        found = read_chat(*read.rows[i], own.text, tokenizer, key_flag=own.flag, **shows)
        return flags.completed(found, read.domains[i])

    return read_own_rows(
        own, rows, cfg, tokenizer, read.template, read_column, is_held_out=is_held_out
    )


def _with_own_prompts(
    found: PromptSet, kept: Iterable[int], read: _Read, theirs: dict[str, OwnRows]
) -> PromptSet:
    """With what is known of the prompts that teachers alone read."""
    samples, notes = {}, []
    for name, own in theirs.items():
        chats, texts = list(read.chats), list(read.texts)
        for i, text in own.texts.items():
            texts[i] = text
            if read.template:
                chats[i] = own.chats[i]
        changed = dataclasses.replace(read, chats=chats, texts=texts, variables=own.own.variables)
        samples[name] = changed.samples(i for i in kept if i in own.texts)
        notes += own.notes
    is_made = any(own.own.kind == "function" for own in theirs.values())
    return dataclasses.replace(
        found,
        notes=(*found.notes, *notes),
        own_samples=samples,
        chats=tuple(read.chats[i] for i in kept) if is_made and read.template else (),
    )


def _images(
    where: str,
    text: str,
    unexpanded_ids: list[int],
    pictures: tuple[Picture, ...],
    pixels: Pixels | None,
) -> PromptImages | None:
    """The images of a row; BadImage if the processor refuses them."""
    if not pictures:
        return None
    try:
        num_tokens = len(pixels.expanded(text, pictures))
    except Exception as error:  # a processor is a program of others: it may fail in any way
        raise BadImage(
            f"{where}: the student's processor refuses its images: {one_line(error)}"
        ) from None
    return PromptImages(pictures, text, tuple(unexpanded_ids), num_tokens)


def _open_end(tokenizer, eos_ids: Sequence[int], read: _Read) -> tuple[str, ...]:
    """A note where the template ends a turn with a token at which no response ends."""
    closing = read.template.closing(read.chats[0]) if read.template and eos_ids else None
    if closing is None or closing in eos_ids:
        return ()
    token = tokenizer.convert_ids_to_tokens(closing)
    return (
        f"the chat template ends a turn with {token}, at which no response ends: let it with "
        f"--stop_token_ids {shlex.quote(token)}",
    )


def _prompt_set(
    prompts: dict[int, Prompt],
    overlong: Counter[str],
    flag: str,
    cfg: DataConfig,
    read: _Read,
    notes: tuple[str, ...],
) -> PromptSet:
    """ValueError for a domain that lost all of its prompts."""
    counts = Counter(prompt.domain for prompt in prompts.values())
    lost = [f"{domain} ({overlong[domain]} rows)" for domain in sorted(set(overlong) - set(counts))]
    unread = sorted(set(read.bad_images) - set(counts) - set(overlong))
    if unread:
        raise ValueError(f"--bad_images drop: no row of {', '.join(unread)} in {flag} is left")
    if lost:
        raise ValueError(
            f"{flag}: every prompt is longer than --max_prompt_tokens {cfg.max_prompt_tokens} in "
            f"{', '.join(lost)}; raise it, or set --overlong_prompts truncate"
        )
    return PromptSet(
        prompts=tuple(prompts.values()),
        domains=tuple(sorted(counts)),
        content_hash=_content_hash(list(prompts.values())),
        counts=dict(sorted(counts.items())),
        overlong=dict(sorted(overlong.items())),
        notes=(*read.notes, *notes),
        moment=read.template.moment if read.template else None,
        samples=read.samples(prompts),
        own_samples={},
        chats=(),
    )


def _content_hash(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        content = [prompt.token_ids, prompt.domain, prompt.answer, prompt.target_ids]
        if prompt.images is not None:
            content.append([picture.digest for picture in prompt.images.pictures])
        if prompt.teacher_ids:
            content.append(prompt.teacher_ids)
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()
