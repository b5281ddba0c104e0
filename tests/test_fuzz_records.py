"""Whatever stands in a file, reading it gives good records or RecordErrors that name the file; never another exception, never a hang.

Inputs in `make test`: 1200 values put into the seeds of all formats, 700 seeds and 1500 real files with spoilt bytes (where they
are at hand), 360 archives and compressed files, 300 of noise."""
import gzip, io, json, os, random, signal, tarfile, zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from seeds import FORMATS, OBJECTS, seed_text

from dst_smolvlm.data.ingest import POLICIES, read_entries
from dst_smolvlm.data.ingest_summary import check
from dst_smolvlm.data.readers import LEVELS
from dst_smolvlm.data.readers_tables import COMPANIONS
from dst_smolvlm.data.schema import RecordError, VideoRecord

REAL = Path(os.environ.get('DST_REAL', Path(__file__).resolve().parents[2]/'shared'/'real'))


@contextmanager
def no_hang(seconds=60):
    "Stops what takes longer. No input here is large; reading one takes milliseconds."
    def stop(*_): raise TimeoutError(f'still reading after {seconds} s')
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, before)


def examine(path, level='step', policy='strict'):
    "Read a file, and hold every entry to what is promised of it; → the number of good records."
    good = 0
    lengths = {'tea': 3., 'toy': 2., 'lamp': 9.} if policy != 'strict' else {}
    with no_hang(): entries = list(read_entries(path, level, lengths, policy, look=True))
    for entry in entries:
        for p in entry.problems:
            assert isinstance(p, RecordError) and '\n' not in str(p) and p.file.startswith(str(path)) and p.why and p.kind
            json.dumps(p.to_dict())
        errors = [p for p in entry.problems if not p.warning]
        if entry.record is None: assert entry.problems or entry.format in COMPANIONS
        else:
            record, good = entry.record, good + 1
            assert not errors and (record.steps or record.turns) and record.duration > 0
            assert VideoRecord.from_json(record.to_json()) == record
            frames = min(record.num_frames(1), 50)
            states = record.states(1, frames)
            assert states.shape == (frames, len(record.steps)) and set(states.ravel().tolist()) <= {0, 1, 2}
            record.turns_at()
    return good


@pytest.mark.parametrize('name', FORMATS)
def test_good_seeds(tmp_path, name):
    (tmp_path/name).write_text(seed_text(name), encoding='utf-8')
    assert examine(tmp_path/name) >= 1
    assert {e.format for e in read_entries(tmp_path/name)} == {FORMATS[name]}


def places(data, path=()):
    "Every path into a JSON value."
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children: yield from ([*path, key], *places(value, (*path, key)))


def put(data, path, value):
    "A copy of `data` with `value` at `path`, or with the last key of the path gone where `value` is `...`."
    data = json.loads(json.dumps(data))
    *parents, last = path
    at = data
    for key in parents: at = at[key]
    if value is ...: del at[last]
    else: at[last] = value
    return data


scalars = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(...)
           | st.sampled_from([10**400, -10**400, 1.7e308, -1, 0, '', 'S1', 'step', '9'*5000, '\ud800', 'a\nb', '1e999', '00:00:99']))
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                        max_leaves=4)
thorough = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def anything_anywhere(tmp_path, data):
    name = data.draw(st.sampled_from(sorted(OBJECTS)))
    spoilt = OBJECTS[name]
    for _ in range(data.draw(st.integers(1, 2))):
        where = list(places(spoilt))
        if where: spoilt = put(spoilt, data.draw(st.sampled_from(where)), data.draw(anything.filter(serialisable)))
    (tmp_path/name).write_text(json.dumps(spoilt))
    examine(tmp_path/name, data.draw(st.sampled_from(LEVELS)), data.draw(st.sampled_from(POLICIES)))


def serialisable(value) -> bool:
    "An ellipsis means that a key is taken away; inside a list it is no JSON."
    if value is ...: return True
    try: json.dumps(value)
    except TypeError: return False
    return True


@settings(max_examples=1200, **thorough)
@given(st.data())
def test_anything_anywhere(tmp_path, data): anything_anywhere(tmp_path, data)


@pytest.mark.slow
@settings(max_examples=30_000, **thorough)
@given(st.data())
def test_anything_anywhere_long(tmp_path, data): anything_anywhere(tmp_path, data)


SPLICES = [b'', b'\x00', b'\xff\xfe', b'"', b'{', b'[', b']}', b'-', b'1e999', b'NaN', b'null', b'\n', b'\t', b',', b'9'*400,
           b'"dst": [', b'\\ud800', b'[[[[' * 2000]

def spoil(content: bytes, rng: random.Random) -> bytes:
    "A few bytes of `content` flipped, removed, doubled, moved, or replaced; or its end cut off."
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        a = rng.randrange(len(content) + 1)
        b = min(len(content), a + rng.choice([0, 1, 1, 4, 40, 400]))
        match rng.randrange(6):
            case 0 if a < len(content): content[a] ^= 1 << rng.randrange(8)
            case 1: del content[a:b]
            case 2: content[a:a] = content[a:b]
            case 3: content[a:b] = rng.choice(SPLICES)
            case 4: del content[a:]
            case _: c = rng.randrange(len(content) + 1); content[a:b] = content[c:c + 40]
    return bytes(content)


