"""Tests, and programs that search for defects: they change code objects, so plain Python runs unless asked otherwise."""

import os

os.environ.setdefault("AIOTRT_IMPL", "python")
