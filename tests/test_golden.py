"The code agrees with answers worked out independently (`$DST_GOLDEN`), on the real annotations (`$DST_REAL`) where they are needed."
import json, os
from pathlib import Path

import pytest

from dst_smolvlm.core.states import STATE_NAMES, state_changes
from dst_smolvlm.data import loading
from dst_smolvlm.metrics import matching

ROOT = Path(__file__).resolve().parents[1]


def _golden(pattern: str) -> list[Path]:
    "The golden files of that name; skips where there are none."
    folder = Path(os.environ.get('DST_GOLDEN', ROOT.parent/'shared'/'golden'))
    return sorted(folder.glob(pattern)) or pytest.skip('skipped: not found')


FOLDERS = dict(holoassist='holoassist/labels', captaincook4d='captaincook4d/complete_step_annotations.subset.json',
               ego4d_goalstep='ego4d_goalstep', egoexolearn='egoexolearn')
STEP_OF = dict(holoassist=lambda s: s.name, captaincook4d=lambda s: int(s.id), ego4d_goalstep=lambda s: s.name, egoexolearn=lambda s: s.id)


def _real(name: str) -> Path:
    path = Path(os.environ.get('DST_REAL', ROOT.parent/'shared'/'real'))/name
    return path if path.exists() else pytest.skip(f'skipped: {name} not found')


@pytest.mark.parametrize('source', FOLDERS)
def test_states(source):
    "The same steps, number of frames and changes of state, and as many cells in each state, on every golden video of a dataset."
    for path in _golden('states*.json'):
        golden = json.loads(path.read_text(encoding='utf-8'))
        by_uid = {r.video_uid: r for r in loading.read_records(_real(FOLDERS[source]))}
        for expected in golden['sources'][source]:
            where, record = f"{path.name} {expected['video']}", by_uid[expected['video']]
            states = record.states(golden['fps'])
            changes = [[frame, [[s, int(states[frame, s])] for s in sorted({t.step for t in change})]]
                       for frame, change in state_changes(states).items()]
            assert record.duration == expected['duration'], where
            assert len(states) == record.num_frames(golden['fps']) == expected['num_frames'], where
            assert [STEP_OF[source](s) for s in record.steps] == expected['steps'], where
            assert changes == expected['changes'], where
            assert {name: int((states == i).sum()) for i, name in enumerate(STATE_NAMES)} == expected['cells'], where


def test_matching():
    "Every golden case of the matching of replies, pair by pair, and all of them pooled."
    for path in _golden('matching*.json'):
        golden = json.loads(path.read_text(encoding='utf-8'))
        keys = list(golden['pooled']['metrics'])
        matchings = []
        for case in golden['cases']:
            where, expected = f"{path.name} {case['name']}", case['expected']
            assert matching.WINDOWS[case['dataset']] == tuple(case['window_s']), where
            gen, ref = ({t['frame']: t['text'] for t in case[k]} for k in ('gen', 'ref'))
            m = matching.match_predictions(gen, ref, case['num_frames'], case['window_s'], case['fps'],
                                          dist_factor=case['dist_factor'], dist_power=case['dist_power'])
            matchings.append(m)
            assert [[p.pred, p.ref] for p in m.pairs] == expected['matched'], where
            assert (m.missed, m.redundant) == (expected['missed'], expected['redundant']), where
            assert [p.cost for p in m.pairs] == pytest.approx(case['expected_match_costs'], abs=1e-5), where
            _same_scores(matching.speaking_metrics(m), expected, case['expected_counts'], keys, where)
        pooled = golden['pooled']
        _same_scores(matching.speaking_metrics(*matchings), pooled['metrics'], pooled['counts'], keys, f'{path.name} pooled')


def _same_scores(scores: dict, expected: dict, counts: dict, keys: list[str], where: str):
    "Every score within 1e-5 and every count equal; what the golden file leaves undefined (null) is not compared."
    defined = [k for k in keys if expected[k] is not None]
    assert {k: scores[k] for k in defined} == pytest.approx({k: expected[k] for k in defined}, abs=1e-5), where
    assert {k: scores[k] for k in counts} == counts, where
