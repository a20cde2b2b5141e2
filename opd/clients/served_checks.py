"""Whether the served teachers fit the run: asked of their servers before a weight is loaded.

ValueError with one line each.
"""

import os
import urllib.parse
from collections.abc import Collection, Mapping
from dataclasses import replace

from opd.clients.health import Limits
from opd.clients.protocols import is_loopback
from opd.clients.served_model import (
    PROBE_TEXT,
    ServedModel,
    inspect_replicas,
    refusals,
    unshared_tokens,
)
from opd.clients.wire import Question
from opd.config import TeacherSpec
from opd.distillation import support_of
from opd.inputs.content import content_hash
from opd.inputs.dialects import Dialect, Foreign, check_eos, refuse_used
from opd.inputs.models import ModelFacts, dialect_of, load_tokenizer
from opd.inputs.prompts import PromptSet
from opd.inputs.teacher_rules import allowed
from opd.inputs.templates import added_tokens
from opd.inputs.vision_rules import read_with_images, sample_of
from opd.log import one_line, warn


def limits_of(config) -> Limits:
    """A run's waits and bounds towards servers."""
    teacher = config.teacher
    return Limits(
        wait_s=teacher.teacher_wait_s,
        timeout_s=teacher.teacher_timeout_s,
        max_inflight=teacher.teacher_max_inflight,
    )


