"""The site that `make docs` builds has a page for every notebook and every module (tests/test_links.py follows its links)."""
import importlib.util
from pathlib import Path

import pytest
import yaml

root = Path(__file__).parent.parent


@pytest.fixture
def site(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location('site_hook', root/'docs'/'site.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'source', tmp_path/'source')
    module.copy_sources()
    return module

def pages_of(nav):
    "The paths of a navigation, at any depth."
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str): yield value
            else: yield from pages_of(value)

def page(name): return type('Page', (), dict(file=type('File', (), dict(src_uri=name))))


def test_navigation_is_complete(site):
    pages = list(pages_of(site.navigation()))
    assert len(pages) == len(set(pages)) and all((site.source/name).is_file() for name in pages)
    notebooks = {p.relative_to(root).as_posix() for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    assert notebooks <= set(pages)
    assert {p.relative_to(root).as_posix() for p in root.glob('docs/*.md')} <= set(pages)
    modules = {'.'.join(p.relative_to(root/'dst_smolvlm').with_suffix('').parts) for p in (root/'dst_smolvlm').rglob('*.py')}
    modules = {name for name in modules if name.rpartition('.')[2] not in ('__init__', '_modidx')}
    assert modules == {Path(name).stem for name in pages if name.startswith('api/')}


def test_links_of_notebooks_lead_to_pages(site):
    html = '<a href="../01_data/00_schema.ipynb#A-record">x</a><a href="../../README.md">y</a><a href="https://a.org/b.md#C">z</a>'
    assert site.on_page_content(html, page('nbs/00_core/00_config.ipynb'), None, None) == (
        '<a href="../01_data/00_schema.html#a-record">x</a><a href="../../index.html">y</a><a href="https://a.org/b.md#C">z</a>')
    assert site.on_page_content('<a href="#The-rooms">x</a>', page('nbs/index.ipynb'), None, None) == '<a href="#the-rooms">x</a>'
    html = '<a href="nbs/index.html#Glossary">x</a><a href="evaluation.html#the-table">y</a>'
    assert site.on_page_content(html, page('README.md'), None, None) == html.replace('Glossary', 'glossary')


def test_configuration_names_the_hook_and_what_is_installed():
    config = yaml.safe_load((root/'mkdocs.yml').read_text(encoding='utf-8'))
    assert config['hooks'] == ['docs/site.py'] and config['site_dir'].startswith('_docs/')
    for plugin in config['plugins']:
        name = plugin if isinstance(plugin, str) else next(iter(plugin))
        assert name == 'search' or importlib.util.find_spec(name.replace('-', '_')), name


def test_a_patched_method_stands_in_its_class(tmp_path):
    "On the API pages, where a reader looks for it; what is not patched stays where it is."
    griffe = pytest.importorskip('griffe')
    (tmp_path/'sample.py').write_text('''
class A:
    "A class."
    def own(self): ...
@patch
def added(self:A, x:int) -> int:
    "A method."
@patch(as_prop=True)
def size(self:A) -> int: ...
@other
def free(self:A): ...
def plain(): ...
''')
    module = griffe.load('sample', search_paths=[tmp_path], extensions=griffe.load_extensions(str(root/'docs'/'patched.py')))
    assert list(module['A'].members) == ['own', 'added', 'size'] and set(module.members) == {'A', 'free', 'plain'}
    assert module['A.added'].path == 'sample.A.added' and module['A.added'].docstring.value == 'A method.'
