"What strangers bring to an evaluation: files of other shapes, odd curves, names that mean something to matplotlib, videos that are broken."
import base64, gzip, io, json, os, warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import processes
from dst_smolvlm import evaluate
from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.data.schema import Step, Turn, VideoRecord
from dst_smolvlm.evaluation import threshold_curves
from dst_smolvlm.evaluation.comparison import make_row, tally_rows
from dst_smolvlm.evaluation.report import figure_html, png_uri
from dst_smolvlm.metrics import perplexity
from dst_smolvlm.metrics.bootstrap import resample
from dst_smolvlm.metrics.calibration import bin_frames, reliability_figure
from dst_smolvlm.metrics.matching import match_predictions, speaking_metrics, window_of
from dst_smolvlm.metrics.scores import Language
from dst_smolvlm.metrics.text import Idf, cider, load_encoder
from dst_smolvlm.metrics.text_proassist import ptb_tokens
from dst_smolvlm.metrics.thresholds import f1_figure, pr_curve, pr_figure
from dst_smolvlm.model.checkpoints import save_model
from dst_smolvlm.runs import evaluation_run
from dst_smolvlm.streaming.reference_traces import oracle_trace, trace_from_states
from dst_smolvlm.viz.timeline_plot import timeline_figure
from dst_smolvlm.world.replay import build_sample
from dst_smolvlm.world.scenes import load_scenes
from dst_smolvlm.world.world_config import WorldConfig

CASES = Path(os.environ.get('DST_CASES', Path(__file__).resolve().parents[2]/'shared'/'cases'))
COMMON = ['data=toy', *processes.SHORT, 'data.validation_videos=1', 'data.test_videos=3', 'eval.encoder=words',
          'eval.bootstrap=50', 'eval.workers=1']
NAMES = ['model', '$x$', '$', '_hidden', 'a\\b{', 'x'*300, 'a\nb', '', '%s', '$\\frac$', '^_^', 'été ☃']


# Figures

def draw(make, *args):
    "The picture, with every warning an error but those of glyphs that the font lacks; raises whatever goes wrong."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', message='Glyph')
        uri = png_uri(make(*args), dpi=30)
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(uri.split(',')[1])), format='png')


def odd_videos(kind, rng):
    "Probabilities and events of up to three videos of up to six frames."
    lengths = rng.integers(0, 7, rng.integers(0, 4))
    make = dict(random=rng.random, zeros=np.zeros, ones=np.ones, lacking=lambda T: np.full(T, np.nan), equal=lambda T: np.full(T, .3),
                certain=lambda T: rng.integers(0, 2, T)*1., holes=lambda T: np.where(rng.random(T) < .5, np.nan, rng.random(T).round(1)),
                few=lambda T: np.where(rng.random(T) < .9, 0., rng.random(T)))[kind]
    return [make(int(T)) for T in lengths], [np.flatnonzero(rng.random(T) < rng.choice([0, .2, 1])).tolist() for T in lengths]


@pytest.mark.parametrize('kind', ['random', 'zeros', 'ones', 'lacking', 'certain', 'equal', 'holes', 'few'])
def test_every_curve_can_be_drawn(kind):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        rows = {str(rng.choice(NAMES)): odd_videos(kind, rng) for _ in range(rng.integers(0, 4))}
        for make in (pr_figure, f1_figure): draw(make, {name: pr_curve(*videos, 1) for name, videos in rows.items()})
        draw(reliability_figure, {name: bin_frames(*videos) for name, videos in rows.items()})


def test_the_best_threshold_is_zero():
    "All that is right to do is to fire always: F1 is 1 at the only threshold, and the thick line has somewhere to be."
    rows = {'few': pr_curve([np.zeros(4)], [[0, 1, 2, 3]], 0), 'most': pr_curve([np.array([0, 0, 0, .9])], [[0, 1, 2, 3]], 0)}
    assert [c.f1[-1] for c in rows.values()] == [1., 1.]
    draw(f1_figure, rows)


def test_a_thousand_rows_leave_room_for_the_curves():
    curve = pr_curve([np.array([.2, .9, .4])], [[1]], 1)
    few, many = (draw(pr_figure, {f'row {k}': curve for k in range(n)}) for n in (7, 1000))
    assert many.shape[0] < few.shape[0]*1.5


