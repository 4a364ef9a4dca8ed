"""``python -m regvq_fast``: the command `regvq`."""

from regvq_fast.cli.main import main

if __name__ == "__main__":
    main()
