"""The code of docs/integrations.md runs, and its tables name what `swap_quantizers` knows."""

import re
from pathlib import Path

import pytest

from regvq_fast.integrations.swapping import KNOWN

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
LIBRARIES = {name: name for name in ("diffusers", "vector_quantize_pytorch", "transformers")} | {"taming": "einops"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.sub(r"\W+", "-", block)[:60])
def test_block_runs(block, capsys):
    for library, needs in LIBRARIES.items():
        if f"from {library}" in block:
            pytest.importorskip(needs)
            pytest.importorskip(library)
    exec(compile(block, "docs/integrations.md", "exec"), {})
    # What a print says in a comment, up to where the comment breaks off.
    comments = re.findall(r"^\s*print\(.*\)  # (.*)$", block, re.MULTILINE)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(comments)
    for said, line in zip(comments, printed, strict=True):
        assert line.startswith(said.removesuffix("...)"))


def test_every_known_class_is_in_the_table():
    table = TEXT.split("## Coverage")[1].split("\nDifferences:")[0]
    assert len(BLOCKS) == 10
    assert [name for name in KNOWN if f"`{name.rsplit('.', 1)[1]}`" not in table] == []
