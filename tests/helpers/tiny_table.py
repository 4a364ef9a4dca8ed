"""`regvq paper` with rows of the smallest size: a stand-in for train/paper.py, whose smallest ones take minutes."""

from unittest.mock import patch

from regvq_fast.cli.main import run
from regvq_fast.paper.rows import Recipe

TOKENIZER = (
    "--steps 8 --image-size 32 --ch 8 --ch-mult 1 1 1 --z-channels 8 --code-dim 8 --num-codes 16 --batch-size 2 "
    "--val-images 8 --log-every 2 --checkpoint-every 2 --warmup-steps 2 --perceptual-weight 0 --contrastive none"
).split()
CACHE = "--views 1 --scenes 32 --val-images 8".split()
PRIOR = "--steps 8 --log-every 2 --checkpoint-every 2 --width 16 --depth 1 --heads 2 --batch-size 2".split()
TINY = Recipe("scenes", tuple(TOKENIZER), tuple(CACHE), tuple(PRIOR), 8)

if __name__ == "__main__":
    with patch("regvq_fast.paper.driver.recipe", lambda preset, scale: TINY):
        run("paper")
