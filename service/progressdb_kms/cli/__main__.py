"""``python -m progressdb_kms.cli``."""

from progressdb_kms.cli import main

if __name__ == "__main__":
    main()
