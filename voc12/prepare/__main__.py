"""``python -m voc12.prepare``: see voc12/prepare/commands.py."""

import sys

from voc12.prepare.commands import main

if __name__ == "__main__":
    sys.exit(main())
