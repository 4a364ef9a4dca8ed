"""The language of the project: phrases and openings that its documents, docstrings and messages must not have."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    *sorted(ROOT.glob("*.md")),
    *(path for name in ("docs", "results") for path in sorted((ROOT / name).rglob("*.md"))),
]
SOURCES = [
    path
    for name in ("regvq_fast", "kernels", "bench", "train", "tests")
    for path in sorted((ROOT / name).rglob("*.py"))
    if "regvq_fast/kernels" not in path.as_posix() and path != Path(__file__)
]

OPENING = re.compile(r"(What|Whether|Whom|Whose|Where|How|Of) ")
"""Docstrings begin with a verb or with a noun."""

INSTEAD = {
    r"(?<![/\w-])places(?!\w)|\b(each|every|no|other) place\b|\bplace's": "positions",
    r"\b[Ss]hares? of\b|'s share\b": "fraction, or part of the work",
    r"\b[Pp]ictures?\b(?![/`'])(?<!a picture)(?<!`picture)(?<!checkpoints pictures)": "image, or plot for charts",
    r"\b([Rr]edrawn|[Dd]rawn|[Dd]rew)\b|\b[Dd]raw(s|ing)? (it|them|one|tokens|images|samples|from)\b": "sample",
    r"(?<![{'])\b([Tt]old|[Tt]ells?|[Tt]elling)\b|\b(say|says|said) so\b": "report, warn, log, distinguish",
    r"\b[Nn]umbers that are not finite\b|\bnot finite numbers\b": "non-finite values",
    r"\b[Pp]arts? of (a|the|its|every) (step's )?batch\b|\b[Pp]ieces of (a|the) batch\b": "micro-batches",
    r"\b[Pp]arts of (the )?codes\b": "splits",
    r"\b[Jj]oin(s|ed|ing)? the parts\b": "reduce, combine",
    r"(?<![`'\w-])(?<!def )[Ff]acts\b(?!')": "run metadata",
    r"\b[Cc]ompanions?\b": "auxiliary modules",
    r"\b[Oo]racles?\b": "PyTorch fallback, or reference",
    r"\b([Nn]obody(?!/)|[Ww]hom|[Ww]ish(es)?|be had)\b": "the plain statement",
}
"""Terms, by the patterns of the phrases that they replace; technical uses of these phrases do not match."""

RENAMED = re.compile(r"\b(GIVEN|top_code|num_ranks|local_ranks|texts_of_ranks|is_for_others_to_say)\b|ranks\.together")


@functools.cache
def lines() -> list[tuple[str, str]]:
    """Position and text of all lines of documents, comments, and strings of several words."""
    found = []
    for path in [*TEXTS, *SOURCES]:
        text = path.read_text(encoding="utf-8")
        parts = [(1, text)]
        if path.suffix == ".py":
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            named = [(tokenize.tok_name[token.type], token) for token in tokens]
            parts = [
                (token.start[0], token.string)
                for name, token in named
                if name == "COMMENT" or (name in ("STRING", "FSTRING_MIDDLE") and " " in token.string.strip())
            ]
        where = path.relative_to(ROOT)
        found += [(f"{where}:{n}", line) for start, part in parts for n, line in enumerate(part.splitlines(), start)]
    return found


@pytest.mark.parametrize("pattern", INSTEAD, ids=[re.sub(r"\W+", "-", term) for term in INSTEAD.values()])
def test_the_terms_of_the_field_are_used(pattern: str) -> None:
    term = re.compile(pattern)
    wrong = [f"{where}: {line.strip()[:120]}" for where, line in lines() if term.search(line)]
    assert not wrong, f"write {INSTEAD[pattern]}:\n" + "\n".join(wrong)


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if is_text and isinstance(node.value.value, str) and OPENING.match(node.value.value):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.value[:60]}")
    assert not wrong, "\n".join(wrong)


def test_old_names_are_gone() -> None:
    wrong = [str(path.relative_to(ROOT)) for path in SOURCES if RENAMED.search(path.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)
