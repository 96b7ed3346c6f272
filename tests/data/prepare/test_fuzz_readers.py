"""A few of the inputs of `tests.data.prepare.fuzz_readers`, the same in every run."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.data.prepare.fuzz_readers import FORMATS, cases, check


@pytest.mark.parametrize("kind", FORMATS)
def test_a_table_is_refused_or_each_of_its_rows_is_accounted_for(tmp_path_factory, kind):
    ended = set()

    @settings(max_examples=30, suppress_health_check=list(HealthCheck))
    @given(case=cases(kind))
    def run(case):
        ended.add(check(case, tmp_path_factory.mktemp("fuzz")))

    run()
    assert {"refused", "quarantined some"} <= ended
