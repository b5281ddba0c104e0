"Files of strangers as they come: re-saved by spreadsheets, compressed, packed on a Mac, in UTF-16, cut off; and what is said of each."
import csv, gzip, io, json, os, random, tarfile, zipfile
from pathlib import Path

import pytest
from seeds import COOKING, DST, EGOEXO, EPIC, GOALSTEP, HOLOASSIST, MISTAKES, NATIVE, PREPARED, TABLE
from test_fuzz_records import put

from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.data.delimited import read_header, read_table, split_lines
from dst_smolvlm.data.ingest import read_entries
from dst_smolvlm.data.loading import load_records, read_records
from dst_smolvlm.data.schema import RecordError
from dst_smolvlm.records import main

CASES = Path(os.environ.get('DST_CASES', Path(__file__).resolve().parents[2]/'shared'/'cases'))


def case(name: str) -> Path:
    if not (CASES/name).exists(): pytest.skip(f'skipped: {CASES/name} not found')
    return CASES/name


def command(*argv) -> int:
    "The exit status of `python -m dst_smolvlm.records`."
    try: main([str(a) for a in argv])
    except SystemExit as e: return e.code
    return 0


def one(path, **options):
    "The only recording at a path, and the kinds of what is said of it."
    [entry] = read_entries(path, **options)
    return entry.record, [p.kind for p in entry.problems]


def names(record): return [(s.name, s.spans) for s in record.steps]


def said(path, **options): return [str(p) for e in read_entries(path, **options) for p in e.problems]


DOOR = [('open door', [(1., 2.5)]), ('take plate', [(3., 4.5)])]


# ---- tables ----

@pytest.mark.parametrize('mark', ['u2028', 'u0085', 'ff', 'vt', 'x1c'])
def test_a_separator_in_a_cell_is_no_line_end(mark):
    record, kinds = one(case('epic-unicode-separators')/f'EPIC_100_{mark}.csv')
    assert record.video_uid == 'P90_01' and names(record) == DOOR and kinds == ['no duration']


def test_a_cell_over_two_lines():
    record, _ = one(case('epic-quoted-newline')/'EPIC_100_mine.csv')
    assert names(record) == [('open door', [(1., 2.5)]), ('take the blue plate', [(3., 4.5)]), ('close door', [(5., 6.5)])]


@pytest.mark.parametrize('words', [
    'take\nsalt, pepper, oil, vinegar',
    'salt, pepper, oil, vinegar\ntake', 'take\n1, 2, 3, 4\nthen,go,on,now', '"one",\r\n"two, or three"'],
    ids=['list', 'list-first', 'three-lines', 'quotes'])
