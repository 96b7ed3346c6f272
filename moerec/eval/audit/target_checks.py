"""What the test events give away or do not allow: repeats, the service, and items and users that are new."""

from collections.abc import Iterator

import numpy as np

from moerec.config import AuditConfig
from moerec.eval.audit.report import AuditRow, make_row
from moerec.eval.audit.subject import Subject
from moerec.eval.ranking.dataset import find_repeated


def check_repeats(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Test items that the history holds already; masking seen items makes each of them a miss."""
    item = subject.dataset.log.item
    repeated = np.zeros(subject.dataset.log.n_events, bool)
    repeated[subject.targets] = find_repeated(subject.histories.distinct(item), item, item[subject.targets])
    for service, own in subject.split_by_service(subject.targets):
        text = f"of {len(own)} test events, those whose item is in their history"
        yield make_row("repeats", service, repeated[own].mean(), limits.max_repeats, text, n=len(own))


def check_service(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """How well three rules with no look at the user's taste name the service of the test event."""
    n = subject.dataset.catalogue.n_services
    if n == 1:
        return
    histories = subject.histories
    answer = subject.service[subject.targets]
    train, user = subject.train, subject.user
    majority = int(np.bincount(subject.service[train], minlength=n).argmax())
    known = histories.length > 0
    last = np.full(len(answer), majority)
    last[known] = subject.service[histories.last(1).rows]
    follows = user[train[1:]] == user[train[:-1]]
    pair = subject.service[train[:-1]][follows].astype(np.int64) * n + subject.service[train[1:]][follows]
    likeliest = np.bincount(pair, minlength=n * n).reshape(n, n).argmax(axis=1)
    name = subject.dataset.catalogue.services[majority]
    for check, guess, limit, text in (
        ("service_majority", np.full(len(answer), majority), limits.max_service_majority, f"always {name}"),
        ("service_last", last, limits.max_service_last, "the service of the event before"),
        ("service_markov", likeliest[last], limits.max_service_markov, "the service that most often follows it"),
    ):
        text = f"accuracy of guessing {text}"
        yield make_row(check, "all", np.mean(guess == answer), limit, text, n=len(answer))


def check_unseen(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Test events whose item, or whose user, is not in training."""
    log = subject.dataset.log
    trained_item = np.zeros(subject.dataset.catalogue.n_items, bool)
    trained_item[log.item[subject.train]] = True
    trained_user = np.zeros(log.n_users, bool)
    trained_user[subject.user[subject.train]] = True
    for service, own in subject.split_by_service(subject.targets):
        value = 1 - trained_item[log.item[own]].mean()
        text = f"of {len(own)} test events, those whose item is not in training"
        yield make_row("unseen_items", service, value, limits.max_unseen_items, text, n=len(own))
    value = 1 - trained_user[subject.user[subject.targets]].mean()
    text = f"of {len(subject.targets)} test events, those whose user is not in training"
    yield make_row("unseen_users", "all", value, limits.max_unseen_users, text, n=len(subject.targets))
