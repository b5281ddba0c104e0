"One thing has one name, in code and in prose: the words that were replaced by the field's own do not come back."
import json, re, subprocess
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
REPLACED = {   # pattern → what is said instead
    r'glimpse': 'auxiliary sample',
    r'corrupt_told|corrupt_epochs': 'state_corruption',
    r'\btold (state|states)\b|\btold_(state|states|embedding)\b': 'previous state',
    r'surprise_weight': 'changed_weight',
    r'\bw_(lm|speak|update|state|pointer)\b': 'lm_loss_weight, speaking_loss_weight, …',
    r'refractory': 'cooldown',
    r'HonestClock|honest clock': 'real-time clock',
    r'turn_keys': 'rerotate_keys',
    r'OnlineStateFilter|online filter|filter_options': 'state tracker',
    r'FrameAnswer|\bunheard\b': 'FrameOutput, pending_turns',
    r'from elsewhere|who takes part': 'external predictions, variants',
    r'a number that is none|numbers that are none': 'NaN or Inf',
    r'tensors without numbers': 'meta tensors',
    r'that are there beforehand': 'preallocated',
    r'taken at its word': 'per-frame argmax',
    r'cut in two': 'truncated',
    r'\bwhoever\b|of such a kind': '(say who, or what kind)'}
# which hold old names on purpose
TRANSLATES = {'00_config.ipynb', '04_heads.ipynb', 'test_old_names.py', 'test_model.py', 'test_glossary.py', 'CHANGELOG.md'}


def texts():
    "(name, text) of everything that is read: code, prose and configuration, without outputs."
    names = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, text=True, check=True).stdout.split('\0')
    for name in filter(None, names):
        path = root/name
        if path.name in TRANSLATES or not path.is_file(): continue
        if path.suffix == '.ipynb':
            cells = json.loads(path.read_text(encoding='utf-8'))['cells']
            yield from ((f'{name}, cell {i}', ''.join(cell['source'])) for i, cell in enumerate(cells))
        elif path.suffix in ('.md', '.yaml', '.yml', '.ini', '.sh') or name.startswith(('tests/', 'bench/')) and path.suffix == '.py':
            yield name, path.read_text(encoding='utf-8')


@pytest.mark.parametrize('pattern', REPLACED)
def test_a_replaced_word_does_not_come_back(pattern):
    found = [f'{where}: {m[0]}' for where, text in texts() for m in re.finditer(pattern, text, re.IGNORECASE)]
    assert not found, f'say {REPLACED[pattern]}: {found[:10]}'
