"""Looks for what makes an offline table dishonest: ties, telling ids, leaks, repeats, give-away services, copies."""

from moerec.config import AuditConfig, SplitConfig
from moerec.data.dataset import Dataset
from moerec.eval.audit.canary_checks import check_future_canary
from moerec.eval.audit.copy_checks import check_duplicates, check_identical_users
from moerec.eval.audit.id_checks import check_id_canary, check_id_order, check_tie_order
from moerec.eval.audit.report import AuditReport, AuditRow
from moerec.eval.audit.subject import Subject, prepare_subject
from moerec.eval.audit.target_checks import check_repeats, check_service, check_unseen
from moerec.eval.audit.time_checks import (
    check_far_times,
    check_future_in_history,
    check_ties,
    check_training_after_test,
)

CHECKS = (
    check_far_times,
    check_ties,
    check_id_order,
    check_tie_order,
    check_id_canary,
    check_future_in_history,
    check_future_canary,
    check_training_after_test,
    check_repeats,
    check_service,
    check_unseen,
    check_duplicates,
    check_identical_users,
)

__all__ = ["CHECKS", "AuditConfig", "AuditReport", "AuditRow", "Subject", "prepare_subject", "run_audit"]


def run_audit(dataset: Dataset, split: SplitConfig, thresholds: AuditConfig, seed: int = 0) -> AuditReport:
    """Runs every check on the data set as training would split it.

    Raises:
      InputError: the split is not well defined (its dates, say).
      WorkError: the split leaves nothing to train on or nothing to test on.
    """
    subject = prepare_subject(dataset, split, seed)
    return AuditReport(tuple(row for check in CHECKS for row in check(subject, thresholds)))
