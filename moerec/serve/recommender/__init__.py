"""A trained run as a library, for many users at once."""

from moerec.serve.recommender.all_lists import AllLists, ListOptions, read_exclusions, read_users, recommend_all
from moerec.serve.recommender.batched import ItemKey, Recommendations, Recommender
from moerec.serve.recommender.packed_requests import UserEvent, UserHistory

__all__ = [
    "AllLists",
    "ItemKey",
    "ListOptions",
    "Recommendations",
    "Recommender",
    "UserEvent",
    "UserHistory",
    "read_exclusions",
    "read_users",
    "recommend_all",
]
