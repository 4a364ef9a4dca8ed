"""Train the masked prior: MaskGIT over the tokens of an image, given its semantic map or label.

python train/maskgit.py --help
"""

from regvq_fast.cli.main import run

if __name__ == "__main__":
    run("train maskgit")
