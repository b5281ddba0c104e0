"A command that has nothing to compute answers without the libraries that compute: they take seconds to import."
import subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
HEAVY = {'torch', 'transformers', 'accelerate', 'matplotlib', 'scipy', 'nltk', 'sacrebleu', 'sentence_transformers', 'peft', 'IPython'}
COMMANDS = 'train', 'evaluate', 'stream', 'records', 'features', 'cache', 'world'
CODE = """
import runpy, sys
sys.argv = ['command', *{argv!r}]
try: runpy.run_module('dst_smolvlm.{name}', run_name='__main__')
except SystemExit as e: status = e.code or 0
else: status = 0
print('imported:', status, *sorted({heavy!r} & set(sys.modules)))
"""


def answered(name, *argv):
    "(exit status, heavy libraries that were imported, what was said) of a command, in a process of its own."
    done = subprocess.run([sys.executable, '-c', CODE.format(name=name, argv=argv, heavy=HEAVY)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, status, *imported = done.stdout.strip().split('\n')[-1].split()
    return int(status), imported, done.stdout + done.stderr


@pytest.mark.parametrize('name', COMMANDS)
def test_help(name):
    status, imported, said = answered(name, '--help')
    assert (status, imported) == (0, []) and f'dst_smolvlm.{name}' in said


@pytest.mark.parametrize('name', ['train', 'evaluate', 'features'])
def test_configuration(name):
    status, imported, said = answered(name, '--cfg', 'train.seed=7')
    assert (status, imported) == (0, []) and 'seed: 7' in said


@pytest.mark.parametrize('name', ['train', 'evaluate', 'features'])
def test_a_misspelt_key(name):
    status, imported, said = answered(name, 'train.lerning_rate=1')
    assert (status, imported) == (2, []) and "did you mean 'train.learning_rate'?" in said


def test_a_wrong_option():
    for name, argv in (('stream', ['video.mp4']), ('cache', []), ('world', ['sample']), ('records', ['chek'])):
        status, imported, _ = answered(name, *argv)
        assert (status, imported) == (2, []), name


def test_one_file_is_checked():
    status, imported, said = answered('records', 'check', 'data/toy.jsonl')
    assert (status, imported) == (0, []) and 'native' in said
