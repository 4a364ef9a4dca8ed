"""Measure a trained tokenizer, and images sampled by a prior, over a whole validation split.

python train/evaluate.py --help
"""

from regvq_fast.cli.main import run

if __name__ == "__main__":
    run("evaluate")