def test_every_name_is_in_the_legend_as_it_is():
    figure = pr_figure({name: pr_curve([np.array([.2, .9])], [[1]], 1) for name in ('_hidden', '$x$', '%s')})
    texts = figure.axes[0].get_legend().get_texts()
    assert [t.get_text().split(' (')[0] for t in texts] == ['_hidden', '$x$', '%s'] and not any(t.get_parse_math() for t in texts)


@pytest.mark.parametrize('seed', range(8))
def test_timelines_of_odd_traces_can_be_drawn(seed):
    rng = np.random.default_rng(seed)
    name = lambda: str(rng.choice(NAMES)) or 'x'
    S, seconds = int(rng.choice([0, 1, 3])), float(rng.choice([.4, 3, 20]))
    steps = [Step(id=f'S{s}', name=name() + str(s), spans=[(0., seconds/2)] if rng.random() < .5 else []) for s in range(S)]
    turns = [Turn(role='assistant', time=t, content=name()) for t in sorted(rng.uniform(0, seconds, 2).tolist())]
    record = VideoRecord(video_uid='v', dataset='d', duration=seconds, steps=steps, turns=turns, goal=name())
    T = record.num_frames()
    trace = trace_from_states(record, rng.integers(0, 3, (T, S)), {i: name() for i in range(T) if rng.random() < .2}, model=name())
    for truth in (None, record): draw(timeline_figure, trace, truth)


