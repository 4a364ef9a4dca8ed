"""Reproduce a table or a sweep of the paper: every row from training to metrics.

python train/paper.py --help
"""

from regvq_fast.cli.main import run

if __name__ == "__main__":
    run("paper")
