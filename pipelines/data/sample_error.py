"""Why a sample can't be packed or used. Must not know formats, shards or cards."""

from __future__ import annotations

from models.core.errors import TesseraError


class SampleError(TesseraError):
    """A sample that can't be packed or used, because of its image or its annotation.

    `reason` is the category under which `rejected.jsonl` and messages count it, such as
    "unreadable image" or "box without area"; the message names the image and the object.
    `of_object` is True if only one object is damaged, which `--drop boxes` drops.
    """

    def __init__(
        self, reason: str, message: str, *, hint: str = "", of_object: bool = False
    ) -> None:
        super().__init__(message, hint=hint)
        self.reason, self.of_object = reason, of_object

    def __reduce__(self) -> tuple[object, ...]:  # exceptions go to other processes
        return (_rebuild, (self.reason, self.message, self.hint, self.of_object))


def _rebuild(reason: str, message: str, hint: str, of_object: bool) -> SampleError:
    return SampleError(reason, message, hint=hint, of_object=of_object)