def test_control_characters_are_drawn_as_spaces():
    "In names of rows and steps, in the goal and in what is said: no warning of any glyph."
    odd, curve = 'a\x14b\x1bc', pr_curve([np.array([.2, .9])], [[1]], 1)
    record = VideoRecord(video_uid='v', dataset='d', duration=4., steps=[Step(id='S1', name=odd, spans=[(0., 1.)])], goal=odd,
                         turns=[Turn(role='assistant', time=1., content=odd)])
    trace = trace_from_states(record, np.zeros((record.num_frames(), 1), int), {2: odd}, model=odd)
    figures = [timeline_figure(trace, record), pr_figure({odd: curve}), f1_figure({odd: curve})]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for figure in figures: png_uri(figure, dpi=30)
    assert '1. a b c' in [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert figures[1].axes[0].get_legend().get_texts()[0].get_text().startswith('a b c')


def test_a_picture_that_cannot_be_drawn_costs_no_score(tmp_path, monkeypatch):
    "When the first picture is drawn all scores are written, and it is a line of the page, with what failed and why."
    records = records_of()
    (tmp_path/'other.jsonl').write_text('\n'.join(json.dumps(r | dict(speak_prob=.7)) for r in answers(records)))
    def broken(rows):
        assert all((tmp_path/'out'/name).is_file() for name in ('scores.json', 'per_video.json', 'leaderboard.md'))
        raise ValueError('Locator attempting to generate <too many> ticks')
    monkeypatch.setattr(threshold_curves, 'f1_figure', broken)
    evaluate.main([*COMMON, f'output_dir={tmp_path/"out"}', f'eval.predictions.other={tmp_path/"other.jsonl"}'])
    page = (tmp_path/'out'/'report.html').read_text()
    assert 'speaking: F1 over the threshold (ValueError: Locator attempting to generate &lt;too many&gt; ticks)' in page
    assert 'update: F1' not in page and page.count('<img ') == 2                       # precision over recall, and reliability
    assert scores(tmp_path/'out')['rows'][0]['speaking_f1'] == 1.
    assert figure_html('t', lambda: None).startswith("<p class='note'>Could not be drawn: t (AttributeError")


# External predictions

def records_of(n=3): return [load_scenes(compose_config(COMMON).data, 'test')[i].record for i in range(n)]
def scores(folder): return json.loads((Path(folder)/'scores.json').read_text())


def answers(records):
    "What the oracle says and believes at every frame, as entries."
    return [dict(video_uid=t.video_uid, time=f.time, text=f.text, states=f.state) for t in map(oracle_trace, records) for f in t.frames]


def score(tmp_path, **files):
    "The rows of predictions by name: bytes, or entries for a file of lines."
    given = []
    for name, content in files.items():
        if isinstance(content, list): content = '\n'.join(map(json.dumps, content)).encode()
        (tmp_path/f'{name}.json').write_bytes(content)
        given.append(f'eval.predictions.{name}={tmp_path/name}.json')
    evaluate.main([*COMMON, f'output_dir={tmp_path/"out"}', *given])
    return {r['name']: r for r in scores(tmp_path/'out')['rows']}


def test_a_few_probabilities_spoil_no_perfect_tracker(tmp_path):
    "One line of hundreds has probabilities, a low one for a reply, a change, and nothing: what was done was done."
    records = records_of()
    perfect = answers(records)
    said, moved, still = (next(k for k, f in enumerate(perfect) if k > 3 and test(k)) for test in (
        lambda k: perfect[k]['text'], lambda k: perfect[k]['states'] != perfect[k - 1]['states'],
        lambda k: not perfect[k]['text'] and perfect[k]['states'] == perfect[k - 1]['states']))
    slip = lambda at, **probs: [f | (probs if k == at else {}) for k, f in enumerate(perfect)]
    rows = score(tmp_path, plain=perfect, update=slip(moved, update_prob=.9), low_update=slip(moved, update_prob=.1),
                 low_speak=slip(said, speak_prob=.1), high=slip(still, speak_prob=.9, update_prob=.9),
                 zero=slip(still, speak_prob=0., update_prob=0.))
    for name in ('plain', 'update', 'low_update', 'low_speak', 'high', 'zero'):
        assert [rows[name][k] for k in ('speaking_f1', 'update_f1', 'joint_goal_accuracy', 'reply_f1', 'score')] == [1.]*5, name
    assert rows['plain']['update_ap'] is None and rows['update']['update_ap'] == 1.                # sweeps go by the probabilities


def test_who_has_only_probabilities_decides_from_a_half_on(tmp_path):
    "The same for both decisions; what it never gave is undefined, and not wrong."
    records = records_of()
    half = lambda event: .5 if event else .49
    timing = [dict(video_uid=t.video_uid, time=f.time, speak_prob=half(f.text), update_prob=half(f.update_prob))
              for t in map(oracle_trace, records) for f in t.frames]
    row = score(tmp_path, timing=timing)['timing']
    assert [row[k] for k in ('speaking_f1', 'ready_f1', 'update_f1', 'speaking_ap', 'update_ap')] == [1.]*5
    lacking = ('reply_f1', 'response_names_step', 'pauc', 'bleu', 'proassist_bleu4', 'joint_goal_accuracy', 'score')
    assert [row[k] for k in lacking] == [None]*len(lacking)
    assert [row['undefined'][k] for k in ('reply_f1', 'joint_goal_accuracy')] == ['words: not given', 'states: not given']
    assert 'silent in' not in row['what']


def test_any_form_of_a_file_is_the_same_file(tmp_path):
    perfect = answers(records_of())
    perfect[5]['text'] = 'Mind the\u2028step, «gut».'
    lines = '\n'.join(json.dumps(p, ensure_ascii=False) for p in perfect)
    array, old = json.dumps(perfect, ensure_ascii=False, indent=1), lines.replace('\n', '\r')
    ways = dict(lines=lines.encode(), array=array.encode(), bom=b'\xef\xbb\xbf' + array.encode(), wide=lines.encode('utf-16'),
                wide_array=array.encode('utf-16'), crlf=lines.replace('\n', '\r\n').encode(), cr=old.encode(),
                packed=gzip.compress(lines.encode()), packed_array=gzip.compress(array.encode('utf-16')))
    rows = score(tmp_path, **ways)
    own = lambda row: {k: v for k, v in row.items() if k not in ('name', 'what')}
    for name in ways: assert own(rows[name]) == own(rows['lines']), name
    assert scores(tmp_path/'out')['problems'] == []


@pytest.mark.parametrize('content, why', [
    (b'[{"video_uid": "a"', 'not JSON'), (gzip.compress(b'[]'*50)[:-9], 'a damaged gzip file'), (b'PK\x03\x04\xff\xfe\xff', 'zip archive'),
    (b'[]', 'the file is empty'), (b'', 'the file is empty'), (b'[1, 2]', 'entry 1: not an object')],
    ids=['cut off', 'cut gzip', 'zip', 'empty array', 'empty', 'numbers'])
def test_what_is_no_such_file_is_refused_before_anything_is_written(tmp_path, content, why):
    (tmp_path/'x.json').write_bytes(content)
    with pytest.raises(InputError, match=why):
        evaluation_run.evaluate(compose_config([*COMMON, f'output_dir={tmp_path/"out"}', f'eval.predictions.x={tmp_path/"x.json"}']))
    assert not (tmp_path/'out').exists()


# Measures

def test_the_window_is_that_of_proassists_rule():
    "Written down again as its code has it, on all names of its data and of ours, in small and capital letters; and the one exception."
    def proassist(name):
        for word, window in (('narration', (-2.5, 2.5)), ('ego4d', (-4, 8.5)), ('epickitchens', (-1.5, 3)), ('holoassist', (-1.5, 2.5)),
                             ('egoexolearn', (-2, 3.5)), ('assembly101', (-2, 4)), ('wtag', (-3, 6))):
            if word in name: return window
        return -2.5, 2.5
    words = ['ego4d', 'epickitchens', 'holoassist', 'egoexolearn', 'assembly101', 'wtag']
    ends = '', '/dialog-klg_val_L0_I1', '/narration_train', '_goalstep', '2'
    names = [f'{before}{word}{after}' for word in words for before in ('', 'my ', 'x') for after in ends]
    names += ['narration', 'ego4d of epickitchens', 'wtag+holoassist', 'toy', '', 'captaincook4d', 'coin', 'proassist', 'ego 4d']
    for name in names: assert window_of(name) == window_of(name.upper()) == proassist(name), name
    for name in ('EPIC-KITCHENS-100', 'epic_kitchens_100', 'Epic Kitchens'):
        assert window_of(name) == (-1.5, 3) and proassist(name) == (-2.5, 2.5)
    assert window_of('EPIC-KITCHENS-100 narration') == (-2.5, 2.5)


def test_what_proassist_leaves_behind_is_matched():
    "A perfect run on a dialogue of its own: every reply at 0 s."
    path = CASES/'proassist-results'/'0.json'
    if not path.exists(): pytest.skip(f'{path}: not found')
    frames = json.loads(path.read_text())['predictions']
    said, ref = ({f['frame_idx_in_stream']: f[key] for f in frames if f[key]} for key in ('gen', 'ref'))
    matching = match_predictions(said, ref, len(frames), window_of('assembly101'), 2.)
    found = speaking_metrics(matching)
    assert [found[k] for k in ('precision', 'recall', 'f1', 'time_diff', 'num_missed', 'num_redundant')] == [1., 1., 1., 0., 0, 0]
    assert found['num_matched'] == len(ref) == 20 and all(p.pred == p.ref for p in matching.pairs)


def spoken(record, change):
    "The oracle of a record, its replies changed."
    trace = oracle_trace(record)
    return trace_from_states(record, trace.states, {i: change(n, text) for n, (i, text) in enumerate(trace.spoken)})


def test_proassists_words_are_those_of_pairs_above_a_half():
    "Every second reply is nonsense: matched, for nobody else speaks there, and in BLEU; but not in ProAssist's."
    records = records_of()
    language = Language(load_encoder('words'), 'words', Idf([t.content for r in records for t in r.turns if t.role == 'assistant']))
    half = [spoken(r, lambda n, text: text.split(' ', 1)[1].upper() + ' !' if n % 2 else 'la la la la la') for r in records]
    tallies = tally_rows(dict(half=(half, records), oracle=([oracle_trace(r) for r in records], records)), silent=True, language=language)
    half, oracle = (make_row(name, 'streamed', '', some, {}) for name, some in tallies.items())
    assert oracle['proassist_bleu4'] == pytest.approx(1, abs=1e-6) and half['bleu'] < .1 and half['proassist_bleu4'] > .7
    assert half['counts']['text_proassist_pairs'] == half['counts']['reply_correct'] < half['counts']['text_pairs']
    good = [(text, turn) for t in tallies['half'] for text, turn in t.pairs]
    assert good and all(text.lower().removesuffix(' !') == turn.split(' ', 1)[1].lower() for text, turn in good)
    idf = Idf([turn for _, turn in good], ptb_tokens)                                                     # of these pairs' references alone
    assert half['proassist_cider'] == pytest.approx(np.mean([cider(*pair, idf) for pair in good]))
    everything = Idf([t.content for r in records for t in r.turns if t.role == 'assistant'], ptb_tokens)
    assert half['proassist_cider'] != pytest.approx(np.mean([cider(*pair, everything) for pair in good]), abs=1e-3)


def test_twenty_of_twenty_is_not_certainty(tmp_path):
    "The bound of so many videos stands beside the interval, in the scores, in the leaderboard and on the page; and points decide nothing."
    records = records_of()
    rows = score(tmp_path, other=answers(records))
    low = .025**(1/3)
    assert rows['other']['intervals']['joint_goal_accuracy'] == [1., 1.]
    assert rows['other']['bounds']['joint_goal_accuracy'] == pytest.approx([low, 1.])
    assert rows['always_silent']['bounds']['speaking_recall'] == pytest.approx([0., 1 - low])
    assert not rows['other']['bounds'].keys() & {'reply_time_diff', 'bleu', 'cider'}
    board, page = (tmp_path/'out'/'leaderboard.md').read_text(), (tmp_path/'out'/'report.html').read_text()
    assert f'1.000 [{low:.3f}, 1.000]†' in board and f'<small>{low:.3f}–1.000†</small>' in page
    assert all('† All videos are alike in this' in text and 'Clopper and Pearson' in text for text in (board, page))
    same = next(c for c in scores(tmp_path/'out')['comparisons'] if c['other'] == 'event_order' and c['column'] == 'speaking_f1')
    assert same['interval'] == [0., 0.] and same['bound'][0] < 0 < same['bound'][1] and same['verdict'] == 'no difference shown'


def test_bounds_go_by_videos_in_which_there_is_something_to_judge():
    records = [r.model_copy(update=dict(turns=r.turns if k < 2 else [])) for k, r in enumerate(records_of())]
    tallies = tally_rows(dict(oracle=([oracle_trace(r) for r in records], records)), silent=True)['oracle']
    row = make_row('oracle', 'baseline', '', tallies, dict(speaking_f1=1), draws=resample(3, 200))
    assert row['bounds']['joint_goal_accuracy'] == pytest.approx([.025**(1/3), 1.])
    assert 'speaking_f1' not in row['bounds'] or row['bounds']['speaking_f1'] == pytest.approx([.025**(1/2), 1.])


# Videos that fail

@pytest.fixture(scope='module')
def kitchen(tmp_path_factory):
    "A checkpoint, and eight videos with their records, five of which are for training."
    folder = tmp_path_factory.mktemp('kitchen')
    save_model(*processes.small_model(), folder/'checkpoint')
    build_sample(folder/'good', n=8, cfg=WorldConfig(max_idle=3, max_carry=4, mistakes=0.))
    return folder


def film(kitchen, tmp_path, **spoil):
    "A copy of the eight videos; `spoil` maps split_k to what is done to the file of that scene. → options, and the uids of the splits."
    tmp_path.mkdir(exist_ok=True)
    for path in (kitchen/'good').iterdir(): (tmp_path/path.name).write_bytes(path.read_bytes())
    options = ['data=records', f'data.path={tmp_path/"toy.jsonl"}', f'eval.checkpoint={kitchen/"checkpoint"}',
               f'output_dir={tmp_path/"out"}',
               'eval.max_reply_tokens=2', 'eval.controls=0', 'eval.pictures=0', 'eval.encoder=words', 'eval.bootstrap=50', 'eval.workers=1',
               'eval.perplexity=false', 'eval.strategies=null', 'eval.split=train']
    splits = {split: load_scenes(compose_config(options).data, split) for split in ('train', 'validation', 'test')}
    for name, change in spoil.items():
        split, k = name.split('_')
        change(splits[split][int(k)].path)
    return options, {split: [s.record.uid for s in some] for split, some in splits.items()}


def cut(path): path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])
def noise(path): path.write_bytes(np.random.default_rng(0).bytes(5000))
def gone(path): path.unlink()
GIVEN = ['eval.speak_threshold=.5', 'eval.update_threshold=.5']


