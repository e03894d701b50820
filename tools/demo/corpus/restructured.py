"""A parser of as much reStructuredText as the Python documentation uses: plain text, API entries, sections."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field

__all__ = ["Entry", "Page", "Section", "read_page"]

_API = (
    "function|method|class|attribute|data|exception|classmethod|staticmethod|decorator|coroutinefunction|"
    "coroutinemethod|awaitablefunction|abstractmethod|c:function|c:macro|c:type|c:member|c:var|opcode|"
    "pdbcommand|cmdoption|option|describe|decoratormethod|audit-event"
)
_DIRECTIVE = re.compile(r"^(\s*)\.\. ([\w:-]+)::\s*(.*)$")
_DROPPED = re.compile(
    "index|module|currentmodule|moduleauthor|sectionauthor|toctree|highlight|contents|only|raw|image|figure|"
    "program|testsetup|testcleanup|audit-event|audit-event-table|include|literalinclude|role|tabularcolumns|"
    "rubric|availability|impl-detail|productionlist|grammar-snippet|XXX|todo"
)
_LABELS = {
    "versionadded": "New in version {}",
    "versionchanged": "Changed in version {}",
    "deprecated": "Deprecated since version {}",
    "deprecated-removed": "Deprecated, to be removed, version {}",
}
_UNDERLINE = re.compile(r"^([=\-~^\"'*#+.:])\1{2,}\s*$")


@dataclass(frozen=True)
class Entry:
    """One documented name: `kind` as in the directive, `signatures` as in the source, `text` without markup."""

    kind: str
    name: str
    signatures: tuple[str, ...]
    text: str


@dataclass
class Section:
    """A heading and the lines of text below it, without API entries."""

    title: str
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """A page's module name ('' if it documents none), its entries, and the (title, text) of its sections."""

    module: str
    entries: tuple[Entry, ...]
    sections: tuple[tuple[str, str], ...]


def read_page(source: str) -> Page:
    """Parse one `.rst.txt` file."""
    source = re.sub(r"\\\n\s*", "", source.expandtabs(4))
    named = re.search(r"^\.\. (?:module|currentmodule):: (\S+)", source, flags=re.M)
    entries: list[Entry] = []
    prose = _split_entries(source.split("\n"), "", entries)
    sections = [Section("")]
    position = 0
    while position < len(prose):
        line = prose[position]
        following = prose[position + 1] if position + 1 < len(prose) else ""
        if line.strip() and not line.startswith((" ", "..")) and _UNDERLINE.match(following):
            sections.append(Section(_inline(line.strip())))
            position += 2
            continue
        if not _UNDERLINE.match(line):
            sections[-1].lines.append(line)
        position += 1
    plain = tuple((section.title, _plain(section.lines)) for section in sections)
    return Page(named.group(1) if named else "", tuple(entries), tuple(s for s in plain if s[1]))


def _split_entries(lines: list[str], parent: str, entries: list[Entry]) -> list[str]:
    """Move API directives out of `lines` into `entries` (nested names as `parent.name`); return the other lines."""
    rest: list[str] = []
    position = 0
    while position < len(lines):
        found = re.match(rf"^(\s*)\.\. (?:py:)?({_API})::\s*(.*)$", lines[position])
        if not found:
            rest.append(lines[position])
            position += 1
            continue
        indent = len(found.group(1))
        body, position = _body(lines, position + 1, indent)
        signatures = [found.group(3).strip()]
        while body and body[0].strip():
            first = body.pop(0).strip()
            if not first.startswith(":"):
                signatures.append(first)
        name = re.split(r"[(\s]", signatures[0].removeprefix("@"))[0]
        kind = found.group(2)
        if kind.startswith("c:"):
            called = re.search(r"(\w+)\s*(?:\(|$)", signatures[0])
            name = called.group(1) if called else name
        qualified = f"{parent}.{name}" if parent and "." not in name else name
        text = _plain(_split_entries(body, qualified if kind in ("class", "exception") else parent, entries))
        if text:
            entries.append(Entry(kind, qualified, tuple(signatures), text))
    return rest


def _body(lines: list[str], position: int, indent: int) -> tuple[list[str], int]:
    """Return the lines of a directive's body, dedented, and the index of the line after it."""
    body: list[str] = []
    while position < len(lines):
        line = lines[position]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        body.append(line)
        position += 1
    return textwrap.dedent("\n".join(body)).split("\n"), position


def _plain(lines: list[str]) -> str:
    """Resolve directives and inline markup. Runs of blank lines become one; paragraphs keep their line breaks."""
    out: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        found = _DIRECTIVE.match(line)
        comment = re.match(r"^(\s*)\.\.( |$)", line)
        if found:
            indent, kind, argument = len(found.group(1)), found.group(2), found.group(3)
            body, position = _body(lines, position + 1, indent)
            if not _DROPPED.fullmatch(kind):
                out += ["", *_directive(kind, argument, body, " " * indent), ""]
        elif comment:
            position = _body(lines, position + 1, len(comment.group(1)))[1]
        else:
            out.append(_inline(line))
            position += 1
    text = "\n".join(line.rstrip() for line in out)
    text = re.sub(r"^-{4,}$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _directive(kind: str, argument: str, body: list[str], indent: str) -> list[str]:
    body = [line for line in body if not re.match(r"^\s*:\w[\w -]*:", line)]
    if kind in ("code-block", "sourcecode", "doctest", "testcode", "testoutput", "parsed-literal", "code"):
        return [f"{indent}   {line}" for line in body]
    text = _plain([argument, *body] if kind not in _LABELS else body)
    if kind in _LABELS:
        version, _, note = argument.partition(" ")
        head = _LABELS[kind].format(version)
        note = _inline(f"{note} {text}".strip())
        return [indent + (f"{head}: {note}" if note else f"{head}.")]
    if kind in ("note", "warning", "tip", "seealso", "important", "caution", "attention"):
        return [f"{indent}{'See also' if kind == 'seealso' else kind.capitalize()}: {text}"]
    return [indent + line for line in text.split("\n")]


def _inline(line: str) -> str:
    """Replace roles and references by their text, and the double backticks of literals by single ones."""
    line = re.sub(
        r":(?:ref|doc|term|pep|rfc|dfn|samp|file|abbr|guilabel|menuselection|mailheader|program)"
        r":`([^`<]*?)\s*(?:<[^`]*>)?`",
        r"\1",
        line,
    )
    line = re.sub(r":[\w:+-]+:`!?~?([^`<]*?)\s*(?:<[^`]*>)?`", _role, line)
    line = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", line)
    line = re.sub(r"``([^`]+)``", r"`\1`", line)
    line = re.sub(r"(?<!\w)\*\*([^*]+)\*\*", r"\1", line)
    line = re.sub(r"\[[#\w]+\]_", "", line)
    line = re.sub(r"\|([\w-]+)\|", r"\1", line).replace("\\ ", "").replace("\\*", "*")
    return re.sub(r"\s*::$", ":", line)


def _role(found: re.Match[str]) -> str:
    return f"`{found.group(1).lstrip('.')}`"
