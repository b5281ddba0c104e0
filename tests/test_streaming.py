"""Whatever comes, and in whatever order: a stream is what its log says, knows nothing of the future, and is nobody else's business.

Pictures here are of one colour, and the model knows each colour by image tokens of its own: what is tested comes after the vision tower."""
import copy, inspect, json, os, subprocess, sys

import numpy as np, pytest, torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dst_smolvlm.core.config import InputError, environment
from dst_smolvlm.data.schema import Step, VideoRecord, write_records
from dst_smolvlm.model.configuration import tiny_config
from dst_smolvlm.model.heads import decision_tokens
from dst_smolvlm.model.modeling import DSTSmolVLM, build_tiny
from dst_smolvlm.model.stream_layout import StreamLayout, tiny_tokenizer, toy_texts
from dst_smolvlm.streaming.context_strategies import POSITIONS, STRATEGIES, BaseContextStrategy, Continuation, make_strategy, register
from dst_smolvlm.streaming.batch_runner import BatchStreamRunner
from dst_smolvlm.streaming.runner import StreamRunner

SMALL = dict(hidden_size=32, layers=2, vision_size=32, vision_layers=1, image_size=16, scale_factor=2)
NAMES = ['put the red circle in box 2', 'put the blue star in box 1', 'put the green square in box 3']
FREE = dict(goal='sort 3 parts into boxes', tracker_options=None, max_reply_tokens=4)      # heads 1, 2 and 4 of random weights decide
FREE_BATCH = {k: v for k, v in FREE.items() if k != 'goal'}       # a goal is given when a stream joins
GOAL = FREE['goal']
BUILT_IN = ['none', 'drop_all', 'drop_middle', 'recent_frames', 'text_long_vision_short', 'summarize_and_drop', 'summarize_with_dst']
OPTIONS = dict(drop_middle=dict(tail_tokens=24), recent_frames=dict(num_frames=5),
               text_long_vision_short=dict(num_frames=5, text_tokens=30), summarize_and_drop=dict(summary_max_length=6),
               summarize_with_dst=dict(tail_tokens=24))
MOVABLE = [name for name in BUILT_IN[1:] if 'positions' in inspect.signature(STRATEGIES[name]).parameters]
WAYS = [(name, dict(positions=p)) for name in MOVABLE for p in POSITIONS]
WAYS += [('summarize_and_drop', {}), ('summarize_with_dst', {})]
EXACT = [(name, more) for name, more in WAYS if more.get('positions', 'recompute') == 'recompute']
ids_of = lambda way: '-'.join(map(str, [way[0], *way[1].values()]))


def small_strategy(name, max_seq_len=None, reserved_seq_len=30, **more):
    if max_seq_len is None: max_seq_len = 170 if name == 'summarize_and_drop' else 140     # with room for the summary
    return make_strategy(dict(name=name, max_seq_len=max_seq_len, reserved_seq_len=reserved_seq_len) | OPTIONS.get(name, {}) | more)

def knows_colours(model):
    "The model with image tokens of its own for each of 256 colours."
    n, D = model.tokens_per_frame, model.config.text_config.hidden_size
    table = torch.randn(256, n, D, generator=torch.Generator().manual_seed(1))*1.5
    model.encode_frames = lambda pixels: table[((pixels[:, 0, 0, 0] + 1)*127.5).round().long()].to(model.dtype)
    return model.eval()

def small_model(tokens_per_frame=1, **choices):
    if tokens_per_frame == 1: model, layout = build_tiny(SMALL | choices)
    else:
        tokenizer = tiny_tokenizer(toy_texts())
        sizes = SMALL | dict(scale_factor=1) | choices                                    # the connector leaves the four patches
        config = tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids('<image>'), tokenizer.pad_token_id, **sizes)
        config.tokens_per_frame, layout = tokens_per_frame, StreamLayout(tokenizer, tokens_per_frame)
        config.update(decision_tokens(layout))
        torch.manual_seed(0)
        model = DSTSmolVLM(config)
    with torch.no_grad(): model.lm_head.weight[layout.end_id] *= 1.5                       # some replies end by themselves
    return knows_colours(model), layout


@pytest.fixture(scope='module')
def tiny(): return small_model()

def endless(layout):
    "The layout of a model that never chooses to end a reply."
    other = copy.copy(layout)
    other.never_said = [*layout.never_said, layout.end_id]
    return other

def picture(colour): return np.full((16, 16, 3), colour, np.uint8)

def film(seed, frames): return [picture(c) for c in np.random.default_rng(seed).integers(0, 256, frames)]

class Scripted:
    "In the place of the filter: believes what it is told to."
    def __init__(self, state): self.state, self.restarted = np.array(state, np.int8), None
    def __call__(self, pointer): return self.state.copy()
    def restart(self, state): self.restarted = np.array(state)
    def change(self, rng): self.state[rng.integers(len(self.state))] += 1; self.state %= 3

def start(tiny, strategy=None, names=NAMES, **options):
    return StreamRunner(*tiny, names, **FREE | dict(strategy=strategy) | options)

def numbers(r): return np.concatenate([[r.speak_prob, r.update_prob], r.state_probs.ravel(), r.pointer_probs])

def facts(r): return r.state.tolist(), r.text, r.dropped_tokens, r.cache_tokens, r.skipped

def same_bits(a, b):
    return len(a) == len(b) and all(facts(x) == facts(y) and np.array_equal(numbers(x), numbers(y)) for x, y in zip(a, b))

def same(a, b, eps=1e-4):
    "Decisions that were computed in other shapes."
    assert [facts(r) for r in a] == [facts(r) for r in b]
    for x, y in zip(a, b): np.testing.assert_allclose(numbers(x), numbers(y), atol=eps, rtol=0)

def ids_in(memory): return [i for s in memory.segments for i in s.ids]

def seen_in(memory): return [s.tokens for s in memory.segments if s.tokens is not None]


