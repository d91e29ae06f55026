"""What finds each change of the runtime still finds it; what nothing finds is explained."""

from __future__ import annotations

import pytest

from tests.testing.campaign import Campaign
from tests.testing.mutants import MUTANTS
from tests.testing.seeded_defects import DEFECTS


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("campaign", [DEFECTS, MUTANTS], ids=lambda campaign: campaign.name)
def test_every_change_of_the_runtime_is_found_or_explained(campaign: Campaign) -> None:
    complaints = campaign.run(check=True, processes=1)
    assert not complaints, "\n".join(complaints)