@pytest.mark.parametrize('probe', [True, False])
def test_a_video_that_fails_is_named_and_the_others_are_scored(kitchen, tmp_path, capfd, probe):
    "Missing, cut off, no video at all: in the console, the scores, the leaderboard and the report; every row is of the same two videos."
    options, uids = film(kitchen, tmp_path/'films', train_1=gone, train_3=cut, train_4=noise)
    evaluate.main([*options, *GIVEN, f'eval.probe={probe}', 'eval.controls=2', 'eval.pictures=1'])
    bad, said, out = [uids['train'][k] for k in (1, 3, 4)], capfd.readouterr(), tmp_path/'films'/'out'
    found = scores(out)
    assert {e['record'] for e in found['failed']} == set(bad)
    assert all(e['split'] == 'train' and e['file'].endswith('.mp4') and e['why'] for e in found['failed'])
    assert (found['meta']['videos'], found['meta']['videos_failed']) == (len(uids['train']) - 3, 3)
    full = [r for r in found['rows'] if r['kind'] != 'control']
    assert {r['videos'] for r in full} == {len(uids['train']) - 3}
    assert len({r['counts']['frames'] for r in full}) == 1
    texts = [said.err, *((out/name).read_text() for name in ('leaderboard.md', 'report.html'))]
    for uid in bad: assert all(uid in text for text in texts), uid
    total = len(uids['train'])
    for text in (said.out, *texts[1:]): assert f'{total - 3} of {total} train videos' in text
    assert all('3 train videos failed and are in no row' in text for text in texts)
    per_video = json.loads((out/'per_video.json').read_text())
    assert not set(bad) & {v['video_uid'] for row in per_video.values() for v in row}
    assert not any(uid in str(p) for uid in bad for p in (out/'traces').rglob('*.json'))