# ---- the log, read afresh -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def read_afresh(model, memory):
    "What one reading of the log through the library's own cache says at its last token: (P(speak), …) if it is a frame's, and logits."
    hidden, embeds = model.prefill(ids_in(memory), DynamicCache(), torch.cat(seen_in(memory)) if seen_in(memory) else None)
    logits = model.lm_head(hidden[0, -1]).float()
    if memory.segments[-1].kind != 'frame': return None, logits
    steps = model.step_memory(hidden, embeds, torch.tensor([memory.segments[0].prompt.step_spans]))
    previous_state = torch.from_numpy(memory.previous_state[None, None].astype(np.int64))
    out = model.decide(hidden[:, -1:], seen_in(memory)[-1][None], steps, previous_state)
    parts = [out[f'{k}_logits'][0, 0].softmax(-1) for k in ('speak', 'update', 'state', 'pointer')]
    return [float(parts[0][1]), float(parts[1][1]), *parts[2].flatten().tolist(), *parts[3].tolist()], logits

class Audit:
    "Checks everything that the model answers against a fresh reading of the asker's log."
    def __init__(self, monkeypatch, model, layout):
        self.decisions = self.words = 0
        self.worst = 0.
        answer = model.forward_batch
        def checked(asks, *args):
            expected = [read_afresh(model, a.memory) for a in asks]
            results = answer(asks, *args)
            for (decision, logits), result, a in zip(expected, results, asks):
                if a.what == 'decision':
                    speak, update, states, pointer = result
                    self.worst = max(self.worst, np.abs(np.array([speak, update, *states.ravel(), *pointer]) - decision).max())
                    self.decisions += 1
                else:
                    allowed = logits.index_fill(0, torch.tensor(layout.never_said), -torch.inf)
                    assert allowed.max() - allowed[result] < 1e-3
                    self.words += 1
            return results
        monkeypatch.setattr(model, 'forward_batch', checked)

@torch.inference_mode()
def first_layer(model, memory):
    "Keys and values [H, n, D] that the first layer should hold: they depend on embeddings and positions alone."
    text, n = model.model.text_model, memory.length
    layer, positions = text.layers[0], torch.from_numpy(memory.cache.positions[memory.row, :n])[None]
    ids, seen = torch.tensor([ids_in(memory)]), seen_in(memory)
    embeds = (model.embed(ids, torch.cat(seen)) if seen else model.get_input_embeddings()(ids))[:, :n]
    x = layer.input_layernorm(embeds)
    heads = text.config.num_key_value_heads, layer.self_attn.head_dim
    k, v = (part(x).view(1, n, *heads).transpose(1, 2) for part in (layer.self_attn.k_proj, layer.self_attn.v_proj))
    return apply_rotary_pos_emb(k, k, *text.rotary_emb(x, positions))[0][0], v[0]

def check_cache(model, memory, turned=True):
    "The cache holds the beginning of the log and nothing else, at ascending positions; without gaps unless keys are left where they are."
    cache, row, n = memory.cache, memory.row, memory.length
    assert 0 <= memory.unread and n + memory.unread == len(ids_in(memory))
    assert memory.ids_to_prefill == ids_in(memory)[n:]
    positions = cache.positions[row, :n]
    assert (np.diff(positions) > 0).all() and cache.next_position[row] == positions[-1] + 1 if n else True
    if turned: assert (positions == np.arange(n)).all()
    keys, values = first_layer(model, memory)
    torch.testing.assert_close(cache.keys[0][row, :, :n], keys, atol=2e-4, rtol=0)
    torch.testing.assert_close(cache.values[0][row, :, :n], values, atol=1e-5, rtol=0)
    previous_state = np.array(memory.segments[0].prompt.state)
    for s in memory.segments:
        for step, after in (s.changes or {}).items(): previous_state[step] = after
    assert (memory.previous_state == previous_state).all()             # it believes what its context says


# ---- causality ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('way', [('none', dict(max_seq_len=1200)), *WAYS], ids=ids_of)
def test_the_future_changes_nothing_before(tiny, way):
    frames, t = film(0, 28), 17
    future = frames[:t] + film(1, len(frames) - t)
    runs = []
    for images in (frames, future):
        runner = start(tiny, small_strategy(way[0], **way[1]))
        runs.append([runner.push(image, ['Now what?'] if i % 11 == 5 else ()) for i, image in enumerate(images)])
    whole, changed = runs
    assert same_bits(whole[:t], changed[:t])
    assert not same_bits(whole[t:], changed[t:])
    assert [facts(r)[:2] for r in whole[t:]] != [facts(r)[:2] for r in changed[t:]]                   # states and words, too
    if way[0] != 'none': assert sum(r.dropped_tokens > 0 for r in whole) >= 2 and any(r.dropped_tokens for r in whole[:t])


# ---- what stays ---------------------------------------------------------------------------------------------------------------------

def expected_log(name, strategy, log, first, new, prompt_in, told_before):
    """What should stay of a log of (kind, frame, ids), in ids; written from the description of the strategies, without them.
    `prompt_in` writes the prompt of a state, and `told_before[f]` is the state that was told before frame f."""
    frames = sorted({f for kind, f, _ in log if kind not in ('prompt', 'summary')})
    of = {f: [(kind, ids) for kind, g, ids in log if g == f and kind not in ('prompt', 'summary')] for f in frames}
    free = strategy.max_seq_len - strategy.reserved_seq_len - len(first) - new - 1
    flat = lambda pieces: [i for _, ids in pieces for i in ids]
    if name == 'drop_all': return first
    if name == 'recent_frames':
        blocks = [ids for kind, _, ids in log if kind == 'frame']
        return first + [i for ids in blocks[-strategy.num_frames:] for i in ids]
    if name in ('drop_middle', 'summarize_with_dst'):
        most, k = min(strategy.tail_tokens, free), len(frames)
        while k and sum(len(flat(of[f])) for f in frames[k-1:]) <= most: k -= 1
        tail = [i for f in frames[k:] for i in flat(of[f])]
        if name == 'drop_middle': return first + tail
        return prompt_in(told_before[frames[k] if k < len(frames) else frames[-1] + 1]) + tail
    if name == 'text_long_vision_short':
        shown = [f for f in frames if any(kind == 'frame' for kind, _ in of[f])][-strategy.num_frames:]
        most = min(strategy.text_tokens, free - sum(len(ids) for f in shown for kind, ids in of[f] if kind == 'frame'))
        words = {f: [i for kind, ids in of[f] if kind != 'frame' for i in ids] for f in frames}
        previous_state = [f for f in frames if sum(len(words[g]) for g in frames if g >= f) <= most]
        return first + [i for f in frames for kind, ids in of[f] if (f in shown if kind == 'frame' else f in previous_state) for i in ids]
    raise AssertionError(name)

