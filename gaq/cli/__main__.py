"""``python -m gaq.cli``."""

from __future__ import annotations

import sys

from gaq.cli import main

sys.exit(main())
