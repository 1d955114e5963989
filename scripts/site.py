"""The documentation site: every notebook with its outputs as they are committed, the API, the results pages.

    python scripts/site.py build    # pages from notebooks, then mkdocs
    python scripts/site.py check    # every page in a headless browser, at a desktop's and a phone's width
"""
import argparse
import importlib
import inspect
import logging
import re
import shutil
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from chapters import NBS, about, chapters, notebooks

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / 'outputs' / 'site'
DOCS, HTML = SITE / 'docs', SITE / 'html'
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
CSS = """.md-grid { max-width: 76rem }
.md-typeset table:not([class]) { font-size: .62rem }
.md-typeset table:not([class]) th, .md-typeset table:not([class]) td { min-width: 0; padding: .4em .7em }
.md-typeset pre > code { font-size: .62rem }
.md-content img { background: white }
.MathJax_Display { overflow-x: auto; overflow-y: hidden }
"""
MATHJAX = r"""window.MathJax = {
  messageStyle: 'none', showMathMenu: false,
  tex2jax: { inlineMath: [['\\(', '\\)']], displayMath: [['\\[', '\\]']], processClass: 'arithmatex', ignoreClass: '.*' },
  'HTML-CSS': { availableFonts: ['STIX-Web'], webFont: 'STIX-Web', imageFont: null, linebreaks: { automatic: true } } };
"""


def place(notebook: Path) -> str:
    "Such as 1_blocks/04_spectral: where its page stands in the folder nbs"
    return notebook.relative_to(NBS).with_suffix('').as_posix()


def linked(text: str) -> str:
    "Links between notebooks become links between pages."
    return re.sub(r'(\]\([^)\s]*?)\.ipynb(#[^)]*)?\)', r'\1.md\2)', text)


def notebook_page(notebook: Path, module: str) -> None:
    "A notebook as Markdown and pictures, without hidden cells and nbdev's directives."
    import nbformat
    from nbconvert import MarkdownExporter

    nb, cells = nbformat.read(notebook, 4), []
    for cell in nb.cells:
        if cell.cell_type == 'code':
            if re.match(r'#\|\s*(hide|default_exp)\b', cell.source): continue
            exported = bool(re.match(r'#\|\s*export', cell.source))
            cell.source = DIRECTIVE.sub('', cell.source).strip()
            if exported and cell.source.startswith(('import ', 'from ')): continue
        else:
            cell.source = linked(cell.source)
        cells.append(cell)
    if module:
        first = next(i for i, c in enumerate(cells) if c.cell_type == 'markdown')
        cells[first].source += f'\n\nExported to [`srl_pose.{module}`]({"../" * len(notebook.relative_to(ROOT).parents[:-1])}api/{module}.md).'
    nb.cells = cells
    text, resources = MarkdownExporter().from_notebook_node(nb, resources=dict(unique_key=notebook.stem, output_files_dir=f'{notebook.stem}_files'))
    page = DOCS / 'nbs' / f'{place(notebook)}.md'
    for name, data in resources['outputs'].items():
        (page.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (page.parent / name).write_bytes(data)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)