@pytest.mark.parametrize('way', WAYS, ids=ids_of)
def test_what_stays_after_every_cut(tiny, way, monkeypatch):
    "Every strategy keeps what is said of it; where it rebuilds, every decision and word is that of a fresh reading by another cache."
    model, layout = tiny
    (name, more), rng = way, np.random.default_rng(3)
    strategy = small_strategy(name, **more)
    audit = Audit(monkeypatch, model, layout) if way in EXACT else None
    runner = start(tiny, strategy)
    runner.stream.tracker, memory = Scripted([0, 0, 0]), runner.memory
    first, prompt_in = list(memory.segments[0].ids), lambda state: layout.prompt(FREE['goal'], '', NAMES, state).ids
    told_before, cuts, state_told, long_ago = {0: np.zeros(3, np.int8)}, 0, 0, 0
    for i, image in enumerate(film(2, 60)):
        if rng.random() < .25: runner.stream.tracker.change(rng)
        words = ['Is it done?'] if rng.random() < .1 else []
        runner.stream.options.speak_threshold = 0. if rng.random() < .15 else 2.
        log = [(s.kind, s.frame, list(s.ids)) for s in memory.segments]
        new = 1 + sum(len(layout.user(w)) for w in words)
        full = sum(len(ids) for *_, ids in log) + new + strategy.reserved_seq_len >= strategy.max_seq_len
        if i == 20: result = runner.push(None)
        else: result = runner.push(image, words)
        told_before[i + 1] = result.state
        if i == 20: continue
        assert (result.dropped_tokens > 0) == full
        now, frame = ids_in(memory), [s for s in memory.segments if s.frame == i and s.kind in ('user', 'frame')]
        stayed = [s for s in memory.segments if s.frame < i]
        assert [s.kind for s in frame] == ['user']*len(words) + ['frame']
        if not full: assert [list(s.ids) for s in stayed] == [ids for *_, ids in log]; continue
        cuts += 1
        stayed_ids = [j for s in stayed for j in s.ids]
        assert now[:len(stayed_ids)] == stayed_ids
        if name == 'summarize_and_drop':
            assert [s.kind for s in stayed] == ['prompt', 'summary'] and stayed[0].ids == first
            opening = layout.summary_open()
            assert stayed[1].ids[:len(opening)] == opening and stayed[1].ids[-2:] == [layout.end_id, *layout.turn_end]
            assert len(stayed[1].ids) <= len(opening) + strategy.summary_max_length + 2
        else: assert stayed_ids == expected_log(name, strategy, log, first, new, prompt_in, told_before)
        state_told += any(s.kind == 'state' for s in stayed)
        pictured = {s.frame for s in stayed if s.kind == 'frame'}
        long_ago += any(s.kind in ('user', 'assistant', 'state') and s.frame not in pictured for s in stayed)
    assert cuts >= 3
    assert (state_told > 0) == (name in ('drop_middle', 'text_long_vision_short', 'summarize_with_dst'))
    assert (long_ago > 0) == (name == 'text_long_vision_short')
    if audit: assert audit.decisions == 59 and audit.words > 5 and audit.worst < 1e-4, audit.worst


def test_state_with_predictions_is_never_forgotten(tiny):
    "Under summarize_with_dst the state that the context tells is the predicted one, after any number of cuts; so is the filter's."
    runner, rng = start(tiny, small_strategy('summarize_with_dst', tail_tokens=12), speak_threshold=2.), np.random.default_rng(0)
    runner.stream.tracker = Scripted([0, 0, 0])
    cuts = 0
    for image in film(3, 90):
        if rng.random() < .2: runner.stream.tracker.change(rng)
        before, predicted = runner.previous_state.copy(), runner.stream.tracker.state.copy()
        result = runner.push(image)
        if result.dropped_tokens: cuts += 1; assert (runner.stream.tracker.restarted == before).all()
        assert (result.state == predicted).all() and (runner.previous_state == predicted).all()
    assert cuts >= 5


def test_the_summary_is_the_models_own(tiny):
    "What stands behind the prompt is what the library's cache says after the log and 'Summary:'; never more than summary_max_length words."
    model, layout = tiny
    for forever in (False, True):
        runner = StreamRunner(model, endless(layout) if forever else layout, NAMES, **FREE, strategy=small_strategy('summarize_and_drop'))
        checked = 0
        for image in film(4, 36):
            memory = runner.memory
            before, seen = ids_in(memory), seen_in(memory)
            result = runner.push(image)
            if not result.dropped_tokens: continue
            cache = DynamicCache()
            with torch.inference_mode():
                model.prefill(before, cache, torch.cat(seen))
                said, _ = model.fast_greedy_generate(layout.summary_open(), cache, layout.end_id, 6, runner.layout.never_said)
            assert memory.segments[1].ids == layout.summary_open() + said + [layout.end_id] + layout.turn_end
            if forever: assert len(said) == 6
            checked += 1
        assert checked >= 2


# ---- the log and the cache, whatever comes ------------------------------------------------------------------------------------------

FRAME = st.tuples(st.integers(0, 255), st.booleans(), st.booleans(), st.integers(0, 2))     # colour, speaks, changes, utterances
QUIET = 0, False, False, 0
EVENTS = st.lists(st.one_of(FRAME, st.none()), min_size=15, max_size=60)

@given(way=st.sampled_from(WAYS), events=EVENTS, room=st.integers(60, 110), near=st.booleans(), forever=st.booleans())
@example(way=('summarize_and_drop', {}), events=[QUIET]*5 + [None] + [QUIET]*6 + [None, None, (0, False, False, 2)], room=60, near=False,
         forever=False)
