"""``python -m sglang_jenga`` is the command ``sglang-jenga``."""

import sys

from sglang_jenga.plan.cli import main

if __name__ == "__main__":
    sys.exit(main())
