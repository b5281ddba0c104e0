"`pytest tests --slow` runs the long tests as well."
import pytest


def pytest_addoption(parser): parser.addoption('--slow', action='store_true', help='run the long tests as well')


def pytest_configure(config): config.addinivalue_line('markers', 'slow: takes minutes; runs with --slow only')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='runs with --slow'))
