"""The command ``regvq paper``: reproduce a table or a sweep of the paper."""

from collections.abc import Sequence

from regvq_fast.config import run_command
from regvq_fast.paper import PaperConfig, reproduce

USAGE = """Reproduce a table or a sweep of the paper: every row from training to metrics.

    regvq paper table2 --fid-features random-vgg16 --amp  # minutes a row, CPU
    regvq paper codebook-size --fid-features vgg16:vgg16.pth --perceptual-weights vgg16.pth --seeds 0 1 2
    regvq paper table1 --preset ade20k --scale full --data ADE20K/ --processes 4 --compile --amp

The same command continues an interrupted one and skips finished rows. --out, by default a folder in runs/paper, gets
figures, the table beside the paper's numbers as Markdown, CSV and JSON, and the trained models in runs/.
"""


def main(args: Sequence[str]) -> None:
    """Run ``regvq paper``."""
    run_command("paper", PaperConfig, reproduce, USAGE, args, stopped="stopped; the same command goes on from there")