def api_page(module: str, notebook: Path) -> None:
    "Everything public of a module, with what its comments say of each argument."
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc

    m = importlib.import_module(f'srl_pose.{module}')
    text = [f'# srl_pose.{module}\n\n{inspect.getdoc(m) or ""}\n\nSource: [{place(notebook)}](../nbs/{place(notebook)}.md)\n']
    for name in m.__all__:
        thing = getattr(m, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            page = show_doc(thing, renderer=BasicMarkdownRenderer)._repr_markdown_()
            text.append(re.sub(r'^---\s*### .*', f'## {name}', page.strip(), count=1))
            for method, value in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
                if method.startswith('_') or not (inspect.isfunction(value) or isinstance(value, classmethod)) or not inspect.getdoc(getattr(thing, method)): continue
                page = show_doc(getattr(thing, method), renderer=BasicMarkdownRenderer, name=f'{name}.{method}')._repr_markdown_()
                text.append(re.sub(r'^---\s*### .*', f'### {name}.{method}', page.strip(), count=1))
        else:
            shown = repr(thing)
            text.append(f'## {name}\n\n```python\n{name} = {shown if len(shown) < 300 else shown[:300] + " ..."}\n```\n')
    (DOCS / 'api' / f'{module}.md').write_text('\n\n'.join(text))


def results_pages() -> list[dict]:
    "Copies of the committed pages, with a navigation over them"
    nav = []
    for page in sorted((ROOT / 'results').rglob('*.md')):
        target = DOCS / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(linked(page.read_text()))
        title = re.match(r'# (.+)', page.read_text())
        nav.append({title[1] if title else page.stem: str(target.relative_to(DOCS))})
    for picture in (file for kind in ('png', 'jpg', 'csv', 'json') for file in (ROOT / 'results').rglob(f'*.{kind}')):
        target = DOCS / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    return nav


def words(source: Path) -> None:
    "A Markdown file of the project, at its own place, with links to pages instead of notebooks."
    target = DOCS / source.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(linked(source.read_text()))


def build(only: str | None = None) -> None:
    "All pages, then the site. Fails on a broken link."
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    shutil.rmtree(DOCS, ignore_errors=True)
    (DOCS / 'api').mkdir(parents=True)
    nav, api = [{'Start': 'README.md'}, {'Guides': [{'Your own data': 'docs/own_data.md'}, {'Weights': 'docs/weights.md'}, {'Demonstration network': 'srl_pose/demonstration/README.md'}, {'COCO': 'docs/coco.md'}, {'Install': 'docs/install.md'}, {'Glossary': 'docs/glossary.md'}]}], []
    for chapter in chapters():
        door = chapter / 'README.md'
        words(door)
        pages = [door.relative_to(ROOT).as_posix()]
        for notebook in (n for n in notebooks(chapter) if not only or re.match(only, place(n))):
            title, _, module = about(notebook)
            notebook_page(notebook, module)
            pages.append({title.replace('`', ''): f'nbs/{place(notebook)}.md'})
            if module:
                api_page(module, notebook)
                api.append({module: f'api/{module}.md'})
        nav.append({re.match(r'# (.+)', door.read_text())[1]: pages})
    for source in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'srl_pose/demonstration/README.md', ROOT / 'findings/README.md', *(ROOT / 'docs').glob('*.md')): words(source)
    for name in ('LICENSE', 'CITATION.cff', 'README_files', 'experiments'):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, DOCS / name)
    import jupyter_server_mathjax
    shutil.copytree(Path(jupyter_server_mathjax.__file__).parent / 'static', DOCS / 'MathJax', dirs_exist_ok=True)
    (DOCS / 'site.css').write_text(CSS)
    (DOCS / 'mathjax.js').write_text(MATHJAX)
    nav += [{'Results pages': results_pages()}, {'API': api}, {'What other software does': 'findings/README.md'}, {'Contributing': 'CONTRIBUTING.md'}]
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s %(message)s')
    config = load_config(str(ROOT / 'mkdocs.yml'), nav=nav, docs_dir=str(DOCS), site_dir=str(HTML), strict=True)
    build_site(config)
    print(f'{len(list(HTML.rglob("*.html")))} pages: {HTML}/index.html')


class Quiet(SimpleHTTPRequestHandler):
    "A server of files that does not tell of each"

    def log_message(self, *args): pass


