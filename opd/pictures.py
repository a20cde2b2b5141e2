"""Images of prompts: what travels with a prompt to sampler, teachers and student."""

import base64
import functools
import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

MOST_PIXELS = 64_000_000  # of one image; PIL warns of a decompression bomb from 89 million on


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image: its bytes, or the path of the file that holds them."""

    source: bytes | str
    digest: str  # SHA-256 of the encoded image

    @classmethod
    def of(cls, source: bytes | str) -> "Picture":
        """Raises OSError for a file that cannot be read."""
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return cls(source, hashlib.sha256(content).hexdigest())

    def open(self) -> Image.Image:
        """The image as every model gets it: upright, in RGB.

        An alpha channel is left out and EXIF turns it, as `load_image` of transformers 5.19 does.
        vLLM would do neither, so it is given the result.
        """
        encoded = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        with Image.open(encoded) as image:
            return ImageOps.exif_transpose(image).convert("RGB")

    def check(self) -> None:
        """ValueError for what cannot be decoded, and for what is no single picture."""
        encoded = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(encoded) as image:
                    width, height = image.size
                    if width * height > MOST_PIXELS:
                        raise ValueError(f"{width} x {height} pixels, over {MOST_PIXELS}")
                    # a camera's JPEG may bring a preview or a second eye, which nobody is shown
                    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                        raise ValueError(f"{image.n_frames} frames; only still images are read")
                    image.load()
            self.open()
        # a broken file breaks decoders in any way it likes
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"cannot be read: {reason}") from None

    @property
    def content(self) -> bytes:
        """The encoded image, as a file of it would be."""
        return self.source if isinstance(self.source, bytes) else Path(self.source).read_bytes()


@dataclass(frozen=True, slots=True)
class PromptImages:
    """The images of a prompt, and the prompt before its placeholders were expanded.

    transformers is given expanded ids, one for each embedding of an image. vLLM expands by itself,
    and would expand what is expanded again.
    """

    pictures: tuple[Picture, ...]  # in the order of their placeholders
    text: str  # the rendered prompt
    unexpanded_ids: tuple[int, ...]  # the tokens of `text`, a placeholder for each image
    num_tokens: int  # of the prompt with its placeholders expanded

    def unexpanded(self, ids: list[int]) -> list[int]:
        """Prompt and response with the prompt as vLLM wants it.

        Example: for a placeholder 9 of three tokens, [5, 9, 9, 9, 6, 7] becomes [5, 9, 6, 7].
        """
        return [*self.unexpanded_ids, *ids[self.num_tokens :]]

    def to_json(self) -> dict[str, Any]:
        """For another process: encoded images as base64."""
        pictures = [base64.b64encode(picture.content).decode() for picture in self.pictures]
        return {
            "pictures": pictures,
            "text": self.text,
            "unexpanded_ids": list(self.unexpanded_ids),
            "num_tokens": self.num_tokens,
        }

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "PromptImages":
        """The inverse of `to_json`."""
        pictures = tuple(
            Picture.of(base64.b64decode(encoded, validate=True)) for encoded in said["pictures"]
        )
        ids = tuple(said["unexpanded_ids"])
        return cls(pictures, said["text"], ids, said["num_tokens"])

    def open(self) -> list[Image.Image]:
        """The images as every model gets them; see `Picture.open`."""
        return [_opened(picture) for picture in self.pictures]

    def shown(self) -> list[bytes]:
        """The same as files, for a server that opens them in its own way."""
        return [_shown(picture) for picture in self.pictures]


@functools.lru_cache(maxsize=32)
def _opened(picture: Picture) -> Image.Image:
    """The responses of a step ask for the same few images again and again."""
    return picture.open()


@functools.lru_cache(maxsize=32)
def _shown(picture: Picture) -> bytes:
    """Without loss."""
    encoded = io.BytesIO()
    _opened(picture).save(encoded, format="PNG")
    return encoded.getvalue()


def token_difference(found: Sequence[int], ids: Sequence[int]) -> str:
    """How what somebody made of a prompt with images differs from what the student made of it."""
    place = next(
        (i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b),
        min(len(found), len(ids)),
    )
    return (
        f"{len(found)} tokens of a prompt with images, the student's processor {len(ids)}; from "
        f"token {place} on {list(found[place : place + 8])} and {list(ids[place : place + 8])}"
    )