@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
def test_log_and_cache_agree_whatever_comes(way, events, room, near, forever):
    "Random frames, missing frames, words, replies and changes under any strategy, with the last position far away or near."
    model, layout = RANDOM_WALK
    name, more = way
    near = near and way != LEFT_IN_FRONT
    reserved = 46                                   # a turn of the user, one of the state, and a reply
    prompt = len(layout.prompt(FREE['goal'], '', NAMES, [0]*3).ids)
    summary = 22 if name == 'summarize_and_drop' else 0                    # 6 tokens and 16 more, which it reserves beside
    strategy = small_strategy(name, prompt + reserved + summary + room, reserved, **more)
    runner = StreamRunner(model, endless(layout) if forever else layout, NAMES, **FREE, strategy=strategy)
    runner.stream.tracker, memory = Scripted([0, 0, 0]), runner.memory
    if near: runner.stream.manager.last_position = 2*strategy.max_seq_len
    for i, event in enumerate(events):
        before, words = runner.stream.last, []
        if event is None:
            result = runner.push(None, ['Wait.'] if i % 2 else ())
            assert result.skipped and facts(result)[:2] == (before.state.tolist(), None)
        else:
            colour, speaks, changes, said = event
            if changes: runner.stream.tracker.change(np.random.default_rng(i))
            runner.stream.options.speak_threshold = 0. if speaks else 2.
            words = ['Which one?']*said
            user_turns = [*runner.user_turns, *words]
            if len(user_turns) > 4: runner.user_turns = []; user_turns = words
            result = runner.push(picture(colour), words)
            assert (result.text is not None) == speaks and not runner.user_turns
            here = [s for s in memory.segments if s.frame == memory.frame]
            expected = ['user']*len(user_turns) + ['frame'] + [s.kind for s in here if s.kind == 'state'] + ['assistant']*speaks
            assert [s.kind for s in here if s.kind != 'summary'] == expected
        assert memory.frame == i and result.cache_tokens < strategy.max_seq_len
        check_cache(model, memory, turned=more.get('positions') != 'keep')
        if near: assert memory.cache.next_position[0] < runner.stream.manager.last_position

RANDOM_WALK = small_model()
LEFT_IN_FRONT = 'text_long_vision_short', dict(positions='keep')


def test_keys_behind_a_gap_are_turned_in_their_slots():
    "A cut that left a gap, and then one that turns: the keys that stay in their slots have to be turned as well."
    model, _ = RANDOM_WALK
    x = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0))
    def read(cache, x):
        with torch.inference_mode(): model.pass_through(x, cache.place([x.shape[1]]))
    cache, fresh = model.stream_cache(), model.stream_cache()
    read(cache, x)
    cache.keep(0, [*range(5), *range(15, 30)], rerotate=False)
    cache.keep(0, range(18), rerotate=True)
    read(fresh, torch.cat([x[:, :5], x[:, 15:28]], 1))
    assert cache.positions[0, :18].tolist() == list(range(18)) and cache.next_position[0] == 18
    torch.testing.assert_close(cache.keys[0][:, :, :18], fresh.keys[0][:, :, :18], atol=1e-4, rtol=0)


def test_words_that_stay_for_long_are_turned_when_positions_run_out(tiny):
    "text_long_vision_short with positions=keep: its words stay in their slots from cut to cut, until the last position is near."
    strategy = small_strategy('text_long_vision_short', positions='keep', text_tokens=40)
    runner = start(tiny, strategy, speak_threshold=2., update_threshold=2.)
    runner.stream.manager.last_position = 400
    for i, image in enumerate(film(5, 300)):
        runner.push(image, ['Is it done?'] if i == 3 else ())
        check_cache(tiny[0], runner.memory, turned=False)


# ---- the budget ---------------------------------------------------------------------------------------------------------------------

class Tallest:
    "How many tokens a row ever held."
    def __init__(self, monkeypatch, cache):
        self.tokens, place = 0, cache.place
        def watched(*args):
            out = place(*args)
            self.tokens = max(self.tokens, int(cache.lengths.max()))
            return out
        monkeypatch.setattr(cache, 'place', watched)

def test_a_state_turn_and_a_long_reply_fit_together(tiny):
    model, layout = tiny
    runner = start((model, endless(layout)), small_strategy('drop_all'), max_reply_tokens=64, speak_threshold=0.)
    runner.stream.tracker = Scripted([0, 0, 0])
    results = []
    for i, image in enumerate(film(6, 8)):
        runner.stream.tracker.state[:] = i % 3
        results.append(runner.push(image))
    assert max(r.cache_tokens for r in results) < 140


def test_a_summary_after_a_long_reply_fits(tiny, monkeypatch):
    model, layout = tiny
    strategy = small_strategy('summarize_and_drop', 220, 40, summary_max_length=40)
    runner = StreamRunner(model, endless(layout), NAMES, **FREE | dict(max_reply_tokens=64), strategy=strategy, speak_threshold=0.)
    tallest = Tallest(monkeypatch, runner.memory.cache)
    for image in film(7, 7): runner.push(image)
    assert runner.stream.manager.overflows >= 2 and tallest.tokens < strategy.max_seq_len


@pytest.mark.parametrize('way', EXACT, ids=ids_of)
def test_too_small_a_budget_is_refused_before_the_first_frame(tiny, way):
    "With a budget that is accepted the stream goes on, whatever the state is by then; one token less is refused, and by how much is said."
    name, more = way
    with pytest.raises(InputError, match=f'{name} keeps at least') as refused: start(tiny, small_strategy(name, 60, 30, **more))
    least = int(str(refused.value).split('take at least ')[1])
    with pytest.raises(InputError): start(tiny, small_strategy(name, least - 1, **more))
    runner = start(tiny, small_strategy(name, least, **more), speak_threshold=2.)
    runner.stream.tracker = Scripted([0, 0, 0])
    for i, image in enumerate(film(8, 40)):
        runner.stream.tracker.state[:] = i//14
        runner.push(image)
    assert runner.stream.manager.overflows


@pytest.mark.parametrize('tail_tokens', [1, 1000])
def test_a_longer_prompt_of_another_state_fits(tiny, tail_tokens):
    "An accepted budget holds for every state: the agenda names another step, which may have a longer name."
    names = ['stir', 'put the very long green square and the even longer yellow circle into the last box of them all']
    with pytest.raises(InputError) as refused: start(tiny, small_strategy('summarize_with_dst', 40), names=names)
    least = int(str(refused.value).split('take at least ')[1])
    strategy = small_strategy('summarize_with_dst', least + (0 if tail_tokens == 1 else 60), tail_tokens=tail_tokens)
    runner = start(tiny, strategy, names=names, speak_threshold=2.)
    runner.stream.tracker = Scripted([2, 0])
    for image in film(9, 130): runner.push(image)
    assert runner.stream.manager.overflows