def test_a_cell_over_lines_that_have_the_commas_of_a_row(tmp_path, words):
    rows = [['P1', '0:00:01', '0:00:02', words], ['P1', '0:00:03', '0:00:04', 'stir']]
    with open(tmp_path/'EPIC_100_mine.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['video_id', 'start_timestamp', 'stop_timestamp', 'narration'], *rows])
    record, kinds = one(tmp_path/'EPIC_100_mine.csv')
    assert record.video_uid == 'P1' and [s.spans for s in record.steps] == [[(1., 2.)], [(3., 4.)]] and kinds == ['no duration']
    assert record.steps[0].name.split() == words.split()


def test_a_quote_that_is_never_closed_takes_no_row_with_it(tmp_path):
    "Nor if another one comes later."
    rows = ['P1,0:00:01,0:00:02,"take', 'P1,0:00:03,0:00:04,stir', 'P1,0:00:05,0:00:06,pour"', 'P1,0:00:07,0:00:08,salt']
    (tmp_path/'EPIC_100_mine.csv').write_text('\n'.join(['video_id,start_timestamp,stop_timestamp,narration', *rows, '']))
    [entry] = read_entries(tmp_path/'EPIC_100_mine.csv', policy='skip')
    assert entry.record is None and 'a quote is not closed' in str(entry.problems[0])


def test_semicolons_and_decimal_commas(): assert names(one(case('epic-semicolons')/'EPIC_100_mine.csv')[0]) == DOOR[:1]


def test_lengths_in_quotes():
    "The file is also cut off within its last row, which is an error by itself."
    whole, half, companion = read_entries(case('epic-video-info-bom'))
    assert whole.record.duration == 60.5 and whole.problems == [] and names(whole.record) == DOOR[:1]
    assert half.record is None and 'P90_01: line 3: 9 fields, the header has 15; is the file cut off here?' in str(half.problems[0])
    assert companion.format == 'lengths of EPIC-KITCHENS-100'


def test_another_dataset_is_named_for_what_it_is(tmp_path, capsys):
    path = case('epic-sounds')/'EPIC_Sounds_mine.csv'
    [entry] = read_entries(path)
    assert entry.problems[0].why.startswith('not EPIC-KITCHENS-100: the column narration is missing; there are columns class, description')
    assert command('check', path) == 1 and 'withheld' not in capsys.readouterr().out


def resaved(text: str, delimiter=',', newline='\r\n', quote=True, encoding='utf-8', decimal='.') -> bytes:
    "A table as a spreadsheet saves it."
    rows = [line.split('\t' if '\t' in text else ',') for line in text.strip().split('\n')]
    cell = lambda c: c.replace('.', decimal) if c.replace('.', '').replace(':', '').isdigit() else c
    write = lambda c: '"' + cell(c).replace('"', '""') + '"' if quote else cell(c)
    return newline.join([*(delimiter.join(map(write, row)) for row in rows), '']).encode(encoding)


@pytest.mark.parametrize('newline', ['\r\n', '\n', '\r'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
@pytest.mark.parametrize('delimiter, decimal', [(',', '.'), (';', ','), (';', '.'), ('\t', ',')])
def test_tables_as_spreadsheets_save_them(tmp_path, delimiter, decimal, newline, encoding):
    "Every table reads as it does in its published form."
    mistakes = MISTAKES.replace("shouldn't have happened", 'in the wrong order')
    for name, text in (('epic.csv', EPIC), ('table.tsv', TABLE), ('mistakes.csv', mistakes)):
        (tmp_path/name).write_text(text)
        published = [e.record for e in read_entries(tmp_path/name)]
        (tmp_path/name).write_bytes(resaved(text, delimiter, newline, True, encoding, decimal))
        assert [e.record for e in read_entries(tmp_path/name)] == published and all(published), name


@pytest.mark.parametrize('mark', ['\u2028', '\u2029', '\x85', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e'])
def test_no_other_character_ends_a_row(tmp_path, mark):
    texts = {'epic.csv': EPIC.replace('open door,open', f'open{mark}door,open'),
             'table.tsv': TABLE.replace('Attach interior and', f'Attach interior{mark}and'),
             'coarse.txt': f'1\t2\tattach{mark}wheel\n3\t4\tattach wheel\n'}
    for name, text in texts.items():
        (tmp_path/name).write_text(text, encoding='utf-8')
        entries = list(read_entries(tmp_path/name))
        assert all(e.record for e in entries), name
        assert len(entries) == (2 if name == 'epic.csv' else 1)
    assert sum(len(s.spans) for s in one(tmp_path/'coarse.txt')[0].steps) == 2


HEADER, *ROWS = EPIC.strip().split('\n')
LONG = '\n'.join([HEADER, *(f'P{v}_{i},P{v},P{v},0,00:00:0{i}.00,00:00:0{i}.50,1,2,stir pot {i},stir'
                            for v in (1, 2, 3) for i in range(4)), ''])


@pytest.fixture
def rows_of(tmp_path):
    "A function from a table of EPIC to the number of steps of each recording, or its error."
    def read(text: str) -> dict[str, object]:
        (tmp_path/'epic.csv').write_text(text)
        return {e.record.video_uid if e.record else e.problems[-1].record: len(e.record.steps) if e.record else str(e.problems[-1])
                for e in read_entries(tmp_path/'epic.csv')}
    return read


def test_a_quote_that_is_never_closed_swallows_nothing(rows_of):
    "Opened in one row, it spoils the recording of that row; the rows after it are read, whatever quotes they hold."
    for other in ('stir pot 2', '"stir, pot 2"', '"stir ""the"" pot"'):
        found = rows_of(LONG.replace('stir pot 1', '"stir pot 1', 1).replace('stir pot 2', other))
        assert found['P2'] == found['P3'] == 4 and 'line 3: not a row of a table' in found['P1'], other
    for closing in ('stir pot 2",stir', 'stir pot 3",stir'):             # and where another row has one too many at the end of a cell
        found = rows_of(LONG.replace('stir pot 1', '"stir pot 1', 1).replace(closing.replace('"', ''), closing, 1))
        assert found['P2'] == found['P3'] == 4 and 'line 3: not a row of a table (a quote is not closed)' in found['P1']


def test_lines_are_counted_through_cells_with_line_breaks(rows_of):
    text = LONG.replace('stir pot 0', '"stir\nthe\r\npot 0"', 1).replace('00:00:02.50', 'soon', 1)
    assert 'line 6.stop_timestamp' in rows_of(text)['P1']


@pytest.mark.parametrize('cut', range(1, 120, 3))
def test_a_file_that_is_cut_off_gives_no_half_name(tmp_path, cut):
    "Half a row is an error that names the line; all whole rows are read. (Half of a last field looks whole, but it is no name.)"
    text = LONG[:-cut]
    path = tmp_path/'epic.csv'
    path.write_text(text)
    whole = [row for row in text.split('\n')[1:] if row.count(',') == 9]
    half = [n for n, row in enumerate(text.split('\n'), 1) if 0 < row.count(',') < 9 or row and ',' not in row]
    entries = list(read_entries(path))
    assert sum(len(e.record.steps) for e in entries if e.record) == len(whole)
    assert {s.name for e in entries if e.record for s in e.record.steps} == {f'stir pot {i}' for i in range(4)}
    errors = [p for e in entries for p in e.problems if not p.warning]
    assert [p.field for p in errors] == [f'line {n}' for n in half] and all('is the file cut off here?' in p.why for p in errors)
    if half:
        with pytest.raises(RecordError, match=f'line {half[0]}'): read_records(path)
        with pytest.warns(UserWarning, match='left out'): assert {'P1', 'P2'} <= {r.video_uid for r in read_records(path, policy='skip')}


def test_half_a_quoted_cell_at_the_end(rows_of):
    "With a line end behind it, it is a row of its recording; else the end of the file."
    for end in ('', '\n'):
        found = rows_of(LONG[:-len('stir pot 3,stir\n')] + '"stir po' + end)
        assert (found['P1'], found['P2']) == (4, 4) and 'line 13: not a row of a table (a quote is not closed)' in found['P3']


def test_columns_without_a_name_and_empty_columns(tmp_path):
    "An index column as pandas writes it, and the empty columns that spreadsheets leave behind."
    text = '\n'.join(f'{i or ""},{line},,' for i, line in enumerate(EPIC.strip().split('\n'))) + '\n,,,,,,,,,,,,\n'
    (tmp_path/'epic.csv').write_text(text)
    assert [r.steps[0].name for r in read_records(tmp_path/'epic.csv')] == ['open door', 'take plate']


def test_zero_bytes_spoil_their_row(rows_of):
    found = rows_of(LONG.replace('stir pot 1', 'stir\0pot', 1))
    assert 'line 3: holds zero bytes' in found['P1'] and found['P2'] == 4


def test_names_at_the_end_of_a_file_without_a_line_end(tmp_path):
    "A file that was cut off within its last name reads like a whole one; it is said that it may be."
    for name, text in (('table.tsv', TABLE), ('coarse.txt', '1\t2\tattach wheel\n3\t4\tattach cabin\n')):
        (tmp_path/name).write_text(text[:-3])
        record, kinds = one(tmp_path/name)
        assert record and 'no line end' in kinds
        (tmp_path/name).write_text(text)
        assert 'no line end' not in one(tmp_path/name)[1]


@pytest.mark.parametrize('columns, why', [
    ('video_id,start_timestamp,stop_timestamp,verb,noun', 'the column narration is missing; there are columns verb, noun'),
    ('video,start_frame,end_frame,action', 'not Assembly101 fine: the column action_cls is missing; there is a column action'),
    ('type,id,start,end,name', 'not step table: the columns start_ts, end_ts are missing; there are columns start, end'),
    ('video_id,start,stop,narration', 'not EPIC-KITCHENS-100: the columns start_timestamp, stop_timestamp are missing'),
    ('date,price', 'no annotation of a known format')])
def test_a_table_that_is_nearly_one(tmp_path, columns, why):
    (tmp_path/'a.csv').write_text(f'{columns}\n{",".join("1"*len(columns.split(",")))}\n')
    assert why in said(tmp_path/'a.csv')[0]


def test_what_csv_writes_is_read_or_refused():
    "Cells of quotes, delimiters and line breaks, in few columns: now and then they look like rows. Then a row is wrong, never another."
    rng, refused = random.Random(1), 0
    letters = 'a', 'b', '"', ',', ';', '\n', '\u2028', '\x0c', ' ', 'é'
    cell = lambda: ''.join(rng.choices(letters, k=rng.randint(1, 6))).strip() or 'z'
    for _ in range(1000):
        columns = [f'c{i}' for i in range(rng.randint(2, 6))]
        rows = [[cell() for _ in columns] for _ in range(rng.randint(1, 6))]
        text = io.StringIO(newline='')
        csv.writer(text, lineterminator=rng.choice(['\n', '\r\n'])).writerows([columns, *rows])
        table = read_table(lines := split_lines(text.getvalue()), *read_header(lines))
        wrong = any('' in row for _, row in table.rows)
        refused += wrong
        assert wrong or [[row[c] for c in columns] for _, row in table.rows] == rows
    assert refused < 100


# ---- compressed, archived, from a Mac ----

def test_published_archives():
    [entry] = read_entries(case('compressed')/'coarse_annotations.tar.gz')
    [line] = read_entries(case('compressed')/'records.jsonl.gz')
    with tarfile.open(CASES/'compressed'/'coarse_annotations.tar.gz') as t:
        [span] = json.load(t.extractfile('coarse/0001.json'))
    read = entry.record
    assert (read.video_uid, read.steps[0].spans, read.duration) == ('0001', [(span['start'], span['end'])], span['duration'])
    assert line.record.video_uid == 'tea' and line.record.steps[0].spans == [(1., 3.)]
    assert len(read_records(CASES/'compressed')) == 2


def test_what_a_mac_leaves_is_skipped():
    *entries, skipped = read_entries(case('mac-zip')/'labels.zip')
    assert [bool(e.record) for e in entries] == [True]
    assert '__MACOSX/labels/._tea.jsonl' in str(skipped.problems[0]) and skipped.problems[0].warning
    *entries, skipped = read_entries(case('mac-disk')/'labels')
    assert [e.record.video_uid for e in entries] == ['P90_01'] and skipped.problems[0].kind == 'skipped'
    assert command('check', CASES/'mac-disk'/'labels') == command('check', CASES/'mac-zip'/'labels.zip') == 0


def archive(path: Path, files: dict[str, bytes]):
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
            for name, content in files.items(): z.writestr(name, content)
        return
    with tarfile.open(path, 'w' if path.suffix == '.tar' else 'w:gz') as t:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            t.addfile(member, io.BytesIO(content))


INFO = b'video_id,duration,fps,resolution\nP01_01,60.5,50,1x1\nP01_102,70,50,1x1\n'

@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tar.gz', 'a.TGZ', 'folder'])
@pytest.mark.parametrize('pack', [False, True])
def test_an_archive_reads_as_the_folder_does(tmp_path, name, pack):
    "With companions beside the files, compressed or not, and a Mac's twins and other hidden files among them."
    files = {'data/EPIC_100_train.csv': EPIC.encode(), 'data/EPIC_100_video_info.csv': INFO, 'data/notes.md': b'read me',
             'data/goal/a.json': json.dumps(GOALSTEP).encode(), 'data/a.jsonl': json.dumps(NATIVE).encode(), 'data/b.tsv': TABLE.encode()}
    if pack: files = {f'{n}.gz': gzip.compress(content) for n, content in files.items()}
    twins = {'__MACOSX/data/._a.jsonl': b'\0\5\x16\7', 'data/._b.tsv': b'\0\5\x16\7', 'data/.ipynb_checkpoints/a.jsonl': b'{'}
    if name == 'folder':
        for n, content in (files | twins).items():
            (tmp_path/name/n).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/name/n).write_bytes(content)
    else: archive(tmp_path/name, files | twins)
    entries = list(read_entries(tmp_path/name))
    records = {e.record.video_uid: e.record for e in entries if e.record}
    assert sorted(records) == ['P01_01', 'P01_102', 'b', 'grp-1', 'tea'] and records['P01_01'].duration == 60.5
    warned = [p for e in entries for p in e.problems if p.kind == 'skipped']
    assert len(warned) == 1 and warned[0].why.startswith('3 files in it are not read')
    assert all(p.warning for e in entries for p in e.problems)


@pytest.mark.parametrize('name, text', [('a.json', json.dumps(DST)), ('a.jsonl', json.dumps(NATIVE)), ('a.csv', EPIC), ('a.tsv', TABLE),
                                        ('a.txt', MISTAKES)])
def test_a_compressed_file_alone(tmp_path, name, text):
    (tmp_path/name).write_text(text)
    plain = [r.model_dump() for r in read_records(tmp_path/name)]
    (tmp_path/name).unlink()
    (tmp_path/f'{name}.gz').write_bytes(gzip.compress(text.encode()))
    assert [r.model_dump() for r in read_records(tmp_path/f'{name}.gz')] == plain == [r.model_dump() for r in read_records(tmp_path)]
    (tmp_path/f'{name}.gz').write_bytes(gzip.compress(text.encode())[:-12])
    with pytest.raises(RecordError, match=rf'{name}.gz: not (a )?readable'): read_records(tmp_path/f'{name}.gz')


@pytest.mark.parametrize('name', ['a.tgz', 'a.tar', 'a.zip'])
def test_a_broken_archive_does_not_end_its_folder(tmp_path, name):
    archive(tmp_path/name, {'a.jsonl': json.dumps(NATIVE).encode(), 'b.json': os.urandom(5000)})
    (tmp_path/name).write_bytes((tmp_path/name).read_bytes()[:-3000])
    (tmp_path/'z.json').write_text(json.dumps(DST))
    entries = list(read_entries(tmp_path))
    errors = [p.file for e in entries for p in e.problems if not p.warning]
    assert entries[-1].record.video_uid == 'toy' and errors and all(file.startswith(str(tmp_path/name)) for file in errors)


def test_links_and_paths_that_lead_out_of_an_archive(tmp_path):
    secret = tmp_path/'secret.json'
    secret.write_text(json.dumps(DST))
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        for name, kind, to in (('link.json', tarfile.SYMTYPE, str(secret)), ('hard.json', tarfile.LNKTYPE, '../secret.json'),
                               ('pipe.json', tarfile.FIFOTYPE, ''), ('device.json', tarfile.CHRTYPE, '')):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, to
            t.addfile(member)
        for name in ('/abs.json', '../up.json', 'good.json'): t.add(secret, name)
        absolute = tarfile.TarInfo('/etc/abs.json')
        absolute.size = 2
        t.addfile(absolute, io.BytesIO(b'{}'))
    *entries, skipped = read_entries(tmp_path/'a.tar')
    assert [Path(e.file).name for e in entries] == ['abs.json', 'good.json']                      # add() takes the / away
    assert skipped.problems[0].why.startswith('6 files in it are not read')


THREE = {f'labels/{name}.jsonl': json.dumps(NATIVE | {'video_uid': name}).encode() for name in 'abc'}

def outcome(path) -> tuple[list[str], list[str]]:
    "The recordings that are read, and the errors."
    entries = list(read_entries(path))
    return [e.record.video_uid for e in entries if e.record], [str(p) for e in entries for p in e.problems if not p.warning]


@pytest.mark.parametrize('pack', [False, True], ids=['tar', 'tgz'])
@pytest.mark.parametrize('cut', [512, 1023, 1024, 1025, 1300, 1536, 2048, 2500, 3072])
def test_half_a_tar_archive_is_no_smaller_one(tmp_path, cut, pack):
    "Each member is a header and a block. Wherever it ends before all of them are there, or right behind the last, that is an error."
    archive(tmp_path/'a.tar', THREE)
    content = (tmp_path/'a.tar').read_bytes()
    assert content[3072:3584] == bytes(512) != content[2560:3072]
    path = tmp_path/('a.tgz' if pack else 'a.tar')
    path.write_bytes(gzip.compress(content[:cut]) if pack else content[:cut])
    read, errors = outcome(path)
    assert (read, len(errors)) == ([], 1) and errors[0].startswith(f'{path}: not a readable archive')
    path.write_bytes(gzip.compress(content) if pack else content)
    assert outcome(path) == (['a', 'b', 'c'], [])


@pytest.mark.parametrize('at', [1024, 1024 + 130, 2048 + 150])
def test_a_damaged_header_in_a_tar_archive(tmp_path, at):
    archive(tmp_path/'a.tar', THREE)
    content = bytearray((tmp_path/'a.tar').read_bytes())
    content[at] ^= 1
    (tmp_path/'a.tar').write_bytes(content)
    read, errors = outcome(tmp_path/'a.tar')
    assert read == [] and f'damaged or cut off at byte {at//512*512}' in errors[0]


@pytest.mark.parametrize('name', ['a.tar', 'a.tgz'])
def test_tar_archives_one_behind_the_other_are_one(tmp_path, name):
    (first, a), *others = THREE.items()
    archive(tmp_path/name, {first: a})
    one = (tmp_path/name).read_bytes()
    archive(tmp_path/name, dict(others))
    (tmp_path/name).write_bytes(one + (tmp_path/name).read_bytes())
    assert outcome(tmp_path/name) == (['a', 'b', 'c'], [])
    (tmp_path/name).write_bytes(one*2)
    assert 'holds labels/a.jsonl more than once' in outcome(tmp_path/name)[1][0]


def test_two_members_by_one_name_and_two_zip_archives_in_one(tmp_path):
    with pytest.warns(UserWarning, match='Duplicate name'), zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        for content in THREE.values(): z.writestr('a.jsonl', content)
    read, errors = outcome(tmp_path/'a.zip')
    assert read == [] and f'{tmp_path}/a.zip: not a readable archive (holds a.jsonl more than once' in errors[0]
    archive(tmp_path/'a.zip', THREE)
    archive(tmp_path/'b.zip', {'b.jsonl': json.dumps(NATIVE).encode()})
    (tmp_path/'a.zip').write_bytes((tmp_path/'a.zip').read_bytes() + (tmp_path/'b.zip').read_bytes())
    assert 'belongs to another archive' in outcome(tmp_path/'a.zip')[1][0]
    (tmp_path/'b.zip').write_bytes(b'#!/bin/sh\n' + (tmp_path/'b.zip').read_bytes())             # one that unpacks itself
    assert outcome(tmp_path/'b.zip') == (['tea'], [])


@pytest.mark.parametrize('name', ['a.tgz', 'a.tar', 'a.zip'])
@pytest.mark.parametrize('before', ['./', './data/', 'data/./', 'data\\'], ids=['dot', 'dot-data', 'data-dot', 'windows'])
def test_companions_in_an_archive_of_a_folder(tmp_path, name, before):
    "As `tar czf labels.tgz .` names its members, and some programs on Windows."
    archive(tmp_path/name, {f'{before}EPIC_100_train.csv': EPIC.encode(), f'{before}EPIC_100_video_info.csv': INFO})
    assert [e.record.duration for e in read_entries(tmp_path/name) if e.record] == [60.5, 70.]


def test_bombs_are_refused_by_name(tmp_path, monkeypatch):
    for limit in ('LARGEST_UNPACKED', 'ALWAYS_ALLOWED'): monkeypatch.setattr(f'dst_smolvlm.core.archives.{limit}', 2**20)
    zeros = b' '*(3 << 20)
    (tmp_path/'a.json.gz').write_bytes(gzip.compress(zeros))
    (tmp_path/'b.jsonl.gz').write_bytes(gzip.compress(zeros))
    archive(tmp_path/'c.tgz', {'c.json': zeros})
    archive(tmp_path/'d.zip', {f'{i}.json': zeros[:2**19] for i in range(4)})           # each is small enough, all together are not
    archive(tmp_path/'e.tar', {'e.csv.gz': gzip.compress(zeros)})
    for path in sorted(tmp_path.iterdir()):
        assert any('unpacks to more than 1 MiB' in line and line.startswith(str(path)) for line in said(path)), path


def test_a_large_compressed_file_takes_no_memory(tmp_path):
    import tracemalloc
    line = json.dumps(NATIVE | {'knowledge': 'Boil. '*2000})
    with gzip.open(tmp_path/'a.jsonl.gz', 'wt') as f: f.writelines(line.replace('tea', f'tea{i}', 1) + '\n' for i in range(1000))    # 12 MB
    tracemalloc.start()
    assert sum(bool(e.record) for e in read_entries(tmp_path/'a.jsonl.gz')) == 1000
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


# ---- encodings ----

def test_utf16_as_powershell_writes_it():
    record, _ = one(case('utf16')/'a.json')
    assert record.video_uid == 'a' and record.steps[0].name == 'boil' and record.steps[0].spans[0][0] == 1.


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-le'])
def test_json_in_any_unicode(tmp_path, encoding):
    tea = NATIVE | {'goal': 'Tee für 🍵\u2028heiß'}
    lines = [json.dumps(tea | {'video_uid': uid}, ensure_ascii=False) for uid in ('a', 'b', '')]
    (tmp_path/'a.jsonl').write_bytes('\r\n'.join(lines).encode(encoding))
    entries = list(read_entries(tmp_path/'a.jsonl'))
    assert [e.record and e.record.goal for e in entries] == [tea['goal']]*2 + [None] and 'line 3: video_uid' in str(entries[2].problems[0])
    (tmp_path/'a.json').write_bytes(json.dumps(DST, ensure_ascii=False).encode(encoding))
    assert one(tmp_path/'a.json')[0].goal == 'Assemble a toy'


def test_what_is_no_text_is_said_to_be_what_it_looks_like(tmp_path):
    for content, why in ((gzip.compress(b'{}' * 99), 'gzip'), (b'\xff\xd8\xff\xe0', 'picture'),
                         ('Grüße,a\n'.encode('latin-1'), 'save it as UTF-8'), ('{"a": 1}'.encode('utf-16')[:-1], 'UTF-16')):
        (tmp_path/'a.csv').write_bytes(content)
        assert why in said(tmp_path/'a.csv')[0]


# ---- severity ----

@pytest.mark.parametrize('data, path, value, kinds, duration', [
    (DST, ['dst'], [], ['DST_UPDATE disagrees', 'no steps'], 10.),
    (DST, ['end_frame_idx'], 0, ['no duration', 'no duration'], 4.5),
    (DST, ['end_frame_idx'], '20', [], 10.),
    (DST, ['conversation', 2, 'time'], '1,5', [], 10.),
    (DST, ['conversation', 2, 'content'], None, ['nothing said'], 10.),
    (DST, ['dst', 0, 'id'], 1, ['DST_UPDATE disagrees'], 10.),
    (DST, ['dst', 0, 'end_ts'], '0:00:04.5', [], 10.),
    (HOLOASSIST, ['events', 0, 'label'], 'Fine thing', ['unknown label', 'no steps'], 62.5),
    (HOLOASSIST, ['events', 1, 'attributes', 'Transcription'], None, ['nothing said'], 62.5),
    (HOLOASSIST, ['events', 1, 'attributes', 'Transcription'], ' ', ['nothing said'], 62.5),
    (HOLOASSIST, ['videoMetadata', 'duration'], {}, ['no duration'], 9.),
    (HOLOASSIST, ['videoMetadata', 'duration', 'raw'], '62,5', [], 62.5),
    (HOLOASSIST, ['videoMetadata', 'duration', 'raw'], 0, ['no duration', 'no duration'], 9.),
    (HOLOASSIST, ['taskType'], ..., [], 62.5),
    (PREPARED, ['end_frame_idx'], ..., ['no duration', 'no steps'], 10.),
    (COOKING, ['9_2', 'steps', 0, 'end_time'], '12.5', ['no duration'], 12.5),
    (COOKING, ['9_2', 'steps', 0, 'step_id'], '4', ['no duration'], 12.5),
    (COOKING, ['9_2', 'activity_name'], None, ['no duration'], 12.5),
    (GOALSTEP, ['videos', 0, 'end_time'], None, ['no duration'], 72.),
    (GOALSTEP, ['videos', 0, 'goal_description'], None, [], 80.),
    (EGOEXO, [1, 'duration'], 60.500055, [], 60.500055),
    (EGOEXO, [0, 'duration'], ..., [], 60.5),
    (EGOEXO, [1, 'duration'], 62., ['several durations'], 62.),
    (EGOEXO, [1, 'duration'], 59.9, ['several durations'], 60.5),
    (EGOEXO, [1, 'textAttribute_en'], None, [], 60.5),
    (EGOEXO, [0, 'attribute'], 7, [], 60.5),
])
def test_what_a_person_can_use_is_used(tmp_path, data, path, value, kinds, duration):
    (tmp_path/'a.json').write_text(json.dumps(put(data, path, value)))
    record, said = one(tmp_path/'a.json')
    assert record is not None and sorted(said) == sorted(kinds) and record.duration == duration


def test_spans_that_disagree_on_the_length_are_named(tmp_path):
    (tmp_path/'a.json').write_text(json.dumps(put(EGOEXO, [1, 'duration'], 62.)))
    why = 'other spans say 60.5 s, the first of them [0]; the longest counts'
    assert said(tmp_path/'a.json') == [f'{tmp_path}/a.json: a: [1].duration = 62.0: {why}']
    (tmp_path/'a.json').write_text(json.dumps([{k: v for k, v in span.items() if k != 'duration'} for span in EGOEXO]))
    assert one(tmp_path/'a.json')[0].duration == 55. and one(tmp_path/'a.json')[1] == ['no duration']
    assert one(tmp_path/'a.json', lengths={'a': 70.})[0].duration == 70.


# ---- without labels, twice ----

def test_a_split_without_times_is_said_once(capsys):
    path = case('goalstep-test-split')/'goalstep_test.json'
    assert said(path) == [f'{path}: this split is published without times; there is nothing to learn or score in it']
    assert command('check', path) == 1 and 'no record in these files' in capsys.readouterr().out
    with pytest.raises(RecordError, match='published without times'): read_records(path)


def test_a_split_without_labels_beside_one_with(tmp_path):
    columns = [c for c in HEADER.split(',') if c not in ('narration', 'verb')]
    rows = [','.join(columns), *(','.join(row.split(',')[:len(columns)]) for row in ROWS)]
    texts = {'EPIC_test.csv': '\n'.join(rows), 'EPIC_train.csv': EPIC,
             'blank.csv': EPIC.replace('open door', '').replace('take plate', ' '),
             'fine_test.csv': 'id,video,start_frame,end_frame\n7,nusar_9033/C1.mp4,84,111\n',
             'coarse_test.txt': '300\t390\n390\t420\n', 'goalstep_val.json': json.dumps(GOALSTEP)}
    for name, text in texts.items(): (tmp_path/name).write_text(text)
    told = [line.removeprefix(f'{tmp_path}/') for line in said(tmp_path) if 'published without' in line]
    assert told == [f'{name}: this split is published without actions; there is nothing to learn or score in it'
                    for name in ('EPIC_test.csv', 'blank.csv', 'coarse_test.txt', 'fine_test.csv')]
    assert len(read_records(tmp_path)) == 3 and command('check', tmp_path) == 0


def test_two_cameras_are_two_records(tmp_path, capsys):
    path = case('two-camera-views')/'records.jsonl'
    first, second = read_entries(path, look=True)
    assert [(e.record.uid, e.record.video_uid, e.record.video, e.record.duration) for e in (first, second)] == [
        ('P90_01', 'P90_01', 'cam1.mp4', 4.), ('P90_01.cam2', 'P90_01', 'cam2.mp4', 3.5)]
    assert first.problems == [] and [p.kind for p in second.problems] == ['another view']
    assert 'it is read as the view cam2' in str(second.problems[0])
    assert second.record.goal == 'make tea, seen from the left'
    assert command('convert', path, '--out', tmp_path/'out.jsonl') == 0
    assert [r.view for r in read_records(tmp_path/'out.jsonl')] == ['', 'cam2']
    load_records(compose_config(['data=records', f'data.path={path}']).data)
    assert f'{path}: 1 recording, 2 streams\n  1 × warning: another view; the first: {path}: line 2: video' in capsys.readouterr().out


@pytest.mark.parametrize('change, differs', [(dict(duration=7.), 'duration'), (dict(fps=1.), 'fps'),
                                             (dict(goal='b', knowledge='c'), 'goal, knowledge'),
                                             (dict(steps=[]), 'steps'), (dict(turns=[]), 'turns')])
def test_one_name_with_other_content_names_what_differs(tmp_path, change, differs):
    first = NATIVE | {'goal': 'a', 'knowledge': 'b'}
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, (first, first | change))))
    with pytest.raises(RecordError, match=f'line 2: .*: the same name as in .*line 1, but not the same {differs}; .* dialogue or view'):
        read_records(tmp_path/'a.jsonl')


def test_two_cameras_in_folders_of_their_own(tmp_path):
    "Videos that are all called alike, as HoloAssist's are, and a copy of a record that names the file in another way."
    for folder in ('left', 'right'):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/'a.jsonl').write_text(json.dumps(NATIVE | {'video': 'video.mp4'}))
    (tmp_path/'z.jsonl').write_text(json.dumps(NATIVE | {'video': './right/../right/video.mp4'}))
    records = [e.record and e.record.uid for e in read_entries(tmp_path)]
    assert records == ['tea', 'tea.right-video', None]


