"""Sample images from a trained prior.

python train/sample.py --help
"""

from regvq_fast.cli.main import run

if __name__ == "__main__":
    run("sample")
