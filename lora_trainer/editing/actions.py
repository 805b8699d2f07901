"""What can be done to captions, as a page asks for it in JSON."""

from __future__ import annotations

import msgspec

from lora_trainer.editing import tags
from lora_trainer.errors import DataError


class Write(msgspec.Struct, frozen=True, tag_field="kind", tag="write", forbid_unknown_fields=True):
    """The whole caption anew."""

    caption: str

    def edited(self, _: str) -> str:
        return self.caption

    def label(self) -> str:
        return "write the caption"


class Add(msgspec.Struct, frozen=True, tag_field="kind", tag="add", forbid_unknown_fields=True):
    """The tags where they are missing."""

    tags: str
    front: bool = False

    def edited(self, caption: str) -> str:
        return tags.with_tags(caption, _some(self.tags), front=self.front)

    def label(self) -> str:
        return f"add “{self.tags}”"


class Remove(msgspec.Struct, frozen=True, tag_field="kind", tag="remove", forbid_unknown_fields=True):
    """The tags wherever they are."""

    tags: str

    def edited(self, caption: str) -> str:
        return tags.without_tags(caption, _some(self.tags))

    def label(self) -> str:
        return f"remove “{self.tags}”"


class Replace(msgspec.Struct, frozen=True, tag_field="kind", tag="replace", forbid_unknown_fields=True):
    """A tag, or with `text` any piece of text, by other words."""

    old: str
    new: str
    text: bool = False

    def edited(self, caption: str) -> str:
        if self.text:
            if not self.old:
                raise DataError("expected a text to replace, found none")
            return tags.with_text_replaced(caption, self.old, self.new)
        olds = _some(self.old)
        if len(olds) > 1:
            raise DataError("expected one tag to replace, found several")
        return tags.with_tag_replaced(caption, olds[0], tags.typed(self.new))

    def label(self) -> str:
        return f"replace “{self.old}” by “{self.new}”"


Action = Write | Add | Remove | Replace


def _some(text: str) -> list[str]:
    found = tags.typed(text)
    if not found:
        raise DataError("expected a tag, found none")
    return found
