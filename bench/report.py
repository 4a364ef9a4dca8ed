"""Write the measured tables and plots of README.md and docs from bench/results and results: none is typed by hand.

    python bench/report.py             fills what stands between <!-- bench:NAME --> and <!-- /bench -->, draws plots
    python bench/report.py --check     writes nothing; exits with 1 and names what differs from the results

New results: ``pytest bench/ --benchmark-only --benchmark-json bench/results/cpu.json`` on a CPU, or
``python bench/gpu.py`` on a GPU, committed with the pages that this writes from them.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import machine
import report_plots
import report_tables
from records import Document, load_all

NO_GPU = "No GPU has been measured yet: `python bench/gpu.py` measures one and leaves the JSON that fills this part."
NO_CPU = (
    "Nothing has been measured yet: `pytest bench/ --benchmark-only --benchmark-json bench/results/cpu.json` does it."
)
NO_STUDY = (
    "Not run yet: the command is above; its tables and plots go to results, and `python bench/report.py` fills this."
)
PAPER = "results/scenes-tiny"
"""What train/paper.py has left of the embedded scenes."""
SECTION = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /bench -->", re.DOTALL)


class Report:
    """The pages and plots below a folder, and what they should be by the results there."""

    def __init__(self, root: Path = machine.ROOT) -> None:
        self.root, self.results = root, root / "bench" / "results"
        documents = load_all(self.results)
        self.gpus = [document for document in documents if document.path.stem.startswith("gpu")]
        self.cpus = [document for document in documents if document not in self.gpus]

    def pages(self) -> list[Path]:
        found = [self.root / "README.md", *sorted((self.root / "docs").glob("*.md"))]
        return [page for page in found if "<!-- bench:" in page.read_text(encoding="utf-8")]

    def render(self, page: Path) -> str:
        """The page's text as it should be. Raises ValueError where a marker stands alone or isn't known."""
        text, depth = page.read_text(encoding="utf-8"), len(page.relative_to(self.root).parts) - 1
        opened, found = re.findall(r"<!-- bench:(.*?) -->", text), [match["name"] for match in SECTION.finditer(text)]
        if opened != found or text.count("<!-- /bench -->") != len(found):
            raise ValueError(f"{page}: each <!-- bench:NAME --> needs its <!-- /bench -->, on lines of their own")

        def filled(match: re.Match[str]) -> str:
            body = self.section(match["name"], depth)
            return f"<!-- bench:{match['name']} -->\n{body}\n<!-- /bench -->"

        return SECTION.sub(filled, text)

    def section(self, name: str, depth: int) -> str:
        """The Markdown of a section, for a page so many folders below the root."""
        if name in report_tables.OTHERS:
            file, make = report_tables.OTHERS[name]
            raw = json.loads((self.results / file).read_text(encoding="utf-8"))
            return f"{make(raw)}\n\n([JSON]({'../' * depth}bench/results/{file}))"
        kind, _, what = name.partition("-")
        if kind == "paper":  # a table of train/paper.py, without its title
            file = f"{PAPER}/{what}.md"
            text = (self.root / file).read_text(encoding="utf-8").partition("\n\n")[2].strip()
            return f"{text} ([the numbers of each run]({'../' * depth}{PAPER}/{what}.csv))"
        if kind == "study":  # of regvq paper quantizers on one data set
            stem, up = f"results/{what}-tiny/quantizers", "../" * depth
            if not (self.root / f"{stem}.md").exists():
                return NO_STUDY
            text = (self.root / f"{stem}.md").read_text(encoding="utf-8").partition("\n\n")[2].strip()
            return f"{text} ([the numbers of each run]({up}{stem}.csv))\n\n![curves]({up}{stem}-curves.png)"
        documents = {"cpu": self.cpus, "gpu": self.gpus}.get(kind)
        if documents is None or what not in ("summary", "tables", "plots", "targets"):
            raise ValueError(f"<!-- bench:{name} -->: no such section; see bench/report.py")
        if not documents:
            return NO_GPU if kind == "gpu" else NO_CPU
        return "\n\n".join(part for document in documents if (part := self._of(document, what, depth)))

    def _of(self, document: Document, what: str, depth: int) -> str:
        if what == "plots":
            names = report_plots.plots_of(document)
            return "\n\n".join(f"![{title}]({'../' * depth}{path})" for path, title in names.items())
        if what == "summary":
            return report_tables.source(document, depth) + "\n\n" + report_tables.summary(document)
        return report_tables.full(document, depth) if what == "tables" else report_tables.targets(document)

    def stale(self) -> list[str]:
        """Pages and plots that differ from the results."""
        pages = [page for page in self.pages() if page.read_text(encoding="utf-8") != self.render(page)]
        plots = [self.root / path for document in self._all() for path in report_plots.plots_of(document)]
        old = [path for path in plots if not report_plots.is_current(path, self._document_of(path))]
        return [path.relative_to(self.root).as_posix() for path in (*pages, *old)]

    def write(self) -> list[str]:
        """Rewrites what is stale, and says what that was."""
        stale = self.stale()
        for page in self.pages():
            if page.relative_to(self.root).as_posix() in stale:
                page.write_text(self.render(page), encoding="utf-8")
        for document in self._all():
            for path in report_plots.plots_of(document):
                if path in stale:
                    report_plots.draw(self.root / path, document)
        return stale

    def _all(self) -> list[Document]:
        return [*self.cpus, *self.gpus]

    def _document_of(self, plot: Path) -> Document:
        return next(
            document for document in self._all() if plot.stem.startswith(f"{report_plots.PREFIX}{document.path.stem}-")
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a page differs from the results"
    )
    parser.add_argument("--root", type=Path, default=machine.ROOT, help="of the checkout")
    options = parser.parse_args(arguments)
    report = Report(options.root.resolve())
    changed = report.stale() if options.check else report.write()
    for path in changed:
        print(f"{path} {'differs from bench/results: python bench/report.py' if options.check else 'written'}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
