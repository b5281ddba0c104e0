"`pytest tests --slow` runs the long tests as well."
from pathlib import Path

import pytest

# Two workers take a file at a time (--dist loadfile): the longest ones come first, so that both end together.
LONGEST = ['test_interrupted', 'test_bad_files_in_training', 'test_evaluation', 'test_strangers_evaluation', 'test_two_processes',
           'test_features', 'test_oracle_stream', 'test_model', 'test_silent_mistakes', 'test_startup', 'test_leaks', 'test_show',
           'test_real_shapes', 'test_bench_stream', 'test_memory', 'test_browser', 'test_streaming', 'test_adapters']


def pytest_addoption(parser): parser.addoption('--slow', action='store_true', help='run the long tests as well')


def pytest_configure(config): config.addinivalue_line('markers', 'slow: takes minutes; runs with --slow only')


def pytest_collection_modifyitems(config, items):
    order = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(Path(item.fspath).stem, len(LONGEST)))
    if config.getoption('--slow'): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='runs with --slow'))