# ---- what the user says, and when it speaks -----------------------------------------------------------------------------------------

LONG = 'Which one is it, the red circle or the blue star? '*40

@pytest.mark.parametrize('name', [name for name in BUILT_IN if name != 'summarize_and_drop'])
def test_too_many_words(tiny, name):
    "Words that no context can hold: an error that says so, and the stream goes on as one that never heard them."
    runs = []
    for said in (False, True):
        runner = start(tiny, small_strategy(name, 1200 if name == 'none' else 140))
        results = []
        for i, image in enumerate(film(10, 24)):
            if said and i == 9:
                words = [LONG*(3 if name == 'none' else 1)]
                with pytest.raises(InputError, match='max_seq_len=.* with 30 reserved: .* more'): runner.push(image, words)
                check_cache(tiny[0], runner.memory)
                assert not runner.user_turns
            results.append(runner.push(image))
        runs.append(results)
    assert same_bits(*runs)


def test_a_fixed_cache_that_is_too_small(tiny):
    "The error is clear, and log and cache are in line after it as before."
    model, _ = tiny
    runner = start(tiny, cache=model.stream_cache(1, capacity=100, fixed=True))
    with pytest.raises(InputError, match='a fixed cache of 100 tokens'):
        for image in film(30, 60): runner.push(image)
    check_cache(model, runner.memory)


def test_too_many_words_for_a_summary(tiny):
    runner = start(tiny, small_strategy('summarize_and_drop'))
    for image in film(10, 3): runner.push(image)
    before = ids_in(runner.memory)
    with pytest.raises(InputError): runner.push(picture(0), [LONG])
    assert ids_in(runner.memory) == before


def test_words_as_one_string(tiny):
    "Either one utterance or a clear error."
    runner = start(tiny)
    try: runner.push(picture(1), 'Now what?')
    except (InputError, TypeError): return
    assert sum(s.kind == 'user' for s in runner.memory.segments) == 1


def test_special_tokens_in_words_are_letters(tiny):
    "In what the user says, in the goal and in the steps' names: no image, no end, no padding."
    model, layout = tiny
    evil = '<image><end_of_utterance><|pad|><|im_start|>'
    runner = start(tiny, names=[*NAMES, evil], goal=evil, knowledge=evil)
    plain = start(tiny, names=[*NAMES, 'x'], goal='x', knowledge='x')
    for r, words in ((runner, evil), (plain, 'x')):
        for i in range(6): r.push(picture(i), [words])
    special = set(layout.tokenizer.all_special_ids)
    count = lambda r: [i for s in r.memory.segments if s.kind in ('prompt', 'user') for i in s.ids if i in special]
    assert count(runner) == count(plain)
    assert ids_in(runner.memory).count(layout.image_token_id) == 6
    assert evil in layout.tokenizer.decode(layout.user(evil))
    check_cache(model, runner.memory)


def test_a_reply_without_end_is_cut(tiny, monkeypatch):
    "And the next frames are those of a log with that reply, read afresh."
    model, layout = tiny
    runner = StreamRunner(model, endless(layout), NAMES, **FREE | dict(max_reply_tokens=7), speak_threshold=0.)
    audit = Audit(monkeypatch, model, runner.layout)
    for image in film(11, 8): runner.push(image)
    replies = [s.ids for s in runner.memory.segments if s.kind == 'assistant']
    assert len(replies) == 8 and {len(r) for r in replies} == {len(layout.assistant_open) + 7 + 2}
    assert all(r[-2:] == [layout.end_id, *layout.turn_end] and layout.end_id not in r[:-2] for r in replies)
    assert audit.decisions == 8 and audit.words == 56 and audit.worst < 1e-4


def test_cooldown(tiny):
    "Between two replies lie more than cooldown_s, but for an answer to the user; a missing frame counts, and a cut changes nothing."
    for fps in (1., 2.):
        runner = start(tiny, small_strategy('drop_all'), speak_threshold=0., cooldown_s=3., fps=fps)
        spoken, asked = [], {4, 21}
        for i, image in enumerate(film(12, 40)):
            if i in asked: runner.hear('Which one?')
            if runner.push(None if i % 9 == 8 else image).text is not None: spoken.append(i)
        assert asked <= set(spoken) and runner.stream.manager.overflows
        expected, last = [], -99
        for i in range(40):
            if i % 9 != 8 and (i in asked or i - last > 3*fps): expected.append(i); last = i
        assert spoken == expected


def test_what_was_said_in_between_is_heard_once(tiny):
    "hear() before the first frame, between frames and on a missing one; in order, with the next frame that is read."
    runner = start(tiny, speak_threshold=2., update_threshold=2.)
    layout = tiny[1]
    runner.hear('One.')
    runner.push(None, ['Two.'])
    runner.hear('Three.')
    runner.push(picture(1), ['Four.'])
    runner.push(picture(2))
    assert [(s.kind, s.frame) for s in runner.memory.segments] == [('prompt', -1), *[('user', 1)]*4, ('frame', 1), ('frame', 2)]
    assert [s.ids for s in runner.memory.segments[1:5]] == [layout.user(f'{n}.') for n in ('One', 'Two', 'Three', 'Four')]


def test_filter_off_and_on(tiny):
    "With it the state is the filter's, causal and from the pointer alone; without, head 4's at the frames that head 2 chooses."
    from dst_smolvlm.streaming.state_tracker import OnlineStateTracker
    results = [start(tiny, tracker_options=options, speak_threshold=2.) for options in (None, {}, dict(begin=-3., undo_frames=0))]
    for runner in results: runner.results = [runner.push(image) for image in film(13, 30)]
    off, *on = results
    previous_state = np.zeros(3, int)
    for r in off.results:
        previous_state = r.state_probs.argmax(-1) if r.update_prob >= .5 else previous_state
        assert (r.state == previous_state).all()
    for runner, options in zip(on, ({}, dict(begin=-3., undo_frames=0))):
        alone = OnlineStateTracker([0, 0, 0], **options)
        for r in runner.results: assert (r.state == alone(r.pointer_probs)).all()
    assert len({str([r.state.tolist() for r in runner.results]) for runner in results}) == 3