# ---- what training says, limits ----

def test_training_says_what_it_does_not_use(tmp_path, capsys):
    records = [NATIVE | {'video_uid': f'v{i}'} for i in range(12)]
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
    group = lambda *more: compose_config(['data=records', 'data.source=replay', f'data.path={tmp_path}', *more]).data
    assert len(load_records(group())) == 12 and capsys.readouterr().out == f'{tmp_path}: 12 recordings\n'
    assert len(load_records(group('data.limit=5'))) == 5 and capsys.readouterr().out == f'{tmp_path}: 5 of 12 recordings (data.limit=5)\n'
    odd = NATIVE | {'duration': .1, 'turns': [NATIVE['turns'][0] | {'time': 5.}]}, NATIVE | {'video_uid': 'w', 'duration': -1}, records[0]
    (tmp_path/'b.jsonl').write_text('\n'.join(map(json.dumps, odd)))
    assert len(load_records(group('data.policy=skip'))) == 12
    lines = capsys.readouterr().out.split('\n')
    assert lines[0] == f'{tmp_path}: 12 of 14 recordings'
    kinds = ['  2 × error: past the video', '  1 × error: wrong value', '  1 × warning: twice, alike']
    assert [line.split(';')[0] for line in lines[1:-1]] == kinds


def test_a_video_with_several_dialogues_is_one_recording(tmp_path, capsys):
    "Whether some or all of its dialogues are lost, when they are held against their video or before."
    late = dict(duration=.1)
    records = [NATIVE, NATIVE | dict(dialogue='b') | late, NATIVE | dict(dialogue='c', fps=-1),
               *(NATIVE | dict(video_uid='cake', dialogue=d) | late for d in 'ab'), NATIVE | dict(video_uid='egg')]
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
    load_records(compose_config(['data=records', 'data.source=replay', f'data.path={tmp_path}', 'data.policy=skip']).data)
    assert capsys.readouterr().out.split('\n')[0] == f'{tmp_path}: 2 of 3 recordings'


