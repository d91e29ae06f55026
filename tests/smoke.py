"""Use an installed aiotrt: what a distribution is tried with, outside the checkout.

    python -I tests/smoke.py native      # or python: the implementation that is expected

Imports nothing from the checkout, so that -I keeps it out.
"""

from __future__ import annotations

import sys

import numpy as np

import aiotrt
from aiotrt._install import install_hint


async def main() -> None:
    """Load a function on the host device, and call it."""
    async with aiotrt.load(lambda x: x + 1, device="host") as model:
        assert (await model(np.ones((1, 3)))).tolist() == [[2.0, 2.0, 2.0]]
        assert model.statistics().implementation == aiotrt.__impl__
        try:
            await model("a")
        except aiotrt.InputError:
            pass
        else:
            raise AssertionError("an input that is no array was accepted")


aiotrt.run(main())
assert aiotrt.__impl__ == sys.argv[1], aiotrt.__impl__
assert aiotrt.__file__.startswith(sys.prefix), aiotrt.__file__
assert install_hint("cli") == "pip install 'aiotrt[cli]'", install_hint("cli")
