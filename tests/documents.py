"""Markdown and shell commands, read as the tests of the documents need them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "examples" / "guides"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("examples/*/*.md")),
    ROOT / "tests" / "benchmarks" / "README.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPERATORS = ("&&", "||", "|", ";", "&")


@dataclass(frozen=True)
class Command:
    """A command of a shell block.

    Attributes:
        line: of the document where its block begins.
        words: the program and its arguments, unquoted.
    """

    document: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}: {shlex.join(self.words)}"


def blocks(document: Path, language: str) -> Iterator[tuple[int, str]]:
    """Fenced blocks of a language, each with the line it begins on."""
    text = document.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[1] == language:
            yield text.count("\n", 0, found.start()) + 1, found[2]


def prose(document: Path) -> str:
    """The text without fenced blocks."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def spans(document: Path) -> list[str]:
    """Code within the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def commands(document: Path) -> Iterator[Command]:
    """The commands of all shell blocks, one after the other, without redirections."""
    for line, text in blocks(document, "sh"):
        for written in text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*_words(written), ";"]:
                if word not in OPERATORS:
                    words.append(word)
                elif words:
                    kept = words[: words.index(">")] if ">" in words else words
                    yield Command(document, line, tuple(kept))
                    words = []


def anchors(document: Path) -> set[str]:
    """What links to the headings of a document end with."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def links(document: Path) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(document))


def _words(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;>")
    lexer.whitespace_split = True
    return list(lexer)
