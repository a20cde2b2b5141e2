"""What a model that sees is given beside token ids: pixels, grids, types of tokens.

Its own processor makes them. Families differ in the tensors, and in how those of several prompts
are joined; `Pixels` joins along the first axis and fills the others up with zeros, which
`check_joined` compares with what the processor does for several prompts at once.

B rows of a batch, S padded length, P tokens of a prompt.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available, logging

from opd.pictures import Picture, PromptImages

CACHE_BYTES = 2 << 30  # of processed pixels on the host
TEXT_KEYS = ("input_ids", "attention_mask")
LOADED_APART = {"image_processor", "tokenizer", "video_processor"}  # parts of a processor


@dataclass(frozen=True, slots=True)
class _Processed:
    """A prompt behind its processor."""

    token_ids: list[int]  # [P] expanded
    of_tokens: dict[str, Tensor]  # [P] each
    of_images: dict[str, Tensor]  # of any shape, rows or images or patches first

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.of_tokens.values(), *self.of_images.values()))


class Pixels:
    """A model's processor at work, with a bounded memory of what it has made. It is read when it is
    first asked for, which text alone never does.
    """

    def __init__(
        self, model: str, trust_remote_code: bool = False, *, cache_bytes: int = CACHE_BYTES
    ):
        self.model, self.trust_remote_code = model, trust_remote_code
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[Any, ...], _Processed] = OrderedDict()
        self._cached_bytes = 0

    @functools.cached_property
    def processor(self) -> Any:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # without torchvision it warns of its own fallback
        try:
            return _load_processor(self.model, trust_remote_code=self.trust_remote_code)
        finally:
            logging.set_verbosity(verbosity)

    def expanded(self, text: str, pictures: Sequence[Picture]) -> list[int]:
        """The token ids of a rendered prompt with its placeholders expanded.

        Raises what the processor raises, which may be anything.
        """
        return self._processed(text, tuple(pictures)).token_ids

    def check_tokens(self, name: str, ids: Sequence[int], images: PromptImages | None) -> None:
        """ValueError, with whose processor this is, if `ids`, which begin with a prompt, have other
        tokens for its images than it makes.
        """
        if images is None:
            return
        own = self.expanded(images.text, images.pictures)
        if list(ids[: images.num_tokens]) != own:
            raise ValueError(
                f"{name}: its processor makes {len(own)} other tokens of a prompt with images than "
                f"the {images.num_tokens} of the student's: {images.text!r:.120}"
            )

    def inputs_of(
        self, model: nn.Module, rows: Sequence[PromptImages | None], padded_length: int
    ) -> dict[str, Tensor]:
        """`inputs` on the device of `model`, in its type."""
        weight = next(model.parameters())
        return {
            name: t.to(weight.device, weight.dtype if t.is_floating_point() else None)
            for name, t in self.inputs(rows, padded_length).items()
        }

    def inputs(self, rows: Sequence[PromptImages | None], padded_length: int) -> dict[str, Tensor]:
        """What a model gets beside the right-padded ids of `rows`, [B, S] or of images; nothing
        where no row has an image.
        """
        found = {
            b: self._processed(images.text, images.pictures)
            for b, images in enumerate(rows)
            if images is not None
        }
        inputs = {}
        for name in next(iter(found.values())).of_tokens if found else ():
            rows_BS = torch.zeros(len(rows), padded_length, dtype=torch.long)
            for b, processed in found.items():
                values_P = processed.of_tokens[name]
                rows_BS[b, : len(values_P)] = values_P
            inputs[name] = rows_BS
        return inputs | _joined([processed.of_images for processed in found.values()])

    def types_tokens(self, images: PromptImages) -> bool:
        """Whether the model is told of each token what it shows: its positions or its attention
        depend on it.
        """
        return bool(self._processed(images.text, images.pictures).of_tokens)

    def check_joined(self, rows: Sequence[PromptImages]) -> None:
        """ValueError if the processor joins these prompts in another way than `inputs` does."""
        known = self._call([row.text for row in rows], rows)
        ours = self.inputs(rows, known["input_ids"].shape[1])
        for name, theirs in known.items():
            if name in TEXT_KEYS:
                continue
            mine = ours.get(name)
            is_of_tokens = theirs.shape == known["input_ids"].shape
            if is_of_tokens:  # it may pad on the left
                same = mine is not None and torch.equal(mine.sum(-1), theirs.sum(-1).to(mine.dtype))
            else:
                same = mine is not None and torch.equal(mine, theirs)
            if not same:
                raise ValueError(
                    f"its processor joins `{name}` of several prompts in a way that is not known "
                    "here; choose another model"
                )

    def _processed(self, text: str, pictures: tuple[Picture, ...]) -> _Processed:
        key = (text, *(picture.digest for picture in pictures))
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        images = PromptImages(pictures, text, (), 0)
        found = dict(self._call([text], [images]))
        (ids_P,) = found.pop("input_ids")
        shape = (1, len(ids_P))
        found.pop("attention_mask", None)
        processed = _Processed(
            ids_P.tolist(),
            {name: t[0] for name, t in found.items() if t.shape == shape},
            {name: t for name, t in found.items() if t.shape != shape},
        )
        self._cache[key] = processed
        self._cached_bytes += processed.num_bytes
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.num_bytes
        return processed

    def _call(self, texts: list[str], rows: Sequence[PromptImages]) -> dict[str, Tensor]:
        return self.processor(
            text=texts,
            images=[row.open() for row in rows],
            padding=len(texts) > 1,
            add_special_tokens=False,  # the chat template writes its own
            return_tensors="pt",
        )


def _load_processor(model: str, **options) -> Any:
    """The processor of a model.

    Families that see videos too want torchvision for them (transformers 5.19), which has no CPU
    build for this torch; without it they are built without that part.
    """
    try:
        return AutoProcessor.from_pretrained(model, **options)
    except ImportError:
        if is_torchvision_available():
            raise
        family = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(model, **options))]

        class Images(family):
            def check_argument_for_proper_class(self, name, argument):
                return argument and super().check_argument_for_proper_class(name, argument)

        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        images = AutoImageProcessor.from_pretrained(model, **options)
        said, _ = family.get_processor_dict(model, **options)  # how many tokens an image takes
        wanted = inspect.signature(family.__init__).parameters
        said = {name: said[name] for name in said.keys() & wanted.keys() - LOADED_APART}
        said = {"chat_template": tokenizer.chat_template} | said
        return Images(image_processor=images, tokenizer=tokenizer, video_processor=None, **said)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several prompts along the first axis, the other axes filled up with zeros."""
    joined = {}
    for name in parts[0] if parts else ():
        tensors = [part[name] for part in parts]
        widest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        joined[name] = torch.cat(
            [
                pad(
                    tensor,
                    [
                        n
                        for have, want in zip(
                            reversed(tensor.shape[1:]), reversed(widest), strict=True
                        )
                        for n in (0, want - have)
                    ],
                )
                for tensor in tensors
            ]
        )
    return joined
