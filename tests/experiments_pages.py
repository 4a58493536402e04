"""What every page must hold to: whole, offline, readable by a screen reader, and its links lead somewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

__all__ = ["Tags", "check_page"]


class Tags(HTMLParser):
    """Holds that every tag is closed, and collects what a page loads, where it leads, and the names on it."""

    VOID = ("meta", "input", "br", "path", "use")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.names: list[str] = []
        self.seen: list[str] = []
        self.unscoped = 0
        self.unlabelled = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._see(tag, dict(attributes))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._see(tag, dict(attributes))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def _see(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.seen.append(tag)
        targets = [attributes[name] or "" for name in ("src", "href", "xlink:href") if name in attributes]
        (self.links if tag == "a" else self.loaded).extend(targets)
        self.names += [value for name, value in attributes.items() if name == "id" and value]
        self.unscoped += tag == "th" and "scope" not in attributes
        self.unlabelled += attributes.get("role") in ("img", "region") and not attributes.get("aria-label")


def check_page(text: str, where: Path) -> Tags:
    """Hold all that, of a page in the directory ``where``."""
    tags = Tags()
    tags.feed(text)
    assert not [tag for tag in tags.open if tag not in ("option", "li")]
    assert all(target.startswith("#") for target in tags.loaded), "it needs no network"
    assert len(text) < 2_000_000
    assert not tags.unscoped
    assert not tags.unlabelled
    assert tags.links, "every figure leads to its run"
    for target in tags.links:
        if target.startswith("#"):
            assert target[1:] in tags.names
        else:
            assert (where / unquote(target)).exists(), target
    for color in ("#010203", "#040506", "#070809"):
        assert color not in text
    # Pictures share markers and clip paths of the same name, which are the same.
    own = [name for name in tags.names if not re.fullmatch(r"[mp][0-9a-f]{10}", name)]
    assert len(own) == len(set(own))
    return tags
