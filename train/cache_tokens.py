"""Encode a data set once with a trained tokenizer: the priors train from its tokens.

python train/cache_tokens.py --help
"""

from regvq_fast.cli.main import run

if __name__ == "__main__":
    run("tokens")
