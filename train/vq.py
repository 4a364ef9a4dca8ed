"""Train an image tokenizer: a VQ-GAN with regularized vector quantization, or one of its baselines.

    python train/vq.py --compile --amp                          # embedded scenes; minutes on a CPU
    python train/vq.py --compile --amp --quantizer vq-gan       # the same with a baseline
    python train/vq.py --data photos/ --image-size 128 --steps 20000 --compile --amp
    python train/vq.py --preset ade20k --data ADE20K/images --compile --amp

A run leaves its resolved configuration, metrics, pictures and weights in --out (default: runs/...).
"""

import sys

from regvq_fast.config import override, parse_train_config
from regvq_fast.training.loop import fit
from regvq_fast.training.recorder import Recorder, new_run_folder
from regvq_fast.training.vqgan import VQGANTask


def main() -> None:
    config = parse_train_config(sys.argv[1:], description=str(__doc__))
    try:
        config = override(config, out=new_run_folder(config))
        task = VQGANTask(config)
        recorder = Recorder(task.config, task.facts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    with recorder:
        try:
            fit(task, recorder)
        except FloatingPointError as error:
            sys.exit(f"stopped: {error}")


if __name__ == "__main__":
    main()
