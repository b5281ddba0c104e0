"""The wheel is complete: installed alone, away from the checkout, it trains."""
import os, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

root = Path(__file__).parent.parent


def run(*args, **kwargs):
    result = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from a copy of the files that git does not ignore, so that nothing else can slip in and nothing is left behind."
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    listing = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(listing, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split('\0')):
        if not (root/name).is_file(): continue   # deleted, but not yet in git
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, source/name)
    run('-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', out, source)
    return next(out.glob('*.whl'))


@pytest.fixture(scope='module')
def elsewhere(wheel, tmp_path_factory):
    "How to run the installed package: an empty folder, and an environment in which only the wheel's files provide it."
    site, cwd = tmp_path_factory.mktemp('site'), tmp_path_factory.mktemp('external')
    run('-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', site, wheel)
    env = {**os.environ, 'PYTHONPATH': str(site), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    found = run('-c', 'import dst_smolvlm; print(dst_smolvlm.__file__)', cwd=cwd, env=env)
    assert found.strip() == str(site/'dst_smolvlm'/'__init__.py')
    return dict(cwd=cwd, env=env)


def test_holds_every_module_and_configuration_file(wheel):
    package = [p.relative_to(root).as_posix() for p in (root/'dst_smolvlm').rglob('*') if p.suffix in ('.py', '.yaml')]
    held = zipfile.ZipFile(wheel).namelist()
    assert not set(package) - set(held)
    assert sorted({name.split('/')[0] for name in held if '.dist-info/' not in name}) == ['dst_smolvlm']
    assert any(name.endswith('LICENSE') for name in held)


def test_prints_its_configuration(elsewhere):
    printed = run('-m', 'dst_smolvlm.train', '--cfg', 'train.seed=7', **elsewhere)
    assert 'seed: 7' in printed and 'output_dir:' in printed
    assert not list(elsewhere['cwd'].iterdir()), '--cfg must write nothing'


def test_trains_two_steps(elsewhere):
    run('-m', 'dst_smolvlm.train', 'train.max_steps=2', 'output_dir=out', **elsewhere)
    assert (elsewhere['cwd']/'out'/'checkpoint').is_dir()
    assert (elsewhere['cwd']/'out'/'config.yaml').is_file()