def check() -> int:
    "Open every page in a headless browser. What is broken is printed; the number of such things is returned."
    from playwright.sync_api import sync_playwright

    browser_file = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(HTML)))
    Thread(target=server.serve_forever, daemon=True).start()
    address, wrong, anchors, links, formulas, pictures = f'http://127.0.0.1:{server.server_port}', [], {}, [], 0, 0
    pages = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob('*.html') if 'MathJax' not in p.parts)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_file, args=['--no-sandbox'])
        for width, height in ((1280, 900), (390, 844)):
            page, here = browser.new_page(viewport=dict(width=width, height=height)), ['']
            page.on('requestfailed', lambda r: 'ABORTED' in (r.failure or '') or r.url == 'about:blank' or wrong.append(f'{here[0]}: {r.url} failed'))  # left for the next page
            page.on('response', lambda r: r.status >= 400 and wrong.append(f'{here[0]}: {r.url} gives {r.status}'))
            page.on('request', lambda r: r.url.startswith((address, 'data:', 'blob:', 'about:')) or wrong.append(f'{here[0]}: loads {r.url} from elsewhere'))
            page.on('pageerror', lambda e: wrong.append(f'{here[0]}: {e}'))
            for name in pages:
                here[0] = f'{name} at {width}'
                page.goto(f'{address}/{name}', wait_until='load')
                page.wait_for_function('!document.querySelector(".arithmatex") || (window.MathJax && MathJax.Hub && !MathJax.Hub.queue.pending && '
                                       'document.querySelectorAll(".arithmatex").length <= document.querySelectorAll(".arithmatex .MathJax").length)',
                                       timeout=30_000)
                found = page.evaluate('''() => ({
                    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
                    links: [...document.querySelectorAll('a[href]')].map(e => e.href),
                    pictures: [...document.images].map(e => [e.src, e.complete && e.naturalWidth > 0]),
                    formulas: document.querySelectorAll('.arithmatex').length,
                    errors: document.querySelectorAll('.merror, .MathJax_Error').length,
                    raw: [...document.querySelectorAll('article p, article li, article td')].map(e => { e = e.cloneNode(true); e.querySelectorAll('code, .arithmatex').forEach(c => c.remove()); return e.textContent })
                        .filter(t => /\\\\\\(|\\\\\\[|\\$[^$]+\\$/.test(t)),
                    wide: document.documentElement.scrollWidth - innerWidth })''')
                wrong += [f'{here[0]}: picture {src} is missing' for src, good in found['pictures'] if not good]
                wrong += [f'{here[0]}: formula left as text: {t[:80]}' for t in found['raw']]
                if found['errors']: wrong.append(f'{here[0]}: {found["errors"]} formulas with errors')
                if found['wide'] > 0: wrong.append(f'{here[0]}: {found["wide"]} pixels wider than the screen')
                if width > 1000:
                    anchors[name], formulas, pictures = set(found['ids']), formulas + found['formulas'], pictures + len(found['pictures'])
                    links += [(name, link.removeprefix(f'{address}/')) for link in found['links'] if link.startswith(address)]
            page.close()
        page = browser.new_page()
        page.goto(f'{address}/index.html')
        page.fill('input[name=query]', 'orthogonal')
        try:
            page.wait_for_selector('.md-search-result__item', timeout=10_000, state='attached')
        except Exception:
            wrong.append('search: finds nothing for "orthogonal"')
        browser.close()
    server.shutdown()
    for page, link in links:
        file, _, anchor = link.partition('#')
        file = file.partition('?')[0] or 'index.html'
        if file in anchors:
            if anchor and anchor not in anchors[file] and not anchor.startswith('__'): wrong.append(f'{page}: {link}: there is no such place')
        elif not (HTML / file).is_file():
            wrong.append(f'{page}: {link}: there is no such page')
    print(*dict.fromkeys(wrong), sep='\n')
    print(f'{len(pages)} pages, {len(links)} links, {pictures} pictures, {formulas} formulas, 2 widths; wrong: {len(set(wrong))}')
    return len(set(wrong))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='The documentation site.')
    parser.add_argument('what', choices=('build', 'check'))
    parser.add_argument('--only', help='regular expression of notebooks such as 1_blocks/0[12]: a part of the site, to try')
    options = parser.parse_args()
    sys.exit(build(options.only) or 0 if options.what == 'build' else min(check(), 1))