@pytest.mark.parametrize('probe', [True, False])
def test_controls_are_of_the_videos_that_are_left(kitchen, tmp_path, capfd, probe):
    "The first two are missing. Known beforehand, the controls are the next ones; found too late, it is said that there are none."
    options, uids = film(kitchen, tmp_path/'films', train_0=gone, train_1=gone)
    evaluate.main([*options, *GIVEN, f'eval.probe={probe}', 'eval.controls=2'])
    out, said = tmp_path/'films'/'out', capfd.readouterr().out
    rows = {r['name']: r for r in scores(out)['rows']}
    texts = [said, *((out/name).read_text() for name in ('leaderboard.md', 'report.html'))]
    for name in ('control_grey', 'control_permuted'):
        missing = f'There is no row {name}: the videos that it was to be streamed on failed.'
        assert (name in rows) == probe and all((missing in text) != probe for text in texts)
        if probe: assert [v['video_uid'] for v in json.loads((out/'per_video.json').read_text())[name]] == uids['train'][2:4]


def test_the_next_run_tries_again(kitchen, tmp_path):
    "The file is back: it is streamed, and what was streamed before is not."
    keep = []
    options, uids = film(kitchen, tmp_path/'films', train_2=lambda path: (keep.append((path, path.read_bytes())), gone(path)))
    evaluate.main([*options, *GIVEN])
    traces = tmp_path/'films'/'out'/'traces'/'train'/'model'
    before = {p.name: p.stat().st_mtime_ns for p in traces.iterdir()}
    for path, content in keep: path.write_bytes(content)
    evaluate.main([*options, *GIVEN])
    after = {p.name: p.stat().st_mtime_ns for p in traces.iterdir()}
    assert before.items() < after.items() and len(after) == len(uids['train'])
    assert scores(tmp_path/'films'/'out')['failed'] == [] and 'failed' not in (tmp_path/'films'/'out'/'leaderboard.md').read_text()


