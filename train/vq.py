"""Train an image tokenizer: a VQ-GAN with Reg-VQ, or a baseline.

python train/vq.py --compile --amp
"""

from regvq_fast.cli.main import run

if __name__ == "__main__":
    run("train vq")