def real_files() -> list[tuple[str, bytes]]:
    "Real annotation files of every kind; of the largest ones the beginning, made whole again, would be another file, so they are few."
    if not REAL.is_dir(): pytest.skip(f'skipped: no real annotations at {REAL}')
    files = [p for p in sorted(REAL.rglob('*')) if p.suffix in ('.json', '.jsonl', '.txt', '.csv') and 'statistics' not in p.name]
    few = {p.parent: [] for p in files}
    for p in files: few[p.parent].append(p)
    return [(p.name, p.read_bytes()) for ps in few.values() for p in ps[:10]]


def spoil_files(tmp_path, files, inputs, seed=0):
    "Read `inputs` spoilt files, and say how many good records were left in them."
    rng, good = random.Random(seed), 0
    weights = [1/(100_000 + len(content)) for _, content in files]                # a large one takes a hundred times as long
    for i in range(inputs):
        [(name, content)] = rng.choices(files, weights)
        spoilt = spoil(content, rng)
        (tmp_path/name).write_bytes(spoilt)
        try: good += examine(tmp_path/name, rng.choice(LEVELS), rng.choice(POLICIES))
        except Exception as e: raise AssertionError(f'input {i} of seed {seed}, {name}: {e!r}') from e
        (tmp_path/name).unlink()
    return good


def test_spoilt_seeds(tmp_path):
    seeds = [(name, seed_text(name).encode()) for name in FORMATS]
    assert spoil_files(tmp_path, seeds, 700) > 70       # some are still good, or nothing was tested but JSON's parser


def test_spoilt_real_files(tmp_path): assert spoil_files(tmp_path, real_files(), 1500) > 300


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(10))
def test_spoilt_files_long(tmp_path, seed):
    spoil_files(tmp_path, [(name, seed_text(name).encode()) for name in FORMATS] + real_files(), 3000, seed + 1)


def packed(path, names=FORMATS):
    "An archive, or a compressed file, of the seeds."
    if path.suffix == '.gz' and '.tar' not in path.name: path.write_bytes(gzip.compress(seed_text(path.stem).encode())); return
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
            for name in names: z.writestr(f'labels/{name}', seed_text(name))
        return
    with tarfile.open(path, 'w' if path.suffix == '.tar' else 'w:gz') as t:
        for name in names:
            member = tarfile.TarInfo(f'labels/{name}')
            member.size = len(content := seed_text(name).encode())
            t.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tgz', 'epic.csv.gz', 'a.jsonl.gz', 'dst.json.gz'])
def test_spoilt_archives(tmp_path, name):
    "An archive is binary: its directory, its checksums and its compressed bytes may all be wrong."
    packed(tmp_path/name)
    assert examine(tmp_path/name) >= (1 if name.endswith('.gz') else len(FORMATS))
    rng, content = random.Random(0), (tmp_path/name).read_bytes()
    for _ in range(60):
        (tmp_path/name).write_bytes(spoil(content, rng))
        examine(tmp_path/name)


@example('a.json', b'\xef\xbb\xbf{}').via('a byte order mark')
@example('a.csv', b'video_id,start_timestamp,stop_timestamp\n' + b'a'*200_000)
@example('a.tsv', b'type\tid\tstart_ts\tend_ts\tname\nstep\tS1\t1\t2\ta\x00b\n')
@settings(max_examples=300, **thorough)
@given(st.sampled_from(['a.json', 'a.jsonl', 'a.tsv', 'a.csv', 'a.txt', 'a.zip', 'a.tar', 'a.tgz', 'a.csv.gz']), st.binary(max_size=200))
def test_noise(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    examine(tmp_path/name)


def peak(path) -> tuple[int, int]:
    "(most bytes that Python held at a time, number of problems) while a file was checked."
    import tracemalloc
    tracemalloc.start()
    summary = check(read_entries(path), path.with_suffix('.report'))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most, sum(summary.kinds.values())


def lines(n: int, good: bool) -> str:
    record = json.loads(seed_text('a.jsonl')) | {'knowledge': 'Boil water. '*200}
    return ''.join(json.dumps(record | {'video_uid': f'v{i}', 'duration': 6. if good else 1.}) + '\n' for i in range(n))


@pytest.mark.parametrize('good', [True, False])
def test_a_large_file_takes_no_more_memory(tmp_path, good):
    "Ten times as many lines, good or bad, must not take more memory than their names do."
    peaks = []
    for n in (300, 3000):
        (tmp_path/'a.jsonl').write_text(lines(n, good))
        most, problems = peak(tmp_path/'a.jsonl')
        assert problems == (0 if good else n)
        peaks.append(most)
    assert peaks[1] - peaks[0] < 3000*400, peaks                                   # a line holds 2.6 KB


def test_one_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr('dst_smolvlm.data.files.LONGEST_LINE', 10_000)
    (tmp_path/'a.jsonl').write_text(lines(1, True) + '{"a": "' + 'x'*1_000_000 + '"}\n' + lines(2, True).split('\n')[1])
    entries = list(read_entries(tmp_path/'a.jsonl'))
    assert [bool(e.record) for e in entries] == [True, False, True] and 'line 2: longer than' in str(entries[1].problems[0])