@pytest.mark.parametrize('span, warned', [([-.2, 3.], True), ([-1., 0.], False), ([-1., -1.], False), ([0., 3.], False)])
def test_a_step_that_begins_before_the_video(tmp_path, span, warned):
    (tmp_path/'a.jsonl').write_text(json.dumps(NATIVE | dict(steps=[dict(id='S1', name='boil', spans=[span])])))
    record, kinds = one(tmp_path/'a.jsonl')
    assert record.steps[0].spans == [tuple(span)] and (kinds == ['starts before the video']) == warned
    if warned: assert f'steps[0].spans[0] = {span}: begins before the video' in said(tmp_path/'a.jsonl')[0]


@pytest.mark.parametrize('time', ['00:00:75', '00:99:00', '00:00:60.5'])
def test_minutes_and_seconds_below_sixty(tmp_path, time):
    (tmp_path/'a.csv').write_text(EPIC.replace(EPIC.split('\n')[1].split(',')[5], time))
    assert any('a time such as 0:01:02.5' in line and time in line for line in said(tmp_path/'a.csv'))


@pytest.mark.parametrize('name', ['folder', 'a.zip', 'a.tgz'])
def test_annotations_in_a_form_that_is_not_read_are_listed(tmp_path, name):
    odd = ['b.json.bz2', 'c.jsonl.1', 'd.xlsx', 'e.csv.bak', 'f.gz', 'g.json~', 'h.jsonl.1.gz']
    files = {'a.ndjson': json.dumps(NATIVE).encode()} | dict.fromkeys([*odd, 'README.md', 'kitchen.json.mp4', '.x.json.bz2'], b'x')
    if name == 'folder':
        (tmp_path/name).mkdir()
        for n, content in files.items(): (tmp_path/name/n).write_bytes(content)
    else: archive(tmp_path/name, files)
    entry, warned = read_entries(tmp_path/name)
    [problem] = warned.problems
    assert entry.record.video_uid == 'tea' and problem.warning and problem.kind == 'skipped'
    assert problem.why.startswith('7 files in it are not read and may be annotations')
    assert problem.why.endswith(f'{", ".join(odd[:3])} and 4 more')


