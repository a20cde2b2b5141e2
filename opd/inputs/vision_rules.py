"""What a run with images asks of its models, checked before a weight is loaded."""

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

from opd.inputs.models import ModelFacts
from opd.inputs.prompts import PromptSet
from opd.inputs.shapes import load_part
from opd.log import one_line
from opd.ops.pixels import Pixels
from opd.types import Prompt

TRIED = 8  # prompts with images of each domain that processors are compared on


def load_pixels(flag: str, path: str, trust_remote_code: bool) -> Pixels:
    """The processor of a model that sees; ValueError if its directory holds none."""
    pixels = Pixels(path, trust_remote_code)
    processor = load_part(flag, path, "processor", lambda: pixels.processor)
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{flag} {path}: holds no image processor (preprocessor_config.json); copy it from its "
            "base model"
        )
    return pixels


def sample_of(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Some prompts with images, of as many numbers of images as there are."""
    by_number: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.images is not None:
            by_number.setdefault(len(prompt.images.pictures), []).append(prompt)
    each = max(1, TRIED // max(1, len(by_number)))
    return [prompt for own in by_number.values() for prompt in islice(own, each)]


def read_with_images(
    config,
    prompt_sets: Mapping[str, PromptSet],
    routes: Mapping[str, Collection[tuple[str, float]]],
) -> dict[str, list[Prompt]]:
    """Teacher name -> the prompts with images that it reads, as it reads them."""
    prompts = [p for prompt_set in prompt_sets.values() for p in prompt_set.prompts]
    found = {}
    for spec in config.teachers:
        own = [p for p in prompts if spec.name in dict(routes[p.domain])]
        own = [prompt.as_read_by(spec.name) for prompt in own if prompt.images]
        if own:
            found[spec.name] = own
    return found


def check_images(
    config,
    ds_config: Mapping[str, Any],
    facts: ModelFacts,
    pixels: Pixels | None,
    prompt_sets: Mapping[str, PromptSet],
    routes: Mapping[str, Collection[tuple[str, float]]],
) -> None:
    """ValueError if a model of this run cannot be given the images of its prompts.

    Servers are asked by `opd.clients.served_checks`.
    """
    seen = sample_of([p for prompt_set in prompt_sets.values() for p in prompt_set.prompts])
    if config.model.freeze_vision and not facts.student.sees:
        raise ValueError("--freeze_vision: the student sees no images; leave it out")
    if not seen:
        return
    _check_flags(config, pixels, seen[0])
    _check_offload(config, ds_config)
    _check_joined("--student_model", config.model.student_model, pixels, seen)
    read = read_with_images(config, prompt_sets, routes)
    for spec in config.teachers:
        if spec.is_served or spec.name not in read:
            continue
        flag, own = f"--teacher {spec.name}", read[spec.name]
        if not facts.teachers[spec.name].sees:
            raise ValueError(
                f"{flag} {spec.model}: sees no images, and {len(own)} prompts of its domains have "
                "some; give these a domain and a teacher of their own"
            )
        theirs = load_pixels(flag, spec.model, config.model.trust_remote_code)
        _check_tokens(flag, spec.model, theirs, sample_of(own))
        if spec.backend == "hf":
            _check_joined(flag, spec.model, theirs, sample_of(own))


def _check_flags(config, pixels: Pixels, prompt: Prompt) -> None:
    if config.batch.packing and pixels.types_tokens(prompt.images):
        raise ValueError(
            "--packing: the student's positions or attention depend on what a token shows, and "
            "rows of one sequence would be mixed; leave it out"
        )


def _check_offload(config, ds_config: Mapping[str, Any]) -> None:
    """In stages 1 and 2 DeepSpeed 0.19.8 keeps gradients on the host in a way that forgets those of
    weights which some micro-batches do not use: an image encoder's.
    """
    zero = ds_config.get("zero_optimization", {})
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    if device != "none" and zero.get("stage", 0) in (1, 2) and not config.model.freeze_vision:
        raise ValueError(
            f"--ds_config {config.run.ds_config}: ZeRO stage {zero['stage']} with its optimizer on "
            "the host computes wrong gradients of an image encoder; use "
            "ds_configs/zero3_offload.json, or --freeze_vision"
        )


def _check_tokens(flag: str, path: str, theirs: Pixels, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        images = prompt.images
        try:
            ids: Any = theirs.expanded(images.text, images.pictures)
        except Exception as error:  # a processor is a program of others: it may fail in any way
            raise ValueError(
                f"{flag} {path}: its processor refuses images that the student's takes: "
                f"{one_line(error)}"
            ) from None
        if ids != prompt.token_ids:
            raise ValueError(
                f"{flag} {path}: makes {len(ids)} tokens of a prompt with images, the student "
                f"{images.num_tokens} ({images.text!r:.120}); choose a teacher that sees as the "
                "student does, or copy the student's preprocessor_config.json into it"
            )


def _check_joined(flag: str, path: str, pixels: Pixels, prompts: Sequence[Prompt]) -> None:
    try:
        pixels.check_joined([prompt.images for prompt in prompts])
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {one_line(error)}") from None