def test_thresholds_are_tuned_on_the_videos_that_are_left(kitchen, tmp_path, capfd):
    "No validation video is left: refused, with what to do; with thresholds given it is not even looked at."
    options, uids = film(kitchen, tmp_path/'films', validation_0=gone)
    with pytest.raises(SystemExit) as e: evaluate.main(options)
    said = capfd.readouterr().err
    assert e.value.code == 2
    assert all(text in said for text in ('all 1 validation videos failed', 'eval.speak_threshold', *uids['validation']))
    evaluate.main([*options, *GIVEN])
    assert scores(tmp_path/'films'/'out')['failed'] == []


def test_no_video_is_left(kitchen, tmp_path, capfd):
    options, uids = film(kitchen, tmp_path/'films', test_0=gone, test_1=noise)
    with pytest.raises(SystemExit) as e: evaluate.main([*options, *GIVEN, 'eval.split=test'])
    said = capfd.readouterr().err
    assert e.value.code == 2 and 'all 2 test videos failed' in said and all(uid in said for uid in uids['test'])
    assert not (tmp_path/'films'/'out'/'scores.json').exists()


def test_predictions_need_no_footage(kitchen, tmp_path):
    "Without a checkpoint nothing is streamed: no video has to be there."
    options, uids = film(kitchen, tmp_path/'films', **{f'train_{k}': gone for k in range(3)})
    records = [s.record for s in load_scenes(compose_config(options).data, 'train')]
    (tmp_path/'other.jsonl').write_text('\n'.join(map(json.dumps, answers(records))))
    some = [o for o in options if not o.startswith('eval.checkpoint')]
    evaluate.main([*some, f'eval.predictions.other={tmp_path/"other.jsonl"}'])
    found = scores(tmp_path/'films'/'out')
    assert found['rows'][0]['joint_goal_accuracy'] == 1. and found['failed'] == [] and found['meta']['videos'] == len(uids['train'])
    assert found['meta']['hashes']['test']['videos'] is None and found['meta']['hashes']['test']['records']