def test_folders_behind_links_are_read_once(tmp_path):
    for name in ('in', 'else'): (tmp_path/name).mkdir()
    (tmp_path/'in'/'a.jsonl').write_text(json.dumps(NATIVE))
    (tmp_path/'else'/'b.jsonl').write_text(json.dumps(NATIVE | {'video_uid': 'b'}))
    for link in ('in/1', 'in/2'): os.symlink(tmp_path/'else', tmp_path/link)
    os.symlink(tmp_path/'in', tmp_path/'else'/'back')
    assert outcome(tmp_path/'in') == (['b', 'tea'], [])


def test_only_the_first_process_says_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    (tmp_path/'a.jsonl').write_text(json.dumps(NATIVE))
    load_records(compose_config(['data=records', 'data.source=replay', f'data.path={tmp_path}']).data)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('limit', ['-1', '0', '1.5', 'ten', 'true', '[]'])
def test_a_limit_that_is_none(tmp_path, limit):
    (tmp_path/'a.jsonl').write_text(json.dumps(NATIVE))
    with pytest.raises(InputError, match='data.limit=.*must be a whole number of recordings, at least 1, or null'):
        load_records(compose_config(['data=records', f'data.path={tmp_path}', f'data.limit={limit}']).data)


@pytest.mark.parametrize('path', ['[a.jsonl]', '5', '{a: b}'])
def test_a_path_that_is_no_text(path):
    with pytest.raises(InputError, match='data.path=.*must be the name of one file, folder or archive'):
        load_records(compose_config(['data=records', f'data.path={path}']).data)