def test_a_stream_without_steps(tiny):
    "It works, or says that it cannot."
    try: start(tiny, names=[]).push(picture(1))
    except InputError: pass


# ---- the oracle, and a strategy of one's own ----------------------------------------------------------------------------------------

@pytest.fixture
def truth(tmp_path):
    spans = [(2., 5.), (6., 9.), (12., 40.)]
    steps = [Step(id=f'S{i}', name=n, spans=[s]) for i, (n, s) in enumerate(zip(NAMES, spans))]
    record = VideoRecord(video_uid='sorting', dataset='toy', duration=45., steps=steps)
    write_records([record], tmp_path/'truth.jsonl')
    return record, str(tmp_path/'truth.jsonl')

def test_the_oracle_tells_the_truth_in_prompts_and_nowhere_else(tiny, truth):
    record, file = truth
    states = record.states(2.)
    strategy = small_strategy('summarize_with_dst', dst_file=file)
    assert strategy.settings()['name'] == 'summarize_with_dst_oracle' and STRATEGIES['summarize_with_dst'].name == 'summarize_with_dst'
    assert small_strategy('summarize_with_dst').settings()['name'] == 'summarize_with_dst'
    runner, rng = start(tiny, strategy, video_uid='sorting', speak_threshold=2.), np.random.default_rng(1)
    runner.stream.tracker = Scripted([0, 0, 0])
    plain, memory, cuts = start(tiny, small_strategy('summarize_with_dst'), speak_threshold=2.), runner.memory, 0
    plain.stream.tracker = Scripted([0, 0, 0])
    for i, image in enumerate(film(14, 85)):
        if rng.random() < .2: runner.stream.tracker.change(rng); plain.stream.tracker.state = runner.stream.tracker.state.copy()
        image = None if i in (30, 31) else image
        result, other = runner.push(image), plain.push(image)
        if not cuts and not result.dropped_tokens: assert result.skipped or same_bits([result], [other])      # no truth yet
        if not result.dropped_tokens: continue
        cuts += 1
        tail = [s.frame for s in memory.segments[1:]]
        assert memory.segments[0].prompt.state == (states[tail[0] - 1].tolist() if tail[0] else [0, 0, 0])
        assert (result.state == runner.stream.tracker.state).all()                          # the frame's own belief is the model's
    assert cuts >= 4


def test_an_oracle_without_the_video(tiny, truth):
    runner = start(tiny, small_strategy('summarize_with_dst', dst_file=truth[1]), video_uid='cooking')
    with pytest.raises(InputError, match='dst_file: it has no record of cooking'):
        for image in film(15, 200): runner.push(image)
    check_cache(tiny[0], runner.memory)
    with pytest.raises(InputError): small_strategy('summarize_with_dst', dst_file=truth[1] + '.gone')


def test_an_oracle_of_other_steps(tiny, truth):
    runner = start(tiny, small_strategy('summarize_with_dst', dst_file=truth[1]), names=[*NAMES, 'stir'], video_uid='sorting')
    with pytest.raises(InputError):
        for image in film(15, 200): runner.push(image)


def test_a_strategy_of_ones_own(tiny):
    "Registered, it is made by its name, with options that are checked, and streams like the others."
    @register
    class EverySecond(BaseContextStrategy):
        name = 'every_second'
        def __init__(self, max_seq_len=4096, reserved_seq_len=128, positions='rerotate', kept_frames:int=6):
            super().__init__(max_seq_len, reserved_seq_len, positions)
            self.kept_frames = kept_frames
        def compress_cache(self, context): return self.go_on(context, [context.first, *context.last_frames(2*self.kept_frames)[::2]])
    try:
        with pytest.raises(InputError, match='every_second has no such option'): small_strategy('every_second', num_frames=3)
        with pytest.raises(InputError, match='kept_frames=0'): small_strategy('every_second', kept_frames=0)
        for positions in POSITIONS:
            strategy = small_strategy('every_second', kept_frames=4, positions=positions)
            given = dict(max_seq_len=140, reserved_seq_len=30, positions=positions, kept_frames=4)
            assert strategy.settings() == dict(name='every_second') | given
            runner = start(tiny, strategy)
            for image in film(16, 60):
                if runner.push(image).dropped_tokens: assert sum(s.kind == 'frame' for s in runner.memory.segments) <= 5
                check_cache(tiny[0], runner.memory, turned=positions != 'keep')
            assert runner.stream.manager.overflows >= 3
    finally: del STRATEGIES['every_second']


def test_a_strategy_that_keeps_too_much_says_so(tiny):
    class Hoarder(BaseContextStrategy):
        name = 'hoarder'
        def compress_cache(self, context): return Continuation(context.segments, [])
    runner = start(tiny, Hoarder(120, 30))
    with pytest.raises(InputError, match='too little for what hoarder keeps'):
        for image in film(17, 100): runner.push(image)
    check_cache(tiny[0], runner.memory)


# ---- from one video to the next -----------------------------------------------------------------------------------------------------

def poison(cache, row):
    for t in cache.keys + cache.values: t[row].fill_(1e4)

def test_nothing_leaks_into_the_next_runner(tiny):
    "A second video after a first one, in a new runner; and in the row of a cache that is full of something else."
    def run(**options):
        runner = start(tiny, small_strategy('drop_middle'), **options)
        return [runner.push(image, ['Done?'] if i == 4 else ()) for i, image in enumerate(film(18, 20))]
    first = run()
    other = start(tiny, small_strategy('summarize_and_drop'), names=NAMES[::-1])
    for image in film(19, 30): other.push(image)
    assert same_bits(run(), first)
    cache = other.memory.cache
    poison(cache, 0)
    assert same_bits(run(cache=cache), first)


