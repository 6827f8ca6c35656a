"""A card that is written anew without losing what people wrote in it.

Read `merge_card`. Sections begin with a "## " heading. Ours carry a comment with a hash of their text, by which it is told
whether a person has changed them; so does the text before the first heading, from the comment on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hf_mimic.card_metadata import merge_metadata, split_card

EDITED = " (edited by hand)"
_HEADING = re.compile(r" {0,3}##(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_COMMENT = re.compile(r" {0,3}<!--")
_MARK = re.compile(r"\s*<!-- hf_mimic:([0-9a-f]{8}) -->\s*$")
_TITLE = re.compile(r" {0,3}#[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")


@dataclass(frozen=True)
class Section:
    """A part of a card.

    Args:
        head: The heading's line; of the text before the first one, everything up to the mark.
        text: What follows, without the mark.
        mark: The hash that it carries; None if it is not ours.
    """

    head: str
    text: str
    mark: str | None = None

    @property
    def name(self) -> str:
        """The words of the heading, for comparison."""
        found = _HEADING.match(self.head)
        return " ".join((found[1] or "").split()) if found else ""

    @property
    def is_unchanged(self) -> bool:
        """Whether it is ours, and as we wrote it."""
        return self.mark == self.hash

    @property
    def hash(self) -> str:
        """Of heading and text; spaces at the ends of lines do not count."""
        lines = [line.rstrip() for line in self.text.strip().split("\n")]
        canonical = "\n".join([self.name, *lines]).strip()
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    def marked(self) -> Section:
        """Return it with the mark of ours, unless there is nothing in it."""
        return Section(self.head, self.text.strip("\n"), self.hash) if self.head or self.text else self

    def __str__(self) -> str:
        if self.mark is None:
            return f"{self.head}\n{self.text}".strip("\n")
        gap = "\n\n" if "\n" in self.head else "\n"
        return f"{self.head}{gap}<!-- hf_mimic:{self.mark} -->\n\n{self.text}".strip("\n")


def merge_card(existing: str | None, fresh: str) -> str:
    """Return a card with our sections as in `fresh`, and everything that people wrote as in `existing`.

    Of our sections the ones that were edited by hand are kept behind the fresh ones; those that `fresh` has no more are
    left out, unless they were edited. Merging the same card once more changes nothing.

    Args:
        existing: The card as it is; None or empty where there is none.
        fresh: From `mark_sections`: ours.

    Raises:
        ValueError: If the metadata of `existing` cannot be read.
    """
    own_metadata, own_body = split_card(_line_feeds(fresh))
    new = [section if section.mark else section.marked() for section in _sections(own_body)]
    if existing is None or not existing.strip("\ufeff \t\r\n"):
        return _card(own_metadata, new)
    metadata, body = split_card(_line_feeds(existing))
    old = _sections(body)
    merged = [*_intro(old[0], new[0]), *_merged(old[1:], new[1:])]
    card = _card(merge_metadata(metadata, own_metadata), merged)
    return card.replace("\n", "\r\n") if existing.count("\r\n") * 2 > existing.count("\n") else card


def mark_sections(body: str) -> str:
    """Return the body of a card of ours with the marks by which `merge_card` knows its sections.

    Args:
        body: Its first line is the title.
    """
    first, *rest = _sections(body)
    title, _, text = first.head.partition("\n")
    return _joined(section.marked() for section in (Section(title, text.strip("\n")), *rest))


def _merged(old: Sequence[Section], new: Sequence[Section]) -> list[Section]:
    fresh = dict(zip(_keys(new), new, strict=True))
    places = {key: i for i, key in enumerate(fresh)}
    result: list[tuple[int | None, Section]] = []  # with its place among ours
    for key, section in zip(_keys(old), old, strict=True):
        if section.mark is None:
            result.append((None, section))
            continue
        if key in fresh:
            result.append((places[key], fresh[key]))
        if not section.is_unchanged and not (key in fresh and section.hash == fresh[key].hash):
            result.append((None, _edited(section.name, section.text)))
    found = {place for place, _ in result}
    for place, section in enumerate(fresh.values()):
        if place not in found:
            result.insert(_where(result, place), (place, section))
    return [section for _, section in result]


def _where(result: Sequence[tuple[int | None, Section]], place: int) -> int:
    """Return where a section of ours belongs: behind the last one before it, or before the next, or at the end."""
    before = [i for i, (known, _) in enumerate(result) if known is not None and known < place]
    if before:
        end = before[-1] + 1
        while end < len(result) and result[end][1].name.endswith(EDITED) and result[end][0] is None:
            end += 1
        return end
    behind = [i for i, (known, _) in enumerate(result) if known is not None]
    return behind[0] if behind else len(result)


def _keys(sections: Iterable[Section]) -> list[tuple[str, int, bool]]:
    """Return what tells sections apart: the heading, and which of several with it; apart for ours and others."""
    seen: dict[tuple[str, bool], int] = {}
    keys = []
    for section in sections:
        kind = (section.name, section.mark is not None)
        seen[kind] = seen.get(kind, 0) + 1
        keys.append((section.name, seen[kind], kind[1]))
    return keys


def _intro(old: Section, new: Section) -> list[Section]:
    """Return the text before the first heading: the title that there is, ours below it, and what was edited of ours."""
    head = old.head if old.head.strip() else new.head
    parts = [replace(new, head=head)]
    if old.mark is not None and not old.is_unchanged and old.hash != new.hash and old.text.strip():
        title = _TITLE.match(head.split("\n")[0])
        parts.append(_edited(title[1] if title else "About", old.text))
    return parts


def _edited(name: str, text: str) -> Section:
    """Return a section of a person, which must not begin with a mark."""
    lines = text.split("\n")
    while lines and (not lines[0].strip() or _MARK.match(lines[0])):
        del lines[0]
    return Section(f"## {name.removesuffix(EDITED)}{EDITED}", "\n".join(["", *lines]))


def _sections(body: str) -> list[Section]:
    """Return the parts of a body; the first one is the text before the first heading."""
    lines, starts, marks = _scan(body.strip("\n"))
    intro, *chunks = [lines[start:end] for start, end in zip([0, *starts], [*starts, len(lines)], strict=True)]
    cut = min((i for i in marks if i < len(intro)), default=len(intro))
    sections = [_section(intro, cut)]
    for start, chunk in zip(starts, chunks, strict=True):
        first = next((i for i in range(1, len(chunk)) if chunk[i].strip()), 0)
        is_ours = start + first in marks
        sections.append(_section([chunk[0], *chunk[first:]], 1) if is_ours else _section(chunk, None))
    return sections


def _section(lines: list[str], cut: int | None) -> Section:
    """Return a section of ours whose mark is the line `cut`; None: a person's."""
    if cut is None:
        return Section(lines[0], "\n".join(lines[1:]).rstrip("\n"))
    found = _MARK.match(lines[cut]) if cut < len(lines) else None
    head, text = "\n".join(lines[:cut]), "\n".join(lines[cut + 1 :])
    return Section(head.strip("\n"), text.strip("\n"), found[1] if found else None)


