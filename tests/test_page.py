"The page of an exported network in a browser: every file, paste, keyboard, a phone. Needs Playwright and Chromium."
import base64, io, os, re, shutil
import pytest

sync_api = pytest.importorskip('playwright.sync_api')
from PIL import Image
from test_app import FILES, export, picture, server  # two of them fixtures

@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        found = shutil.which('chromium') or shutil.which('google-chrome') or p.chromium.executable_path
        if not os.path.exists(found): pytest.skip('needs Chromium: playwright install chromium')
        browser = p.chromium.launch(executable_path=found, args=['--no-sandbox'])
        yield browser
        browser.close()

@pytest.fixture
def page(browser, server):
    "A visitor, and what their browser complained of"
    context = browser.new_context(viewport={'width': 1200, 'height': 900}, permissions=['clipboard-read', 'clipboard-write'])
    page = context.new_page()
    page.dialogs, page.outside = [], []
    page.on('dialog', lambda d: (page.dialogs.append(d.message), d.dismiss()))
    page.on('request', lambda r: None if r.url.startswith((server.url, 'data:', 'blob:')) else page.outside.append(r.url))
    page.goto(server.url)
    page.locator('#photo').wait_for()
    yield page
    assert not page.dialogs and not page.outside
    context.close()

def outcome(page):
    "Number of classes shown, and the sentence: of the page, or of Gradio for files that are not even called images"
    page.wait_for_function("document.querySelectorAll('#bars .bar').length || document.querySelector('#sentence p, .toast-body')", timeout=15_000)
    sentence = page.locator('#sentence p, .toast-body')
    return (0, sentence.first.inner_text()) if sentence.count() else (page.locator('#bars .bar').count(), '')

def clear(page):
    page.locator('#photo [aria-label="Remove image" i], #photo [aria-label="Clear" i]').first.click()
    page.wait_for_function("!document.querySelectorAll('#bars .bar').length && !document.querySelector('#sentence p')", timeout=15_000)

def choose(page, name, raw): page.locator('#photo input[type=file]').set_input_files({'name': name, 'mimeType': '', 'buffer': raw})

@pytest.mark.parametrize('name', FILES)
def test_every_file_and_a_good_one_after_it(page, server, name):
    raw, sentence = FILES[name]
    choose(page, name, raw)
    bars, said = outcome(page)
    if 'Only image/* allowed' in said: assert name in ('a.pdf', 'a.eps')
    else: assert (sentence in said and not bars) if sentence else (bars == 5 and not said)
    text = page.locator('body').inner_text()
    assert str(server.folder) not in text and 'Traceback' not in text and '/tmp' not in text
    if page.locator('.toast-body').count():
        page.locator('.toast-body button').first.click()
        page.locator('.toast-body').wait_for(state='detached')
    else: clear(page)
    choose(page, 'good.png', picture())
    assert outcome(page) == (5, '')

def test_a_file_of_30_megabytes_is_refused_and_a_good_one_answered(page):
    choose(page, 'big.jpg', bytes(30*2**20))
    page.get_by_text(re.compile('too large|exceeds|maximum', re.I)).first.wait_for(timeout=15_000)
    page.reload()
    choose(page, 'good.png', picture())
    assert outcome(page) == (5, '')

def test_paste(page):
    encoded = base64.b64encode(picture()).decode()
    page.evaluate("""async data => {
        const blob = await (await fetch('data:image/png;base64,' + data)).blob()
        await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]) }""", encoded)
    page.locator('#photo').locator('[aria-label*="paste" i]').first.click()
    assert outcome(page) == (5, '')

def test_keyboard_alone(page):
    "Tab reaches the upload, the switch and the examples in their order; Enter and Space do what a click does"
    page.wait_for_timeout(2000)  # until the page listens to keys
    reached = []
    for _ in range(20):
        page.keyboard.press('Tab')
        where = page.evaluate("() => { const e = document.activeElement; return (e.closest('#photo, #switch, #examples') || {id: ''}).id }")
        if where and (not reached or reached[-1] != where):
            reached.append(where)
            if where == 'photo':
                with page.expect_file_chooser(timeout=5_000) as chooser: page.keyboard.press('Enter')
                chooser.value.set_files({'name': 'a.png', 'mimeType': 'image/png', 'buffer': picture()})
                assert outcome(page) == (5, '')
            if where == 'switch':
                page.keyboard.press('Space')
                page.locator('#map img').wait_for(timeout=15_000)
            if where == 'examples':
                clear(page)
                page.locator('#examples button').first.focus()
                page.keyboard.press('Enter')
                assert outcome(page) == (5, '')
                break
    assert reached == ['photo', 'switch', 'examples']

def test_examples_have_names(page):
    buttons = page.locator('#examples button')
    assert buttons.count() == 4 and all(buttons.nth(k).get_attribute('aria-label') for k in range(4))

def test_a_phone(page):
    page.set_viewport_size({'width': 390, 'height': 844})
    choose(page, 'good.png', picture())
    assert outcome(page) == (5, '')
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    assert Image.open(io.BytesIO(page.screenshot(full_page=True))).width == 390