def test_holoassist_has_no_limit(): assert compose_config(['data=holoassist']).data.limit is None


# ---- lengths ----

@pytest.mark.parametrize('name, content', [
    ('a.json', '{"b": 60.5}'.encode('utf-16')), ('a.json.gz', gzip.compress(b'{"b": "60.5"}')), ('a.csv', b'video_uid,duration\nb,60.5\n'),
    ('a.csv', '\ufeff"video_id";"seconds"\r\n"b";"60,5"\r\n'.encode()),
    ('a.csv.gz', gzip.compress(b'note,video_uid,duration\n"a\nb",b,0:01:00.5\n'))], ids=['utf-16', 'json.gz', 'csv', 'excel', 'csv.gz'])
def test_lengths_as_they_come(tmp_path, name, content):
    (tmp_path/'b.tsv').write_text(TABLE)
    (tmp_path/name).write_bytes(content)
    assert command('convert', tmp_path/'b.tsv', '--lengths', tmp_path/name, '--out', tmp_path/'out.jsonl') == 0
    assert [r.duration for r in read_records(tmp_path/'out.jsonl')] == [60.5]


def test_lengths_that_contradict_each_other(tmp_path, capsys):
    (tmp_path/'b.tsv').write_text(TABLE)
    (tmp_path/'a.csv').write_text('video_uid,duration\nb,60.5\nc,3\nb,61\n')
    assert command('convert', tmp_path/'b.tsv', '--lengths', tmp_path/'a.csv', '--out', tmp_path/'out.jsonl') == 2
    assert 'line 4: duration = \'61\': another length of b than in line 2, which has 60.5' in capsys.readouterr().err
    assert not (tmp_path/'out.jsonl').exists()


