"""Relative links of README, pages and notebooks lead to a file of the project, and their anchors to a heading in it."""
import json, re
from pathlib import Path
from urllib.parse import unquote

import pytest

root = Path(__file__).parent.parent
pages = sorted([*root.glob('*.md'), *root.glob('docs/*.md'), *root.glob('data/*.md'),
                *(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)])
link = re.compile(r'(?<!\\)\]\(<?([^)\s>]+)>?(?:\s+"[^"]*")?\)|<(?:img|a)\s[^>]*?(?:src|href)="([^"]+)"')


def prose(path):
    "The Markdown of a page or a notebook, without blocks of code."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.ipynb': text = '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
    return re.sub(r'^(```|~~~).*?^\1', '', text, flags=re.MULTILINE | re.DOTALL)

def headings(path):
    "The anchors of a page's headings."
    found = re.findall(r'^#+ +(.+?)\s*$', prose(path), re.MULTILINE)
    plain = [re.sub(r'\[([^]]*)\]\([^)]*\)|[`*]', r'\1', heading).strip() for heading in found]
    if path.suffix == '.ipynb': return {h.replace(' ', '-') for h in plain}                       # as Jupyter names them
    return {re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in plain}                  # as GitHub does

def broken_links(path, text):
    "Each relative link of `text`, a page's at `path`, that leads nowhere, with the reason."
    for found in link.finditer(re.sub(r'`[^`\n]+`', '', text)):
        target = found[1] or found[2]
        if re.match(r'[a-zA-Z][\w+.-]*:|//', target): continue                                    # another site's
        name, _, anchor = unquote(target).partition('#')
        file = (path.parent/name).resolve() if name else path
        if not file.is_relative_to(root) or not file.exists(): yield f'{target}: no such file'
        elif anchor and file.suffix in ('.md', '.ipynb') and anchor not in headings(file): yield f'{target}: no such heading'


@pytest.mark.parametrize('path', pages, ids=lambda p: p.relative_to(root).as_posix())
def test_relative_links_lead_somewhere(path):
    assert not list(broken_links(path, prose(path)))


def test_every_notebook_is_in_the_index():
    linked = {unquote(m[1]).partition('#')[0] for m in link.finditer(prose(root/'nbs'/'index.ipynb')) if m[1]}
    names = {p.relative_to(root/'nbs').as_posix() for p in pages if p.suffix == '.ipynb'}
    missing = names - linked - {'index.ipynb'}
    assert not missing, f'{missing}: add a row to a table of nbs/index.ipynb'


def test_a_broken_link_is_found(tmp_path):
    readme = root/'README.md'
    assert list(broken_links(readme, '[a](docs/nowhere.md) [b](docs/data.md#nowhere) [c](../outside.md) <img src="no.png">')) == [
        'docs/nowhere.md: no such file', 'docs/data.md#nowhere: no such heading', '../outside.md: no such file', 'no.png: no such file']
    right = '[a](docs/data.md#commands) [b](https://example.org/x) [c](#your-own-data) ![d](nbs/images/demo_timeline.png)'
    assert not list(broken_links(readme, right))
