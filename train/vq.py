"""Train an image tokenizer: a VQ-GAN with regularized vector quantization, or one of its baselines.

    python train/vq.py --compile --amp                          # embedded scenes; minutes on a CPU
    python train/vq.py --compile --amp --quantizer vq-gan       # the same with a baseline
    python train/vq.py --data photos/ --image-size 128 --steps 20000 --compile --amp
    python train/vq.py --preset ade20k --data ADE20K/images --compile --amp
    python train/vq.py --resume --out runs/NAME                 # continue a run that stopped

A run leaves its resolved configuration, metrics, pictures, checkpoints and weights in --out (default: runs/...).
"""

import sys

from regvq_fast.config import parse_train_config
from regvq_fast.training.loop import RunStopped, fit, prepare


def main() -> None:
    try:
        task, recorder, checkpoints = prepare(parse_train_config(sys.argv[1:], description=str(__doc__)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        with recorder:
            fit(task, recorder, checkpoints)
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
