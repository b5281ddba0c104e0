"""The notebooks and the package say the same, and a notebook builds only on those before it."""
import ast, json, re, shutil, subprocess, sys
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

root = Path(__file__).parent.parent
# in reading order; the index comes last
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
each_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(root/'nbs').with_suffix('').as_posix())
machine_path = re.compile(r'(?<![\w.:/])(?:/(?:root|home|Users|work|tmp|var|opt|usr|mnt)/|[A-Z]:\\\\?\w)|site-packages')


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']

def source(cell): return ''.join(cell['source'])

def modules(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*.py')}

def default_exp(path):
    "The module that a notebook exports, or None."
    found = re.search(r'^#\| *default_exp +([\w.]+)', '\n'.join(map(source, cells(path))), re.MULTILINE)
    return found and found[1]

def imported_modules(path):
    "Names of the `dst_smolvlm` modules that a notebook's code imports."
    code = '\n'.join(source(c) for c in cells(path) if c['cell_type'] == 'code')
    names = re.findall(r'^\s*(?:from|import) +dst_smolvlm\.([\w.]+)', code, re.MULTILINE)
    names = [name for name in names if '.' in name or not (root/'dst_smolvlm'/name).is_dir()]              # a room is no module
    for room, line in re.findall(r'^\s*from +dst_smolvlm(?:\.(\w+))? +import +(.+)', code, re.MULTILINE):       # modules, not names
        names += [f'{room}.{name}' if room else name for name in re.findall(r'(\w+)(?: +as +\w+)?', line)]
    return set(names)

def output_text(cell):
    "What the outputs of a cell say; pictures are left out, because base64 can hold anything."
    for output in cell.get('outputs', []):
        yield ''.join(output.get('text', [])) + '\n'.join(output.get('traceback', []))
        for mime, data in output.get('data', {}).items():
            if mime.startswith('image/') and mime != 'image/svg+xml': continue
            yield data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)


def test_export_leaves_no_difference(tmp_path):
    "The package consists of exactly what the notebooks export from nothing, byte for byte."
    shutil.copy(root/'settings.ini', tmp_path)
    shutil.copytree(root/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', 'outputs'))
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, check=True)
    exported, package = modules(tmp_path/'dst_smolvlm'), modules(root/'dst_smolvlm')
    assert sorted(exported) == sorted(package), 'run nbdev_export, and remove modules that no notebook exports'
    differ = [name for name in exported if exported[name] != package[name]]
    assert not differ, f'{differ} differ from their notebooks: run nbdev_export'


@each_notebook
def test_opens_with_title_and_summary(path):
    first = cells(path)[0]
    assert first['cell_type'] == 'markdown'
    assert re.match(r'# \S.*\n+> \S', source(first)), source(first)


@each_notebook
def test_outputs_are_stored_and_without_errors(path):
    code = [c for c in cells(path) if c['cell_type'] == 'code']
    outputs = [o for c in code for o in c['outputs']]
    assert outputs or not code, 'the notebook was never run'
    assert not [o['ename'] for o in outputs if o['output_type'] == 'error']


@each_notebook
def test_headings_differ(path):
    "A table of contents cannot tell two headings of one name apart, nor reach one that is code alone."
    lines = [line for c in cells(path) if c['cell_type'] == 'markdown' for line in source(c).splitlines() if re.match('#+ ', line)]
    names = [re.sub('`[^`]*`', '', line.lstrip('# ')).lower().strip(' ,') for line in lines]
    assert len(set(names)) == len(names) and all(names), lines


@each_notebook
def test_no_path_of_a_machine(path):
    for cell in cells(path):
        for text in output_text(cell):
            found = machine_path.search(text)
            assert not found, text[max(0, found.start()-60):found.end()+60]


def test_no_import_from_a_later_notebook():
    order = {default_exp(p): i for i, p in enumerate(notebooks)}
    wrong = [f'{p.parent.name}/{p.name} imports {name}' for i, p in enumerate(notebooks) for name in sorted(imported_modules(p))
             if order.get(name, i) >= i]
    assert not wrong


def test_every_requirement_has_a_tested_version():
    "The exact versions of constraints.txt lie in the ranges of settings.ini."
    pins = dict(line.lower().replace('_', '-').split('==') for line in (root/'constraints.txt').read_text().splitlines() if '==' in line)
    settings = ConfigParser(delimiters=['='], interpolation=None)
    settings.read(root/'settings.ini', encoding='utf-8')
    words = [word for key in ('requirements', 'lab_requirements', 'dev_requirements') for word in settings['DEFAULT'][key].split()]
    wrong = [str(r) for r in map(Requirement, words) if pins.get(r.name.lower()) not in r.specifier]
    assert not wrong


def test_an_export_that_no_module_uses_says_for_whom_it_is():
    "In its docstring: for users, notebooks, tests, or a comparison. What is for nobody goes."
    texts = {p: p.read_text() for p in (root/'dst_smolvlm').rglob('*.py') if p.stem != '_modidx'}
    words = Counter(word for text in texts.values()
                    for word in re.findall(r'\w+', re.sub(r'__all__ = \[.*?\]', '', text, flags=re.DOTALL)))
    unused = [(node.name, ast.get_docstring(node) or '') for text in texts.values() for node in ast.parse(text).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.decorator_list and not node.name.startswith('_')
              and words[node.name] == 1]
    assert [name for name, said in unused if not re.search('users?|notebooks?|tests?|comparison', said)] == []
