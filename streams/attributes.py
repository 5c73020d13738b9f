"""The user attributes of the paper's Table 4 and the values that they take here.

Names and numbers of values are the table's. Where the table gives no number ("user's gender",
"higher values represent higher tiers") the values are those that a shop would log.
Values are words, so that profiles of groups read by themselves; ordered attributes list theirs in order.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_YES_NO: Final = ("no", "yes")

TABLE_4: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "age": (
            "under 18",
            "18-20",
            "21-24",
            "25-28",
            "29-32",
            "33-36",
            "37-40",
            "41-45",
            "46-50",
            "51-55",
            "56-60",
            "61-70",
            "over 70",
        ),
        "color": (
            "black",
            "white",
            "grey",
            "silver",
            "gold",
            "red",
            "pink",
            "orange",
            "yellow",
            "green",
            "turquoise",
            "blue",
            "purple",
            "brown",
            "beige",
        ),
        "is_vip": _YES_NO,
        "os_plant": ("android", "ios", "other"),
        "has_car": _YES_NO,
        "gender": ("female", "male"),
        "marriage": ("single", "married", "divorced or widowed"),
        "child_age": (
            "no children",
            "expecting",
            "under 1",
            "1-2",
            "3-4",
            "5-6",
            "7-9",
            "10-12",
            "13-15",
            "16-18",
        ),
        "has_house": _YES_NO,
        "profession": (
            "student",
            "office worker",
            "engineer",
            "teacher",
            "medical worker",
            "civil servant",
            "service worker",
            "factory worker",
            "farmer",
            "self-employed",
            "retired",
        ),
        "user_active": ("low", "medium", "high"),
        "education": (
            "primary school",
            "middle school",
            "high school",
            "college",
            "bachelor",
            "master or doctor",
        ),
        "target_group": (
            "student",
            "young urbanite",
            "young parents",
            "urban family",
            "small-town family",
            "senior professional",
            "village family",
            "pensioner",
        ),
        "member_level": ("basic", "bronze", "silver", "gold", "diamond"),
        "customer_points": ("very few", "few", "some", "many", "very many"),
        "purchase_power": ("1 (highest)", "2", "3", "4", "5 (lowest)"),
        "resident_city_level": ("tier 1", "tier 2", "tier 3", "tier 4", "tier 5"),
        "per_month_order_num": ("0", "1", "2-3", "4-6", "7-10", "over 10"),
        "is_impulse_purchase_user": _YES_NO,
        "promotions_sensitive_level": ("1 (lowest)", "2", "3", "4", "5 (highest)"),
    }
)
"""Attribute name to its values: Table 4, "Descriptions of User Profile Attributes", in the table's order."""