def api_key_of(spec: TeacherSpec) -> str | None:
    """The key from the environment, the only place where it stands."""
    return os.environ[spec.api_key_env] if spec.api_key_env else None


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent there: over https, and to this machine
    itself.
    """
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname)


def check_served(config, tokenizer, facts: ModelFacts) -> tuple[ModelFacts, dict[str, ServedModel]]:
    """Asks every served teacher's replicas.

    The facts of the run with what they add, and teacher name -> what it is.
    """
    models, dialects = {}, []
    for spec in config.teachers:
        if not spec.is_served:
            continue
        flag = f"--teacher {spec.name}"
        model = inspect_replicas(flag, spec.urls, spec.model, api_key_of(spec))
        _check_context(config, flag, model)
        _check_tokenizer(flag, model, tokenizer, facts)
        if spec.has_local_model:
            _check_content(flag, spec, model)
        dialects.append(_dialect(config, spec, model, tokenizer, facts))
        _check_loss(config, flag, spec, model)
        models[spec.name] = model
    vocabs = [model.vocab_size for model in models.values() if model.vocab_size is not None]
    facts = replace(facts, shared_vocab=min(facts.shared_vocab, *vocabs)) if vocabs else facts
    facts = replace(facts, dialects=(*facts.dialects, *dialects))
    for spec in (spec for spec in config.teachers if spec.name in models):
        _check_support(config, spec, models[spec.name], facts.shared_vocab)
    return facts, models


def _check_content(flag: str, spec: TeacherSpec, model: ServedModel) -> None:
    """A directory that is named stands for the teacher in reports and fingerprints, so it must be
    what the servers serve.
    """
    if model.content is None:
        warn(
            f"teacher {spec.name}: {spec.urls[0]} is another machine's vLLM server, which does not "
            f"say what its model contains; that it is {spec.model} is believed"
        )
    elif content_hash(spec.model) != model.content:
        raise ValueError(
            f"{flag}: model {spec.model} is not what {spec.urls[0]} serves; their contents differ"
        )


def _check_context(config, flag: str, model: ServedModel) -> None:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    if prompt + response + 1 > model.context:  # a server that scores writes one token more
        raise ValueError(
            f"--max_prompt_tokens {prompt} + --max_response_tokens {response} + 1: over the "
            f"context of {flag}, {model.context} tokens; lower them, or start its servers with a "
            "longer --max-model-len"
        )


def _check_tokenizer(flag: str, model: ServedModel, tokenizer, facts: ModelFacts) -> None:
    """Ids of the vocabulary proper must mean the same.

    A server does not hand out its vocabulary, so a text with some of everything is compared.
    """
    if model.tokens is None:
        raise ValueError(
            f"{flag}: its servers have no tokenizer to compare (/tokenize); start them with the "
            "model's own"
        )
    mine = tuple(tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])
    if model.tokens != mine:
        shorter = min(len(mine), len(model.tokens))
        place = next((i for i in range(shorter) if mine[i] != model.tokens[i]), shorter)
        raise ValueError(
            f"{flag}: its tokenizer is not the student's: a probe text has {len(model.tokens)} "
            f"tokens there and {len(mine)} here, and the first to differ is number {place}; choose "
            "a teacher of the student's family"
        )
    num_tokens = facts.num_tokens
    if facts.student.sees and not model.sees:
        # one for text alone need not have the tokens that stand for images
        added = set(added_tokens(tokenizer).values())
        num_tokens = 1 + max(set(tokenizer.get_vocab().values()) - added)
    if num_tokens > (model.vocab_size or num_tokens):
        raise ValueError(
            f"{flag}: the tokenizer has ids up to {num_tokens - 1}, its lm_head has "
            f"{model.vocab_size} rows"
        )


def _dialect(config, spec: TeacherSpec, model: ServedModel, tokenizer, facts) -> Dialect:
    """How the teacher differs from the student, in what it may.

    With a local directory all is known. Else the student's added tokens are asked for one by one;
    what tokens the teacher has beside them, and its chat template, stay its own affair.
    """
    used = (*facts.student.eos_ids, facts.pad_id)
    if spec.has_local_model:
        own = load_tokenizer(
            spec.model, config.model.trust_remote_code, flag=f"--teacher {spec.name}"
        )
        dialect = dialect_of(config, spec, own, tokenizer, used)
    else:
        flag, added = f"--teacher {spec.name}", added_tokens(tokenizer)

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        unshared = unshared_tokens(
            flag, spec.urls, model, sorted(added, key=added.get), encode, api_key_of(spec)
        )
        foreign = Foreign(frozenset(added[token] for token in unshared))
        refuse_used(flag, tokenizer, foreign.ids & set(used))
        dialect = Dialect(spec.name, flag, allowed(spec, config.teacher), foreign, None)
    if model.eos_ids is not None:
        check_eos(dialect, tokenizer, model.eos_ids, facts.own_eos_ids, facts.student.eos_ids)
    return dialect


def _check_loss(config, flag: str, spec: TeacherSpec, model: ServedModel) -> None:
    if model.protocol == "binary":
        return
    remedy = "serve it with `--protocol binary`"
    if config.loss.support in ("full", "union_topk"):
        raise ValueError(
            f"--support {config.loss.support}: {flag} is served by vLLM ({spec.urls[0]}), which "
            f"sends no hidden states; use --support teacher_topk, or {remedy}"
        )
    if config.loss.loss_temperature != 1:
        raise ValueError(
            f"--loss_temperature {config.loss.loss_temperature}: {flag} is served by vLLM "
            f"({spec.urls[0]}), which scores at temperature 1 only; use 1, or {remedy}"
        )


def check_servers_see(
    config,
    served: Mapping[str, ServedModel],
    prompt_sets: Mapping[str, PromptSet],
    routes: Mapping[str, Collection[tuple[str, float]]],
) -> None:
    """Every server whose prompts have images is given some: it must see, and make the student's
    tokens of them. ValueError with one line if it does not.
    """
    read = read_with_images(config, prompt_sets, routes)
    for spec in (spec for spec in config.teachers if spec.is_served and spec.name in read):
        flag, model, own = f"--teacher {spec.name}", served[spec.name], read[spec.name]
        if model.protocol == "binary" and not model.sees:
            raise ValueError(
                f"{flag}: its servers see no images, and {len(own)} prompts of its domains have "
                "some; give these a domain and a teacher of their own"
            )
        for prompt in sample_of(own):
            question = Question(
                prompt_ids=prompt.token_ids,
                response_ids=[2],
                payload="sampled",
                support_k=0,
                vocab=model.vocab_size or 3,
                images=prompt.images,
            )
            for url, error in refusals(flag, spec.urls, model, question, api_key_of(spec)).items():
                raise ValueError(
                    f"{flag}: {url} does not take a prompt with images of this run: "
                    f"{one_line(error)}; serve a model that sees as the student does, or give "
                    "these prompts a domain and a teacher of their own"
                )


def _check_support(config, spec: TeacherSpec, model: ServedModel, shared_vocab: int) -> None:
    """A teacher whose hidden states do not fit the cache is asked for its top-k too, so only
    `sampled` needs no support_k.
    """
    flag, k = f"--teacher {spec.name}", min(config.loss.support_k, shared_vocab)
    if support_of(config.loss) == "sampled":
        return
    if model.max_support_k is not None and k > model.max_support_k:
        raise ValueError(
            f"--support_k {config.loss.support_k}: {flag}: {spec.urls[0]} gives at most "
            f"{model.max_support_k} candidates of a token; start it with --max_support_k {k}, or "
            "lower --support_k"
        )
    if model.protocol == "json":
        question = Question(
            prompt_ids=list(range(2, 9)),
            response_ids=[9],
            payload="topk",
            support_k=k,
            vocab=shared_vocab,
        )
        for url, error in refusals(flag, spec.urls, model, question, api_key_of(spec)).items():
            raise ValueError(
                f"--support_k: {flag}: {url} does not give {k} candidates of a token; start it "
                f"with --max-logprobs {k} (scripts/serve.sh teacher: --max_logprobs), or lower "
                f"--support_k ({error})"
            )
