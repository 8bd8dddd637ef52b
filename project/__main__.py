"""`python -m project` is `python -m project.cli`."""

import sys

from project.cli import main

sys.exit(main())
