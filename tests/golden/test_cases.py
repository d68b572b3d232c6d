"""There is a test for every case."""

from tests.golden.conftest import PREFIXES, case_folders, served_by


def test_every_case_is_known(request):
    folders = case_folders(request.config)
    assert folders, f"no golden case in {request.config.getoption('--golden-root')}"
    unknown = [p.name for p in folders if served_by(p.name, PREFIXES) is None]
    assert not unknown, f"no test serves the cases {unknown}; known beginnings: {sorted(PREFIXES)}"
