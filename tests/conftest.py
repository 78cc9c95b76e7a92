"For all tests: who runs beside whom when there are several workers, and what took longest."
import os
from collections import Counter
from pathlib import Path

import pytest

PROCESSES = {"test_fsdp", "test_processes"}  # files whose tests start several processes themselves: one after the other, and first


def group_of(item):
    "A file stays on one worker, because its tests share what is dear to make."
    return "processes" if item.path.stem in PROCESSES else item.path.stem


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if not item.get_closest_marker("xdist_group"): item.add_marker(pytest.mark.xdist_group(group_of(item)))
        if os.name == "nt" and (group_of(item) == "processes" or "children" in item.fixturenames):
            item.add_marker(pytest.mark.skip(reason="several processes and signals: not on Windows"))
    items.sort(key=lambda item: group_of(item) != "processes")  # stable: the longest begins, the rest keeps its order


@pytest.fixture
def same_noise(monkeypatch):
    "diffusers draws the random numbers that our samplers are told."
    from walks import tell
    tell(monkeypatch.setattr)


@pytest.fixture(scope="session")
def runs_at_smoke(tmp_path_factory):
    "runs_at_smoke(name): the finished runs that a sweep stands on, small ones."
    from t2i_course.run.bases import runs_of
    work = tmp_path_factory.mktemp("runs")
    return lambda name: runs_of(name, "smoke", work)


def pytest_terminal_summary(terminalreporter):
    "The fifteen longest tests and the ten longest files, their fixtures included."
    tests, files = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if not hasattr(report, "duration"): continue
            name = report.nodeid.split("@")[0]
            tests[name] += report.duration
            files[Path(name.split("::")[0]).stem] += report.duration
    if sum(tests.values()) < 5: return
    terminalreporter.section("what took longest")
    for name, seconds in tests.most_common(15): terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
    terminalreporter.write_line("files: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in files.most_common(10)))