def test_a_linked_folder_names_the_same_videos(tmp_path, monkeypatch):
    "`..` behind a link leads up from where the link leads to, for the system and for us."
    monkeypatch.chdir(tmp_path)
    Path('disk/labels').mkdir(parents=True)
    record = dict(video_uid='a', dataset='k', duration=3., video='../tea.mp4', steps=[dict(id='S1', name='boil', spans=[[0, 1]])])
    Path('disk/labels/a.jsonl').write_text(json.dumps(record) + '\n')
    for place in ('.', 'disk'): Path(place, 'tea.mp4').write_bytes(place.encode())
    os.symlink('disk/labels', 'linked')
    command('convert', 'linked/a.jsonl', '--out', 'out.jsonl')
    assert Path(json.loads(Path('out.jsonl').read_text())['video']).read_bytes() == b'disk'
    Path('linked/b.jsonl').write_text(Path('linked/a.jsonl').read_text().replace('../tea.mp4', '../../disk/tea.mp4'))
    assert one('linked/b.jsonl')[0].video == '../../disk/tea.mp4'
    assert len([e for e in read_entries('disk/labels') if e.record]) == 1                # one recording, by two paths


class Videos(dict):
    "A folder of videos that are looked at when asked for."
    problems = []
    def __getitem__(self, uid):
        self.problems = [RecordError('broken.mp4', 'not a readable video', kind='no video', warning=True)]
        return super().__getitem__(uid)
    def path(self, uid): return Path('videos')/f'{uid}.mp4' if uid in self else None


def test_videos_of_records_that_name_none(tmp_path, monkeypatch, capsys):
    "They are filled in, and what is odd about the folder is said when all has been read."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('dst_smolvlm.records.video_lengths', lambda folder: Videos(b=60.5))
    (tmp_path/'labels').mkdir()
    (tmp_path/'labels'/'b.tsv').write_text(TABLE)
    (tmp_path/'labels'/'c.jsonl').write_text(json.dumps(NATIVE))
    assert command('convert', 'labels', '--videos', 'videos', '--out', 'out/records.jsonl', '--report', 'report.json') == 0
    read = read_records('out/records.jsonl')
    assert [(r.video_uid, r.video, r.duration) for r in read] == [('b', '../videos/b.mp4', 60.5), ('tea', None, 6.)]
    assert '1 × warning: no video\n  broken.mp4: not a readable video' in capsys.readouterr().out
    assert [p['kind'] for p in json.loads(Path('report.json').read_text())['problems']] == ['no video']
