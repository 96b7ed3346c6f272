"""The limits of `experiments.audit`."""

import dataclasses

from moerec.errors import InputError


@dataclasses.dataclass
class AuditConfig:
    """Largest values that pass, as shares in [0, 1]; a limit of 1 is never exceeded, and the value is only reported.

    The orders and the canary of ids must exceed theirs by three standard errors of chance.
    """

    max_tied_test: float = 0.1  # test events at the very time of the event before them
    max_tied_valid: float = 0.1  # the same of validation events
    max_id_order: float = 0.52  # test events whose item's id lies on one side of the id before; .5 without a defect
    max_id_order_in_ties: float = 0.52  # the same of all neighbouring events of one time
    max_tie_order: float = 0.6  # neighbours of one time that stand as the same items do elsewhere; .5 without a defect
    max_id_canary: float = 0.01  # recall@5 of arithmetic on ids, above that of chance
    max_future_in_history: float = 0.0  # targets with a later event in their history
    max_train_after_own_test: float = 0.0  # test events with a later training event of the same person
    max_train_after_test: float = 1.0  # training events later than a test event, mean over the test events
    max_repeats: float = 1.0  # test events whose item is in their history
    max_service_majority: float = 1.0  # accuracy of the most frequent service
    max_service_last: float = 1.0  # accuracy of the service of the event before
    max_service_markov: float = 1.0  # accuracy of the service that most often follows it
    max_unseen_items: float = 0.2  # test events whose item is not in training
    max_unseen_people: float = 1.0  # test events whose person is not in training
    max_duplicates: float = 0.01  # events that repeat an earlier one in person, item, action and time
    max_identical_people: float = 0.01  # people whose sequence in a service is also somebody else's

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise InputError(f"config.audit.{field.name}: must lie in [0, 1]")
