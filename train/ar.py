"""Train the autoregressive prior: a transformer that samples the tokens of an image, given its semantic map.

python train/ar.py --help
"""

from regvq_fast.cli.main import run

if __name__ == "__main__":
    run("train ar")