def _scan(body: str) -> tuple[list[str], list[int], set[int]]:
    """Return the lines, where a section starts, and where a mark stands; what is open at the end is closed.

    What stands in a code fence or in a comment of several lines is neither.
    """
    lines = body.split("\n")
    starts, marks = [], set()
    end = ""  # of the fence or comment that is open
    for i, line in enumerate(lines):
        opening = _FENCE.match(line)
        if end:
            end = "" if _closes(line, end) else end
        elif opening:
            end = opening[1]
        elif _MARK.match(line):
            marks.add(i)
        elif _COMMENT.match(line):
            end = "" if _closes(line, "-->") else "-->"
        elif _HEADING.match(line):
            starts.append(i)
    return [*lines, *([end] if end else [])], starts, marks


def _closes(line: str, end: str) -> bool:
    """Whether a line ends a comment, or a code fence: with as many of the same sign at least, and nothing else."""
    if end == "-->":
        return end in line
    fence = _FENCE.match(line)
    return fence is not None and fence[1].startswith(end) and not line.strip().strip(end[0])


def _line_feeds(text: str) -> str:
    return re.sub(r"\r+\n|\r", "\n", text.removeprefix("\ufeff"))


def _card(metadata: str, sections: Iterable[Section]) -> str:
    return (f"---\n{metadata}\n---\n\n" if metadata else "") + _joined(sections)


def _joined(sections: Iterable[Section]) -> str:
    return "\n\n".join(text for text in map(str, sections) if text) + "\n"
