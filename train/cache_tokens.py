"""Encode a data set once with a trained tokenizer: the priors train from its tokens.

    python train/cache_tokens.py --tokenizer runs/NAME --out cache/           # embedded scenes
    python train/cache_tokens.py --tokenizer runs/NAME --out cache/ --data photos/ --fields segmentation --amp
    torchrun --nproc-per-node 8 train/cache_tokens.py --tokenizer runs/NAME --out cache/ --data shards/ --amp

The cache holds the first --views epochs of the training stream and the validation split. The same command completes a
cache whose run was stopped.
"""

import sys

from regvq_fast.training.caching import cache_tokens, parse_cache_config


def main() -> None:
    config = parse_cache_config(sys.argv[1:], description=str(__doc__))
    try:
        cache_tokens(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the shards that are done", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
