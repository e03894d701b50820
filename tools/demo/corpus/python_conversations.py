"""Question-and-answer conversations from the Python documentation and the standard library's source."""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from draftcache.tools.demo.corpus.conversation import Conversation, make, rng_for, take_paragraphs
from draftcache.tools.demo.corpus.restructured import Entry, read_page

__all__ = ["docs_conversations", "library_conversations"]

_PIECE = 1000
"""Characters of one answer: about 280 tokens."""
_SKIPPED = frozenset(
    {"test", "tests", "site-packages", "idle_test", "encodings", "pydoc_data", "ensurepip", "lib-dynload"}
)
_API_QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}`.",
    "How do I use `{name}`?",
    "Document `{name}` for me.",
    "What is `{name}` in Python?",
    "Tell me about the {kind} `{name}`.",
    "I came across `{name}`. What is it for?",
)
_SECTION_QUESTIONS = (
    "Tell me about {title}.",
    "Explain {title}.",
    "What should I know about {title}?",
    "Give me an introduction to {title}.",
    "{title}: what does the Python documentation say?",
)
_MORE = ("Go on.", "Tell me more.", "What else?", "Please continue.", "And then?", "Is there more?")
_CODE_QUESTIONS = (
    "Complete this Python function:\n\n```python\n{head}\n```",
    "Write the body of this function.\n\n```python\n{head}\n```",
    "Implement this:\n\n```python\n{head}\n```",
    "Finish the function.\n\n```python\n{head}\n```",
)


def docs_conversations(directory: Path) -> Iterator[Conversation]:
    """Yield the API entries, FAQ answers and sections of every page; the held-out item is the module or page."""
    for path in sorted(directory.rglob("*.rst.txt")):
        name = path.relative_to(directory).as_posix().removesuffix(".rst.txt")
        if name.startswith(("whatsnew/changelog", "contents", "license")):
            continue
        page = read_page(path.read_text(encoding="utf-8"))
        item = _item(path.name.removesuffix(".rst.txt"))
        for entry in page.entries:
            yield from _entry_conversation(name, item, page.module, entry)
        for title, text in page.sections:
            yield from _section_conversations(name, item, title, text)


def _item(stem: str) -> str:
    return f"python/{stem.split('.')[0].lstrip('_').lower()}"


def _entry_conversation(page: str, item: str, module: str, entry: Entry) -> Iterator[Conversation]:
    """Yield one question about one documented name. Entries below 60 characters say too little and are skipped."""
    if len(entry.text) < 60:
        return
    named = entry.name
    if module and not named.startswith(module) and not entry.kind.startswith(("c:", "op", "pdb", "cmd")):
        named = f"{module}.{named}"
    rng = rng_for("entry", page, named, entry.text[:80])
    signature = "\n".join(f"`{s}`" for s in entry.signatures[:3])
    pieces = take_paragraphs(entry.text, _PIECE)[:3]
    kind = entry.kind.split(":")[-1].replace("coroutine", "coroutine ").replace("data", "constant")
    turns = [rng.choice(_API_QUESTIONS).format(name=named, kind=kind), f"{signature}\n\n{pieces[0]}"]
    for piece in pieces[1:]:
        turns += [rng.choice(_MORE), piece]
    yield make("docs-api", item, named, turns)


def _section_conversations(page: str, item: str, title: str, text: str) -> Iterator[Conversation]:
    """Yield a section in pieces of 1,000 characters, three to a conversation. An FAQ's heading is the question."""
    if len(text) < 120 or not title:
        return
    source = "docs-faq" if page.startswith("faq/") else "docs-text"
    pieces = take_paragraphs(text, _PIECE)
    for start in range(0, len(pieces), 3):
        rng = rng_for("section", page, title, str(start))
        question = title if title.endswith("?") else rng.choice(_SECTION_QUESTIONS).format(title=title)
        if start:
            question = f"Continue with {title}, part {start // 3 + 1}."
        turns: list[str] = []
        for piece in pieces[start : start + 3]:
            turns += [rng.choice(_MORE) if turns else question, piece]
        yield make(source, item, f"{page} {title} {start}", turns)


def library_conversations() -> Iterator[Conversation]:
    """Yield docstrings ("what does X do") and function bodies ("complete this") of this interpreter's library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED & set(parts) or any(part.startswith(("config-", "_sysconfigdata")) for part in parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except SyntaxError:  # the library keeps a few files that no longer parse as fixtures
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from _walk(tree, module, _item(parts[0]), source.splitlines())


def _walk(node: ast.AST, prefix: str, item: str, lines: list[str]) -> Iterator[Conversation]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}"
            yield from _docstring_conversation(child, name, item)
            if not isinstance(child, ast.ClassDef):
                yield from _function_conversation(child, name, item, lines)
            yield from _walk(child, name, item, lines)


def _docstring_conversation(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str, item: str
) -> Iterator[Conversation]:
    text = ast.get_docstring(node)
    if text is None or len(text) < 80:
        return
    rng = rng_for("docstring", name)
    arguments = "" if isinstance(node, ast.ClassDef) else ast.unparse(node.args)
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    head = f"`class {node.name}`" if kind == "class" else f"`{node.name}({arguments})`"
    pieces = take_paragraphs(inspect.cleandoc(text), _PIECE)[:2]
    turns = [rng.choice(_API_QUESTIONS).format(name=name, kind=kind), f"{head}\n\n{pieces[0]}"]
    for piece in pieces[1:]:
        turns += [rng.choice(_MORE), piece]
    yield make("docstrings", item, name, turns)


def _function_conversation(
    node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, item: str, lines: list[str]
) -> Iterator[Conversation]:
    """Yield the head (signature, docstring if short) as the question and the whole function as the answer."""
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    documented = ast.get_docstring(node) is not None and len(node.body) > 1
    head_end = (node.body[0].end_lineno or first + 1) if documented else node.body[0].lineno - 1
    body = inspect.cleandoc("\n" + "\n".join(lines[first:last]))
    head = inspect.cleandoc("\n" + "\n".join(lines[first:head_end]))
    if not 160 <= len(body) <= 1100 or not 10 <= len(head) <= 500 or len(body) - len(head) < 60:
        return
    question = rng_for("code", name, head).choice(_CODE_QUESTIONS).format(head=head)
    yield make("code", item, name, (question, f"```python\n{body}\n```"))
