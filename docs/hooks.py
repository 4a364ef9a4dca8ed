"""Hooks of the site's build: pages from the whole checkout, notebooks as pages, formulas as MathML."""

import base64
import json
import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

_LINK = re.compile(r"\[([\w./-]+\.md)\]\(([\w./-]+\.md)(#[\w-]+)?\)")
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code>)")
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_config(config: Any) -> None:
    """Take pages from the checkout, so that relative links are those of GitHub."""
    config.docs_dir = str(Path(config.config_file_path).parent)


def on_files(files: Any, config: Any) -> None:
    """Add a page and the images of each notebook."""
    for path in sorted(Path(config.docs_dir, "docs", "notebooks").glob("*.ipynb")):
        page, images = notebook_page(path)
        for name, content in {f"{path.stem}.md": page, **images}.items():
            files.append(File.generated(config, f"docs/notebooks/{name}", content=content))


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the PNG images that it links to by their names."""
    parts, images = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(images)}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![output]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join([*parts, f"[The notebook as a file]({path.name})"]), images


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Name linked pages by their titles instead of their paths, and link to the pages of notebooks."""
    home = posixpath.dirname(page.file.src_uri)

    def titled(match: re.Match[str]) -> str:
        linked = files.get_file_from_path(posixpath.normpath(posixpath.join(home, match[2])))
        return f"[{linked.page.title}]({match[2]}{match[3] or ''})" if linked and linked.page else match[0]

    return _LINK.sub(titled, re.sub(r"(\]\([\w/]*notebooks/\w+)\.ipynb\)", r"\1.md)", markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers show without a script, and drop the roles of docstrings."""
    html = _INLINE.sub(lambda match: mathml(match[1], "inline"), _ROLE.sub("", html))
    return _BLOCK.sub(lambda match: mathml(match[1], "block"), html)


def mathml(escaped: str, display: str) -> str:
    """Return a formula as MathML, in terms that the converter knows."""
    formula = unescape(escaped).replace("{aligned}", "{align*}").replace(r"\arg", r"\mathrm{arg}\,")
    return convert(formula, display=display)