@pytest.mark.parametrize('moment', ['frame', 'reply', 'summary', 'poison'])
def test_a_slot_remembers_nobody(tiny, moment, monkeypatch):
    "Somebody leaves between frames, in the middle of a reply or of a summary; who comes next, and who stays, notice nothing."
    model, layout = tiny
    def fresh(): return BatchStreamRunner(model, layout, 2, cache=model.stream_cache(2, capacity=300), **FREE_BATCH)
    def come(batch): return [batch.push({'new': image})['new'] for image in film(21, 15)]
    batch = fresh()
    batch.join('stays', NAMES, GOAL, strategy=small_strategy('drop_all'))
    batch.join('leaves', NAMES[::-1], GOAL, strategy=small_strategy('summarize_and_drop'))
    stayed = [batch.push(dict(stays=a, leaves=b), dict(leaves=['Now what?']) if i == 3 else {})['stays']
              for i, (a, b) in enumerate(zip(film(20, 12), film(22, 12)))]
    stream = batch.streams['leaves']
    if moment == 'reply':
        stream.options.speak_threshold = 0.
        batch.add('leaves', picture(3), ['Hello?'])
        while not ('leaves' in batch.working and batch.working['leaves'].request.what == 'token'): batch.step()
        batch.step()
        assert 'leaves' in batch.working and stream.memory.segments[-1].kind == 'assistant'
    if moment == 'summary':
        answer = model.forward_batch
        def stop(asks, *args):
            if asks[0].memory.segments[-1].kind == 'summary' and len(asks[0].memory.segments[-1].ids) > 8: raise KeyboardInterrupt
            return answer(asks, *args)
        monkeypatch.setattr(model, 'forward_batch', stop)
        with pytest.raises(KeyboardInterrupt):
            for image in film(23, 40): batch.push(dict(leaves=image))
        monkeypatch.setattr(model, 'forward_batch', answer)
    row = stream.memory.row
    batch.leave('leaves')
    if moment == 'poison': poison(batch.cache, row)
    batch.join('new', NAMES, GOAL, strategy=small_strategy('drop_middle'))
    assert batch.streams['new'].memory.row == row and batch.cache.lengths[row] == 0
    others = fresh()
    others.join('x', NAMES); others.join('new', NAMES, GOAL, strategy=small_strategy('drop_middle'))
    same(come(batch), come(others), eps=1e-5)
    stayed += [batch.push(dict(stays=image))['stays'] for image in film(24, 10)]
    alone = start(tiny, small_strategy('drop_all'))
    same(stayed, [alone.push(image) for image in film(20, 12) + film(24, 10)])


# ---- many streams -------------------------------------------------------------------------------------------------------------------

def many_names(n):
    colours, shapes = ('red', 'blue', 'green', 'yellow'), ('circle', 'star', 'square')
    return [f'put the {c} {s} in box {b}' for c in colours for s in shapes for b in (1, 2, 3)][:n]

def some_tasks(layout, seed, count=8):
    "Streams of 1 to 30 steps under all strategies, of which the first two are equal; each with its frames (some missing) and words."
    rng, tasks = np.random.default_rng(seed), []
    ways = [('none', {}), *WAYS]
    for k in range(count):
        if k == 1: tasks.append(tasks[0]); continue
        S = int(rng.choice([1, 2, 3, 5, 30]))
        name, more = ways[(seed*7 + k) % len(ways)]
        prompt = len(layout.prompt('sort', '', many_names(S), [0]*S).ids)
        room = 8000 if name == 'none' else prompt + 160 if name == 'summarize_and_drop' else prompt + 110
        images = [None if rng.random() < .08 else image for image in film(100*seed + k, int(rng.integers(8, 26)))]
        words = {i: ['Is it done?']*int(rng.integers(1, 3)) for i in range(len(images)) if rng.random() < .1}
        options = dict(steps=many_names(S), goal='sort', tracker_options=[None, {}][k % 2], max_reply_tokens=int(rng.integers(1, 9)),
                       speak_threshold=float(rng.choice([.3, .6])), cooldown_s=float(rng.choice([0., 2.])))
        tasks.append((options, (name, room, 60, more), images, words))
    return tasks

def with_strategy(options, strategy):
    name, room, reserved, more = strategy
    return options | dict(strategy=small_strategy(name, room, reserved, **more))

def one_by_one(tiny, tasks):
    for options, strategy, images, words in tasks:
        runner = StreamRunner(*tiny, **with_strategy(options, strategy))
        yield [runner.push(image, words.get(i, ())) for i, image in enumerate(images)]

def all_together(tiny, tasks, slots, seed):
    "Every stream joins at a random time, is given its frames at random, and leaves at its end; some that are in nobody's list leave early."
    rng, batch, results, queue, given = np.random.default_rng(seed), BatchStreamRunner(*tiny, slots), {}, list(range(len(tasks))), {}
    while queue or any(k in batch.streams for k in results):
        if batch.free and queue and rng.random() < .6:
            k = queue.pop(0)
            options, strategy, *_ = tasks[k]
            batch.join(k, **with_strategy(options, strategy)); results[k], given[k] = [], 0
        if len(batch.free) > 1 and 'guest' not in batch.streams and rng.random() < .1:
            batch.join('guest', NAMES)
            for c in range(9): batch.add('guest', picture(c))
        if 'guest' in batch.streams and rng.random() < .2: batch.leave('guest')
        for k in list(batch.streams):
            while k != 'guest' and given[k] < len(tasks[k][2]) and rng.random() < .4:
                batch.add(k, tasks[k][2][given[k]], tasks[k][3].get(given[k], ())); given[k] += 1
        for k, result in batch.step():
            if k == 'guest': continue
            results[k].append(result)
            if len(results[k]) == len(tasks[k][2]): batch.leave(k)
    return [results[k] for k in range(len(tasks))]

@pytest.mark.parametrize('seed, slots', [(0, 3), (1, 5), (2, 1)])
def test_many_streams_are_as_alone(tiny, seed, slots):
    tasks = some_tasks(tiny[1], seed)
    together, alone = all_together(tiny, tasks, slots, seed), list(one_by_one(tiny, tasks))
    for a, b in zip(together, alone): same(a, b)
    assert [facts(r) for r in alone[0]] == [facts(r) for r in alone[1]]
    every = [r for rs in alone for r in rs]
    assert any(r.text for r in every) and any(r.skipped for r in every) and any(r.dropped_tokens for r in every)
    assert len({str(r.state.tolist()) for r in every}) > 8