def test_predictions_beside_a_checkpoint_are_scored_on_the_same_videos(kitchen, tmp_path):
    options, uids = film(kitchen, tmp_path/'films', train_0=gone)
    records = [s.record for s in load_scenes(compose_config(options).data, 'train')]
    (tmp_path/'other.jsonl').write_text('\n'.join(map(json.dumps, answers(records))))
    evaluate.main([*options, *GIVEN, f'eval.predictions.other={tmp_path/"other.jsonl"}'])
    found = scores(tmp_path/'films'/'out')
    rows = {r['name']: r for r in found['rows']}
    assert rows['other']['videos'] == rows['model']['videos'] == len(uids['train']) - 1
    assert rows['other']['score'] == 1. and found['problems'] == []


def test_a_failed_video_is_heard_of_by_every_process(kitchen, tmp_path):
    "Two ranks: both end well, the first one tells; the share of the other that failed is left out as well."
    options, uids = film(kitchen, tmp_path/'films', train_0=cut, train_1=gone)
    status = processes.run(tmp_path/'log', evaluate.main, [*options, *GIVEN, 'eval.probe=false'], ranks=2, daemon=False,
                           env=dict(ACCELERATE_USE_CPU='true'))
    logs = [(tmp_path/f'log{rank}').read_text() for rank in range(2)]
    assert status == [0, 0], logs
    assert 'are in no row' in logs[0] and 'are in no row' not in logs[1]
    found = scores(tmp_path/'films'/'out')
    assert {e['record'] for e in found['failed']} == set(uids['train'][:2]) and found['rows'][0]['videos'] == len(uids['train']) - 2


def test_a_disk_that_is_full_is_no_videos_fault(kitchen, tmp_path, monkeypatch):
    from dst_smolvlm.evaluation import stream_split
    options, _ = film(kitchen, tmp_path/'films')
    def full(*args): raise OSError(28, 'No space left on device', 'traces')
    monkeypatch.setattr(stream_split, 'write_trace', full)
    with pytest.raises(InputError, match='No space left on device'): evaluation_run.evaluate(compose_config([*options, *GIVEN]))
    assert not (tmp_path/'films'/'out'/'scores.json').exists()


def test_a_perplexity_that_cannot_be_had_costs_no_score(kitchen, tmp_path, monkeypatch):
    options, _ = film(kitchen, tmp_path/'films')
    def broken(*args): raise InputError('k7.mp4: the video ends after 3 frames')
    monkeypatch.setattr(perplexity, 'perplexity', broken)
    evaluate.main([*options, *GIVEN, 'eval.perplexity=true'])
    row = scores(tmp_path/'films'/'out')['rows'][0]
    assert row['perplexity'] is None and row['undefined']['perplexity'] == 'k7.mp4: the video ends after 3 frames'
    assert row['slot_accuracy'] is not None
