"""A hook of MkDocs: the site's pages lie as in the repository, so that the same relative links work in both.

Copies README, pages, notebooks and what they show to _docs/source, writes one API page for each exported module, and makes the navigation
of the rooms.
"""
import json, re, shutil
from pathlib import Path

from markdown.extensions.toc import slugify

root = Path(__file__).parent.parent
source = root/'_docs'/'source'
PAGES = {'Evaluation': 'docs/evaluation.md', 'Data': 'docs/data.md', 'One record, and formats': 'data/README.md',
         'Training': 'docs/training.md', 'Streaming': 'docs/streaming.md', 'Related work': 'docs/related.md',
         'Contributing': 'CONTRIBUTING.md', 'Changes': 'CHANGELOG.md'}


def copy_sources():
    "The files of the site, in the places that they have in the repository."
    shutil.rmtree(source, ignore_errors=True)
    for folder in ('docs', 'nbs'):
        shutil.copytree(root/folder, source/folder, ignore=shutil.ignore_patterns('.ipynb_checkpoints', 'outputs', '__pycache__', '*.py'))
    (source/'data').mkdir()
    for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff', 'LICENSE', 'data/README.md'):
        shutil.copy(root/name, source/name)

def exported_module(notebook: Path) -> str|None:
    "The module that a notebook exports."
    text = '\n'.join(''.join(cell['source']) for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells'][:3])
    found = re.search(r'^#\| *default_exp +([\w.]+)', text, re.MULTILINE)
    return found and found[1]

def api_page(module: str) -> str:
    "Writes the API page of a module; returns its place."
    page = source/'api'/f'{module}.md'
    page.parent.mkdir(exist_ok=True)
    page.write_text(f'# {module}\n\n::: dst_smolvlm.{module}\n', encoding='utf-8')
    return page.relative_to(source).as_posix()

def navigation() -> list:
    "README, the pages, the rooms with their notebooks, and the API in the same rooms."
    rooms, api = [], []
    for room in sorted(p for p in (root/'nbs').iterdir() if re.match(r'\d\d_', p.name)):
        notebooks, name = sorted(room.glob('*.ipynb')), room.name.partition('_')[2]
        rooms.append({name: [{p.stem.partition('_')[2]: p.relative_to(root).as_posix()} for p in notebooks]})
        modules = [module for module in map(exported_module, notebooks) if module]
        api.append({name: [{module.rpartition('.')[2]: api_page(module)} for module in modules]})
    return [{'Home': 'README.md'}, {'Tour': 'nbs/index.ipynb'}, {'Pages': [{title: path} for title, path in PAGES.items()]},
            {'Notebooks': rooms}, {'API': api}]


def on_config(config):
    copy_sources()
    config.nav, config.docs_dir = navigation(), str(source)
    return config

def on_page_content(html, page, config, files):
    """Links in a notebook lead to the pages of Markdown files and notebooks. Anchors in a notebook lead to its headings,
    which the site and Jupyter name differently."""
    in_notebook = page.file.src_uri.endswith('.ipynb')
    def to_page(found):
        target, anchor = found[1], found[2] or ''
        if '://' in target: return found[0]
        if in_notebook: target = re.sub(r'[.](ipynb|md)$', '.html', re.sub(r'README\.md$', 'index.html', target))
        if anchor and (in_notebook or 'nbs/' in target): anchor = '#' + slugify(anchor, '-')
        return f'href="{target}{anchor}"'
    return re.sub(r'href="([^"#]*\.(?:ipynb|md|html)|)(#[^"]+)?"', to_page, html)