def test_who_cannot_go_on_leaves_alone(tiny):
    "Its error comes as its result; the others' results are those of single runs, and its slot is free for another."
    batch = BatchStreamRunner(*tiny, 3, **FREE_BATCH)
    strategies = dict(ends=lambda: small_strategy('none', 110), a=lambda: small_strategy('drop_middle'), b=lambda: None)
    for k, strategy in strategies.items(): batch.join(k, NAMES, GOAL, strategy=strategy())
    for k, image in ((k, image) for image in film(25, 20) for k in strategies): batch.add(k, image)
    results = {k: [] for k in strategies}
    while batch.busy:
        for k, result in batch.step(): results[k].append(result)
    *_, error = results['ends']
    assert isinstance(error, InputError) and 'the context is full' in str(error)
    assert not any(isinstance(r, InputError) for k in strategies for r in results[k][:19] if r is not error)
    assert list(batch.streams) == ['a', 'b'] and len(batch.free) == 1
    for k in 'ab':
        runner = start(tiny, strategies[k]())
        same(results[k], [runner.push(image) for image in film(25, 20)])
    batch.join('next', NAMES, GOAL)
    runner = start(tiny)
    same([batch.push(dict(next=image))['next'] for image in film(26, 6)], [runner.push(image) for image in film(26, 6)])


def test_options_of_a_batch_may_be_any_of_a_stream(tiny):
    BatchStreamRunner(*tiny, 1, goal='sort', knowledge='').join('a', NAMES)


def test_push_loses_no_result_of_the_others(tiny):
    "One stream ends with an error in a push: whatever the others made of that frame can still be had."
    batch = BatchStreamRunner(*tiny, 2, **FREE_BATCH)
    batch.join('ends', NAMES, GOAL, strategy=small_strategy('none', 110)); batch.join('goes on', NAMES, GOAL)
    got, lost = [], 0
    for image in film(27, 14):
        keys = list(batch.streams)
        try: got.append(batch.push({k: image for k in keys})['goes on'])
        except InputError: lost += 1
        else:
            if isinstance(got[-1], InputError): lost += 1
    assert 'ends' not in batch.streams
    runner = start(tiny)
    same(got, [runner.push(image) for image in film(27, 14)])


# ---- other models -------------------------------------------------------------------------------------------------------------------

VARIANTS = dict(lm_token=dict(decision_mode='lm_token'), hidden=dict(pointer_source='hidden'), four=dict(tokens_per_frame=4),
                all=dict(decision_mode='lm_token', pointer_source='hidden', tokens_per_frame=4))
@pytest.mark.parametrize('choices', VARIANTS.values(), ids=VARIANTS)
def test_other_models_stream_exactly(choices, monkeypatch):
    "In a batch as alone, and alone as a fresh reading after every cut."
    other = model, layout = small_model(**choices)
    tasks = some_tasks(layout, 5, 4)
    alone = list(one_by_one(other, tasks))
    for a, b in zip(all_together(other, tasks, 3, 0), alone): same(a, b)
    audit = Audit(monkeypatch, model, layout)
    for name in ('summarize_with_dst', 'recent_frames'):
        runner = start(other, small_strategy(name, 180, 40))
        for image in film(28, 25): runner.push(image); check_cache(model, runner.memory)
        assert runner.stream.manager.overflows >= 2
    assert audit.worst < 1e-4 and audit.decisions == 50


def test_eager_attention_is_the_same(tiny):
    model, layout = small_model()
    tasks = some_tasks(layout, 3, 5)
    by_default = list(one_by_one((model, layout), tasks))
    model.set_attn_implementation('eager')
    for a, b, c in zip(one_by_one((model, layout), tasks), all_together((model, layout), tasks, 3, 1), by_default): same(a, c); same(b, c)
    assert model.stream_cache().adds_mask


def test_half_precision_runs():
    "In bfloat16 with heads in float32, alone and together, through cuts of every kind; all numbers are finite and no cut is missed."
    model, layout = small_model()
    model.to(torch.bfloat16).heads.float()
    for name, more in WAYS:
        runner = start((model, layout), small_strategy(name, **more))
        results = [runner.push(image) for image in film(29, 16)]
        assert runner.stream.manager.overflows and runner.memory.cache.keys[0].dtype == torch.bfloat16
        assert all(np.isfinite(numbers(r)).all() and abs(r.state_probs.sum(1) - 1).max() < 1e-5 for r in results)
        assert runner.memory.length + runner.memory.unread == len(ids_in(runner.memory))
    tasks = some_tasks(layout, 4, 3)
    for results, (*_, images, _) in zip(all_together((model, layout), tasks, 2, 0), tasks): assert len(results) == len(images)


# ---- the report ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_report_in_a_process(tmp_path):
    "Every strategy in every way, and those that rebuild are exact."
    argv = [sys.executable, '-m', 'dst_smolvlm.cache', 'report', '--json', str(tmp_path/'report.json'), 'model.hidden_size=32',
            'model.layers=2', 'model.vision_size=32']
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'), timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path/'report.json').read_text())
    rows = {(r['strategy'], r['positions'], r['cuts']): r for r in report['rows']}
    expected = {(name, more.get('positions', 'recompute'), cuts) for name, more in WAYS for cuts in (1, 3, 10)}
    real = lambda keys: {k for k in keys if k[0] != 'drop_all' or k[1] == 'recompute'}
    assert real(rows) == real(expected)
    for (name, positions, _), row in rows.items():
        exact = positions == 'recompute' or name == 'drop_all'
        if exact: assert max(row['words'], row['decisions']) <= 1e-4, row
        assert name in done.stdout
    assert max(r['words'] for r in report['rows'] if r['positions'] != 'recompute') > 1e-3      # else it measures nothing
    assert environment().keys() <= report.keys() and set(report['key_drift_bf16']) == {'1', '10', '100'}


@pytest.mark.parametrize('argv, said', [([], 'report is the only thing'), (['report', '--json'], '--json: its value is missing')])
def test_a_report_that_cannot_be(argv, said, capsys):
    from dst_smolvlm.cache import main
    with pytest.raises(SystemExit) as stopped: main(argv)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
