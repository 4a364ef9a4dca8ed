"""Draw images from a trained prior.

    python train/sample.py --prior ar --run runs/ar --out samples               # maps of the validation split
    python train/sample.py --prior ar --run runs/ar --out samples --map map.png --top-p 0.95 --guidance 2
    python train/sample.py --prior diffusion --run runs/diffusion --out samples --text "grass left of bricks"
    python train/sample.py --prior ar --run runs/ar --out samples --map map.png --edit photo.png --mask mask.png

--out gets each image as NUMBER.png, and grid.png: images under what they are conditioned on.
"""

import sys

from regvq_fast.sampling.generate import generate, parse_sample_config


def main() -> None:
    config = parse_sample_config(sys.argv[1:], description=str(__doc__))
    try:
        generate(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"stopped; what was drawn is in {config.out}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
