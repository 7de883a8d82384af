"""`python -m asgi_sessions`."""

import sys

from .cli import main

sys.exit(main())
