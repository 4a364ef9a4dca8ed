"""Train the diffusion prior: VQ-Diffusion over the tokens of an image, given its caption.

python train/diffusion.py --help
"""

from regvq_fast.cli.main import run

if __name__ == "__main__":
    run("train diffusion")
