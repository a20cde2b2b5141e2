"""What is wrong with the teachers of a configuration: each by itself, then what they claim
together. ValueError with one line; nothing is asked of a server.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import get_args
from urllib.parse import urlsplit

from opd.config import Difference, TeacherConfig, TeacherSpec
from opd.inputs.past import check_past


def validate_teachers(teachers: Sequence[TeacherSpec], flags: TeacherConfig) -> None:
    """Checks every teacher, then what they claim together. ValueError with one line."""
    if not teachers:
        raise ValueError(
            "no teacher: give --teacher NAME=PATH (or PATH), or `teachers` in the YAML file"
        )
    names = [spec.name for spec in teachers]
    for spec in teachers:
        if names.count(spec.name) > 1:
            raise ValueError(f"--teacher: two teachers are called {spec.name}; names must differ")
        _check_teacher(spec, f"teachers: {spec.name}")
    _check_replicas_are_distinct(teachers)
    _check_claims(teachers)
    _check_allow(flags.allow, names)
    if flags.teacher_mode == "standalone" and not any(spec.is_served for spec in teachers):
        raise ValueError(
            "--teacher_mode standalone: no teacher is served; give one of them urls, or use "
            "--teacher_mode auto"
        )


def allowed(spec: TeacherSpec, flags: TeacherConfig) -> frozenset[str]:
    """What this teacher may have otherwise than the student: its entry's, and `--allow`'s."""
    found = set(spec.allow)
    for name, words in map(_allowance, flags.allow):
        if name in ("", spec.name):
            found |= set(words)
    return frozenset(found)


def _allowance(value: str) -> tuple[str, list[str]]:
    """(teacher or nothing, words) of a value of `--allow`."""
    name, _, words = value.rpartition("=")
    return name, [word.strip() for word in words.split(",")]


def _check_allow(values: Sequence[str], names: Sequence[str]) -> None:
    known = get_args(Difference)
    for value in values:
        name, words = _allowance(value)
        if "=" in value and name not in names:
            raise ValueError(
                f"--allow {value}: no teacher is called {name!r}, only {', '.join(names)}"
            )
        if unknown := [word for word in words if word not in known]:
            raise ValueError(
                f"--allow {value}: {unknown[0]!r} is none of {', '.join(known)}; write one or "
                "several of them, or NAME=eos,template for one teacher"
            )


def _check_teacher(spec: TeacherSpec, where: str) -> None:
    if not 0 <= spec.share < math.inf:
        raise ValueError(f"{where}: weight {spec.weight}: must be finite and at least 0")

    size = spec.tensor_parallel_size
    if size < 1:
        raise ValueError(f"{where}: tensor_parallel_size {size} must be at least 1")
    if size > 1 and spec.backend != "vllm":
        remedy = "give it to the server" if spec.is_served else "use backend vllm"
        raise ValueError(
            f"{where}: tensor_parallel_size {size}: backend {spec.backend} cannot split a model "
            f"here; {remedy}"
        )

    check_past(spec, where)
    if spec.is_served and spec.adapter:
        raise ValueError(
            f"{where}: adapter {spec.adapter}: a server has its own weights; merge it into the "
            "model that the server loads"
        )
    if spec.is_served:
        _check_served(spec, where)
    elif spec.urls or spec.api_key_env:
        given = "urls" if spec.urls else "api_key_env"
        raise ValueError(
            f"{where}: {given} given for backend {spec.backend}; set `backend: server`, or remove "
            "it"
        )


def _check_served(spec: TeacherSpec, where: str) -> None:
    if not spec.urls:
        raise ValueError(f"{where}: no replicas; give `urls`, a list like [http://127.0.0.1:8000]")
    for place, url in enumerate(spec.urls):
        _check_url(url, f"{where}: urls[{place}]")
    variable = spec.api_key_env
    if variable and not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):
        raise ValueError(
            f"{where}: api_key_env must be the NAME of an environment variable, in capitals; never "
            "the key itself"
        )
    if variable and not os.environ.get(variable):
        raise ValueError(f"{where}: api_key_env {variable}: this variable is not set; export it")


def _check_url(url: str, where: str) -> None:
    address, *rest = re.split("[?#]", url, maxsplit=1)
    if "@" in address.partition("//")[2].partition("/")[0]:
        raise ValueError(
            f"{where}: user info in a URL; put the key into an environment variable and name it in "
            "`api_key_env`"
        )
    if not is_http(address):
        raise ValueError(f"{where} {address!r}: not an http(s) URL; write http://HOST:PORT")
    if rest:
        raise ValueError(
            f"{where} {address!r}: a query or fragment does not belong to a server's address; a "
            "key goes to `api_key_env`"
        )


def is_http(url: str) -> bool:
    """Whether it names a host, by http or https."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises where it is no port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", url)


def _check_replicas_are_distinct(teachers: Sequence[TeacherSpec]) -> None:
    """One server may serve several models: several teachers may name its URL if `model` tells them
    apart.
    """
    seen: dict[tuple[str, str], str] = {}
    for spec in teachers:
        places = [url.replace("//localhost", "//127.0.0.1") for url in spec.urls]
        for url in places:
            if places.count(url) > 1:
                raise ValueError(
                    f"teachers: {spec.name}: duplicate URL {url}; list each replica once"
                )
            first = seen.setdefault((url, spec.model), spec.name)
            if first != spec.name:
                raise ValueError(
                    f"teachers: {spec.name}: duplicate URL {url}, teacher {first} has it too; give "
                    "each its own `model` as the server names it, or one teacher both domains"
                )


def _check_claims(teachers: Sequence[TeacherSpec]) -> None:
    """Two teachers of one domain are a mixture only if each says how much it counts."""
    claims: dict[str, list[TeacherSpec]] = {}
    for spec in teachers:
        for domain in {"*"} if spec.domains == "*" else set(spec.domains):
            claims.setdefault(domain, []).append(spec)
    for domain, claimants in sorted(claims.items()):
        names = " and ".join(spec.name for spec in claimants)
        if len(claimants) > 1 and any(spec.weight is None for spec in claimants):
            raise ValueError(
                f"teachers: the domain {domain} is claimed by {names} without weights; give each a "
                f"`weight`, or {domain} to one"
            )
        if sum(spec.share for spec in claimants) == 0:
            raise ValueError(
                f"teachers: the weights of the domain {domain} sum to 0 ({names}); give one of "
                "them a weight above 0"
            )
