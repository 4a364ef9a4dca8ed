"""Check the paper's data sets as their official archives unpack, and pack them into shards.

python train/data.py --help
"""

from regvq_fast.cli.main import run

if __name__ == "__main__":
    run("data")
