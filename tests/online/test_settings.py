"""Settings that do not fit together are refused with what to do."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from online.settings import GroupSettings, ModelSettings, OnlineSettings


def test_the_papers_form_groups_by_the_embedding() -> None:
    paper = ModelSettings(form="paper")
    with pytest.raises(ValidationError, match=r"space is 'taste'.*Set online.groups.space to 'embedding'"):
        OnlineSettings(model=paper)
    assert OnlineSettings(model=paper, groups=GroupSettings(space="embedding")).model.form == "paper"


def test_heads_share_the_width() -> None:
    uneven = ModelSettings(form="paper", d_model=128, n_heads=5)
    with pytest.raises(ValidationError, match=r"n_heads is 5, allowed are divisors of online.model.d_model = 128"):
        OnlineSettings(model=uneven, groups=GroupSettings(space="embedding"))
