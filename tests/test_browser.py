"""What is made for a browser works in one: the timeline widget in JupyterLab, the report at the width of a desk and of a phone."""
import json, os, secrets, shutil, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from playwright.sync_api import expect, sync_playwright

from dst_smolvlm import evaluate
from dst_smolvlm.model.checkpoints import save_model
from dst_smolvlm.model.modeling import build_tiny

root = Path(__file__).parent.parent
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(chromium is None, reason='skipped: Chromium not found')

# Chromium must not call its maker's servers, nor expect more shared memory than a container has.
chromium_args = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
                 '--disable-background-networking', '--disable-component-update', '--disable-sync']

READY = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return panel?.context?.isReady && panel.sessionContext.isReady && panel.sessionContext.session.kernel.status === 'idle';
}"""
OUTCOME = """() => {
    const notebook = window.jupyterapp.shell.currentWidget.context.model.toJSON();
    const cells = notebook.cells.filter(cell => cell.cell_type === 'code' && cell.source.trim());
    const errors = cells.flatMap(cell => cell.outputs).filter(output => output.output_type === 'error');
    return {errors: errors.map(error => `${error.ename}: ${error.evalue}`),
            not_run: cells.filter(cell => !cell.execution_count).map(cell => cell.source)};
}"""
FINISHED = f"() => {{ const outcome = ({OUTCOME})(); return outcome.errors.length > 0 || outcome.not_run.length === 0; }}"


@contextmanager
def jupyterlab(folder, home):
    "The address of a JupyterLab server on `folder`, with its own settings under `home`; it ends with the block, and its kernels with it."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token, url = secrets.token_hex(16), f'http://127.0.0.1:{port}'
    no_questions = {'disabledExtensions': {'@jupyterlab/apputils-extension:announcements': True}}
    whole_page = {'windowingMode': 'none'}                      # cells out of view stay in the page
    settings = {'config/labconfig/page_config.json': no_questions,
                'settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings': whole_page}
    for name, value in settings.items():
        (home/name).parent.mkdir(parents=True, exist_ok=True)
        (home/name).write_text(json.dumps(value))
    folders = {'IPYTHONDIR': 'ipython', 'JUPYTER_CONFIG_DIR': 'config', 'JUPYTER_DATA_DIR': 'data', 'JUPYTER_RUNTIME_DIR': 'runtime',
               'JUPYTERLAB_SETTINGS_DIR': 'settings', 'JUPYTERLAB_WORKSPACES_DIR': 'workspaces'}
    env = {**os.environ, 'HOME': str(home), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', **{k: str(home/v) for k, v in folders.items()}}
    with open(home/'server.log', 'w') as log:
        options = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
                   f'--ServerApp.root_dir={folder}', f'--IdentityProvider.token={token}', '--LabApp.expose_app_in_browser=True']
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *options], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try: urlopen(f'{url}/api/status?token={token}').close(); break
            except OSError: time.sleep(.5)
            assert server.poll() is None, (home/'server.log').read_text()
        else: pytest.fail((home/'server.log').read_text())
        yield lambda path: f'{url}/lab/tree/{path}?token={token}'
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


def run_all_cells(page, url, timeout=180_000):
    "Open the notebook at `url` and run it from top to bottom, or to the first error, in at most `timeout` milliseconds."
    page.goto(url)
    page.wait_for_function(READY, timeout=60_000)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(FINISHED, timeout=timeout)
    page.wait_for_function(READY, timeout=timeout)
    return page.evaluate(OUTCOME)


def test_timeline_widget_moves(tmp_path):
    for name in ('nbs', 'data'): shutil.copytree(root/name, tmp_path/name, ignore=shutil.ignore_patterns('.ipynb_checkpoints', 'outputs'))
    (tmp_path/'home').mkdir()
    with jupyterlab(tmp_path/'nbs', tmp_path/'home') as url, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=chromium_args)
        page = browser.new_page(viewport=dict(width=1400, height=1000))
        notebook = next((root/'nbs').glob('*/*_timeline_widget.ipynb')).relative_to(root/'nbs').as_posix()
        assert run_all_cells(page, url(notebook)) == dict(errors=[], not_run=[])

        widget = page.locator('.jp-OutputArea-output', has=page.locator('.widget-play')).first
        slider, play = widget.locator('.noUi-handle').first, widget.locator('.widget-play button').first
        clock, picture = widget.locator('.widget-html-content', has_text='frame').first, widget.locator('img').first
        slider.press('Home')
        expect(clock).to_contain_text('frame 0 of')
        first_picture = picture.get_attribute('src')
        slider.press('ArrowRight')
        expect(clock).to_contain_text('frame 1 of')
        slider.press('End')
        expect(clock).not_to_contain_text('frame 1 of')
        expect(picture).not_to_have_attribute('src', first_picture)
        page.screenshot(path=tmp_path/'timeline.png')

        slider.press('Home')
        expect(clock).to_contain_text('frame 0 of')
        play.click()
        expect(clock).not_to_contain_text('frame 0 of')
        browser.close()


def test_the_report_on_a_desk_and_on_a_phone(tmp_path):
    "It asks nobody for anything; the page never scrolls sideways, its tables only where they must, with the names of the rows in view."
    save_model(*build_tiny(), tmp_path/'checkpoint')
    evaluate.main(['data=toy', 'data.validation_videos=1', 'data.test_videos=2', 'eval.max_reply_tokens=2', 'eval.controls=1',
                   'eval.pictures=1', 'eval.encoder=words', 'eval.bootstrap=50', 'eval.workers=1', f'output_dir={tmp_path}'])
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=chromium_args)
        for width in (1280, 390):
            page, asked, complaints = browser.new_page(viewport=dict(width=width, height=844)), [], []
            page.on('request', lambda r, to=asked: to.append(r.url))
            page.on('console', lambda m, to=complaints: to.append(m.text))
            page.goto((tmp_path/'report.html').as_uri())
            assert [u for u in asked if not u.startswith(('data:', 'file:'))] == complaints == []
            assert page.evaluate('document.documentElement.scrollWidth') <= width
            fits = 'i => i.complete && i.naturalWidth > 100 && i.getBoundingClientRect().right <= innerWidth'
            assert page.evaluate(f'[...document.images].every({fits})')
            names = page.locator('tbody tr:not(.group) td:first-child')
            heights = 'cells => cells.map(c => c.getBoundingClientRect().height/parseFloat(getComputedStyle(c).lineHeight))'
            lines = names.evaluate_all(heights)
            assert len(lines) > 50 and max(lines) < 4.5, 'the name of a row is broken to pieces'
            first = page.locator('.wide').first
            if width < 600:
                first.evaluate('t => t.scrollLeft = 10000')
                assert first.evaluate('t => t.scrollLeft') > 50
                assert names.first.bounding_box()['x'] >= 0, 'the name of the row went out of view'
            else: assert page.locator('.wide').evaluate_all('all => Math.max(...all.map(t => t.scrollWidth - t.clientWidth))') < 2
            page.screenshot(path=tmp_path/f'report_{width}.png')
        browser.close()
