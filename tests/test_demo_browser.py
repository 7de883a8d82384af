"""The demo's pages in a real Chromium: what somebody sees, hears and can do there without a mouse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from types import ModuleType

import pytest
from browser import Chromium, Tab, served
from demo_site import SECRET, demo_module, running_demo

from asgi_sessions import InMemorySessionStore

PAGES = ("/", "/cart", "/chat", "/socket", "/account")
SCREENS = {"desktop": (1280, 800), "phone": (390, 844), "small phone": (320, 640)}
LONG_NAME = "Wolfeschlegelsteinhausenbergerdorff" * 7  # 245 characters without a space
FOCUS_ON_NOTHING = "document.activeElement === document.body"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    """The module `examples/demo.py`."""
    with demo_module() as module:
        yield module


@pytest.fixture
def url(demo: ModuleType) -> Iterator[str]:
    """The demo, where a payment is as slow as it is for everybody."""
    with served(demo.build(InMemorySessionStore(), SECRET, pause=0.02)) as port:
        yield f"http://127.0.0.1:{port}"


def press(tab: Tab, button: str) -> None:
    """Use a button by the keyboard."""
    tab.run(f"document.querySelector({json.dumps(button)}).focus()")
    tab.press("Enter")


def text_of(place: str) -> str:
    """The text of an element, as an expression of the page."""
    return f"document.querySelector({json.dumps(place)})?.textContent"


def shows(tab: Tab, place: str, text: str) -> None:
    """Wait until the text stands there."""
    tab.until(f"!!{text_of(place)}?.includes({json.dumps(text)})")


def sign_in(tab: Tab, url: str, name: str) -> None:
    """Sign in by the form."""
    tab.open(url + "/account")
    tab.run("document.querySelector('#name').focus()")
    tab.type(name)
    tab.press("Enter")
    shows(tab, "h1", f"Hello, {name}")


@pytest.mark.parametrize("screen", SCREENS)
def test_the_first_screen_says_what_it_is(url: str, tab: Tab, screen: str) -> None:
    """What the library is, its README and the code are seen without scrolling; the race comes first."""
    tab.screen(*SCREENS[screen])
    page = tab.open(url + "/")
    assert "keeps the sessions of any Python ASGI app on the server" in page
    for place in ("h1", ".lead", "a.button[href='/readme']", "a.button[href='/code']"):
        assert tab.run(f'document.querySelector("{place}").getBoundingClientRect().bottom <= innerHeight')
    assert tab.run(text_of("nav a")) == "Race"
    assert tab.run(
        "document.querySelector('main section + section').contains(document.querySelector('#run'))"
    )
    assert "# asgi-server-sessions" in tab.open(url + "/readme")
    assert "async def add_to_cart" in tab.open(url + "/code")


def test_the_race_tells_its_result(url: str, tab: Tab) -> None:
    """In words, in a live region, and beside each bar."""
    tab.open(url + "/")
    press(tab, "#run")
    shows(tab, "#result", "With a lock, 10 of 10 writes are stored.")
    assert tab.run("document.querySelector('#result').getAttribute('role')") == "status"
    assert "10 stored, 0 lost" in str(tab.run(text_of("#auto .verdict")))
    assert " lost, " in str(tab.run(text_of("#naive .verdict")))
    tab.until("document.querySelector('#auto .stored').getBoundingClientRect().width > 200")


def test_the_parts_of_a_bar_differ_without_colour(url: str, tab: Tab) -> None:
    """One is plain, one has stripes, one has dots, in the bars and in the key that explains them."""
    tab.open(url + "/")
    for place in (".bar", ".key"):
        kinds = [
            str(tab.run(f"getComputedStyle(document.querySelector('{place} .{part}')).backgroundImage"))
            for part in ("stored", "refused", "lost")
        ]
        assert [kind.partition("(")[0] for kind in kinds] == [
            "none",
            "repeating-linear-gradient",
            "radial-gradient",
        ]


def test_one_number_of_clicks(url: str, tab: Tab) -> None:
    """The page's number and the strip's are the same at all times, also for clicks of another tab."""
    other = tab.another()
    for each in (tab, other):
        each.open(url + "/socket")
        each.run("""
            window.different = 0
            new MutationObserver(() => {
                const [page, strip] = document.querySelectorAll("[data-fact=clicks]")
                if (page.textContent !== strip.textContent) different++
            }).observe(document.body, { subtree: true, childList: true, characterData: true })
        """)
    for count, each in enumerate((tab, tab, other, tab, other), 1):
        press(each, "#click")
        shows(each, "output", str(count))
    for each in (tab, other):
        shows(each, "output", "5")
        shows(each, "dd[data-fact=clicks]", "5")
        assert each.run("different") == 0


def test_the_second_tab_waits_for_its_turn(url: str, tab: Tab) -> None:
    """It says so while a checkout holds the session; then both tabs' changes are there."""
    tab.open(url + "/cart")
    press(tab, "#add-sencha")
    shows(tab, "#your-cart + ul", "Sencha")
    other = tab.another()
    other.open(url + "/cart")
    press(tab, "#pay")
    shows(tab, "#notice", "Paying.")
    press(other, "#add-pot")
    shows(other, "#notice", "Waiting for its turn: a checkout in another tab comes first.")
    shows(other, "#your-cart + ul", "Teapot")
    assert "Sencha" not in str(other.run(text_of("#your-cart + ul")))
    assert other.run(text_of("#notice")) == ""
    shows(tab, "#said", "Paid.")
    shows(tab, "dd[data-fact=cart]", "1")


def test_a_session_that_was_ended_elsewhere_says_so(url: str, tab: Tab, chromium: Chromium) -> None:
    """On each page and without a click; the button leads to a page that begins anew, with the focus on it."""
    sign_in(tab, url, "ann")
    tabs = [tab.another() for _ in PAGES]
    for each, page in zip(tabs, PAGES, strict=True):
        each.open(url + page)
    with chromium.profile() as elsewhere:
        sign_in(elsewhere, url, "ann")
        press(elsewhere, "#sign-out-everywhere")
        for each in tabs:
            shows(each, "#notice", "This session has ended.")
            assert each.run(text_of("dd[data-fact=user]")) == "anonymous"
            press(each, "#notice button")
            each.until("document.activeElement?.id === 'title'")
            assert each.run(text_of("#notice")) == ""


def test_a_click_after_the_end_brings_nothing_back(url: str, tab: Tab, chromium: Chromium) -> None:
    """The socket says why it is closed; the next click begins a new session."""
    sign_in(tab, url, "ann")
    tab.open(url + "/socket")
    press(tab, "#click")
    shows(tab, "#state", "stored")
    with chromium.profile() as elsewhere:
        sign_in(elsewhere, url, "ann")
        press(elsewhere, "#sign-out-everywhere")
        shows(elsewhere, "h1", "Sign in")
    press(tab, "#click")
    shows(tab, "#state", "This session has ended, so the click is not stored.")
    press(tab, "#click")
    shows(tab, "output", "1")
    assert tab.run(text_of("dd[data-fact=user]")) == "anonymous"


def test_a_sign_in_of_another_tab_is_told(url: str, tab: Tab) -> None:
    """The session has a new id then, and the page may be out of date."""
    tab.open(url + "/cart")
    press(tab, "#add-pot")
    shows(tab, "dd[data-fact=cart]", "1")
    sign_in(tab.another(), url, "ann")
    shows(tab, "#notice", "Another tab signed in or out")
    shows(tab, "dd[data-fact=user]", "ann")


def test_the_focus_never_falls_to_the_body(url: str, tab: Tab) -> None:
    """Whatever was used goes, waits, or is replaced: something sensible has the focus at each moment."""
    steps = [
        ("/cart", "#add-sencha", "#your-cart + ul", "Sencha", "add-sencha"),
        ("/cart", "#remove-sencha", "#said", "no longer in the cart", "your-cart"),
        ("/cart", "#add-pot", "#your-cart + ul", "Teapot", "add-pot"),
        ("/cart", "#pay", "#said", "Paid", "your-cart"),
        ("/", "#run", "#result", "With a lock", "run"),
        ("/socket", "#click", "#state", "stored", "click"),
        ("/chat", "#send", "#talk", "Counted and stored", "send"),
        ("/chat", "#stop", "#talk", "You hung up", "stop"),
        ("/account", "#sign-in", "h1", "Hello, ann", "title"),
        ("/account", "#sign-out", "#said", "You are signed out.", "title"),
    ]
    for page, button, place, text, focused in steps:
        tab.open(url + page)
        tab.run("{ const field = document.querySelector('main input'); if (field) field.value = 'ann' }")
        tab.run(f"document.querySelector('{button}').focus()")
        tab.run(f"window.fallen = 0; setInterval(() => {FOCUS_ON_NOTHING} && fallen++, 1)")
        if button == "#stop":
            press(tab, "#send")
            tab.until("document.querySelector('.answer')?.textContent.length > 10")
        press(tab, button)
        shows(tab, place, text)
        assert tab.run("document.activeElement.id") == focused
        assert tab.run("fallen") == 0, (page, button)


def test_a_name_that_is_refused_has_the_focus(url: str, tab: Tab) -> None:
    """The field is marked, and what is wrong is an alert that belongs to it."""
    tab.open(url + "/account")
    tab.run("document.querySelector('#name').focus()")
    tab.type("'; DROP TABLE tea; --")
    tab.press("Enter")
    shows(tab, "#name-error", "That name cannot be used")
    assert tab.run("document.activeElement.id") == "name"
    assert tab.run("document.activeElement.getAttribute('aria-invalid')") == "true"
    assert "name-error" in str(tab.run("document.activeElement.getAttribute('aria-describedby')"))
    assert tab.run("document.querySelector('#name-error').getAttribute('role')") == "alert"


def test_results_are_read_aloud(url: str, tab: Tab) -> None:
    """Each place where a result appears is a live region; a streamed answer is read when it is complete."""
    tab.open(url + "/chat")
    assert tab.run("document.querySelector('#talk').getAttribute('role')") == "log"
    tab.run("document.querySelector('#question').focus()")
    tab.type("Is tea good?")
    tab.press("Enter")
    tab.until("document.querySelector('#talk').ariaBusy === 'true'")
    shows(tab, "#talk", "Counted and stored")
    tab.until("document.querySelector('#talk').ariaBusy === 'false'")
    tab.open(url + "/cart")
    for place in ("#notice", "#said"):
        assert tab.run(f"document.querySelector('{place}').getAttribute('role')") == "status"
    press(tab, "#add-pot")
    shows(tab, "#said", "Teapot is in the cart.")


CONTRASTS = """
(() => {
    const channels = colour => colour.match(/[\\d.]+/g).map(Number)
    const bright = colour => {
        const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4
        const [red, green, blue] = channels(colour).map(c => linear(c / 255))
        return .2126 * red + .7152 * green + .0722 * blue
    }
    const ground = element => {
        const colour = getComputedStyle(element).backgroundColor
        return (channels(colour)[3] ?? 1) === 1 ? colour : ground(element.parentElement)
    }
    return [...document.querySelectorAll("input, button, .button, .bar")].map(element => {
        const [edge, around] = [getComputedStyle(element).borderTopColor, ground(element.parentElement)]
        const [low, high] = [bright(edge), bright(around)].sort((a, b) => a - b)
        return [element.id || element.className, (high + .05) / (low + .05)]
    })
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_edges_of_controls_can_be_seen(url: str, tab: Tab, dark: bool) -> None:
    """Each field, button and bar has a border of 3:1 against what is around it (WCAG 1.4.11)."""
    tab.screen(1280, 800, dark=dark)
    for page in PAGES:
        tab.open(url + page)
        contrasts = tab.run(CONTRASTS)
        assert isinstance(contrasts, list)
        assert contrasts
        assert [each for each in contrasts if each[1] < 3] == []


def test_a_long_name_fits_a_small_screen(url: str, tab: Tab) -> None:
    """No page scrolls sideways at 320 px, and the name is there in full."""
    tab.screen(320, 640)
    sign_in(tab, url, LONG_NAME)
    assert tab.run("document.querySelector('h1').scrollWidth <= document.querySelector('h1').clientWidth")
    tab.open(url + "/cart")
    press(tab, "#add-sencha")
    shows(tab, "#your-cart + ul", "Sencha")
    for page in PAGES:
        tab.open(url + page)
        assert tab.run("document.documentElement.scrollWidth <= innerWidth"), page
        inside = "element => element.getBoundingClientRect().right <= innerWidth"
        assert tab.run(f"[...document.querySelectorAll('main *')].every({inside})"), page


def test_a_server_that_is_gone(tab: Tab) -> None:
    """The page says so with a button to try again, and goes on when the server is back."""
    with running_demo() as demo:
        tab.open(demo.url + "/cart")
    shows(tab, "#notice", "The server does not answer.")
    press(tab, "#notice button")
    press(tab, "#add-pot")
    shows(tab, "#notice", "The server does not answer.")
    assert tab.run(text_of("#notice button")) == "Try now"
    with running_demo(port=demo.port):
        tab.until(f"{text_of('#notice')} === ''")
        press(tab, "#add-pot")
        shows(tab, "#your-cart + ul", "Teapot")
    shows(tab, "#notice", "The server does not answer.")
    with running_demo(port=demo.port):
        shows(tab, "#notice", "This session has ended.")


@pytest.mark.parametrize(
    ("page", "button", "place"),
    [("/", "#run", "#result"), ("/chat", "#send", "#talk"), ("/socket", "#click", "#state")],
)
def test_each_page_says_that_the_server_is_gone(tab: Tab, page: str, button: str, place: str) -> None:
    """Where its result would stand, and the button can be used again."""
    with running_demo() as demo:
        tab.open(demo.url + page)
        tab.run(
            "{ const field = document.querySelector('main input'); if (field) field.value = 'Is tea good?' }"
        )
    before = tab.run(text_of(place))
    press(tab, button)
    tab.until(f"{text_of(place)} !== {json.dumps(before)} && !/connecting|race is on/.test({text_of(place)})")
    tab.until(f"/does not answer|is gone|broke off/.test({text_of(place)})")
    assert tab.run(f"document.querySelector('{button}').ariaDisabled") != "true"


FLAWS = """
    axe.run({ resultTypes: ["violations"] })
        .then(report => report.violations)
        .then(flaws => flaws.map(flaw => flaw.id + ": " + flaw.nodes.map(node => node.html).join(" | ")))
"""


def flaws(tab: Tab) -> object:
    """What axe finds wrong with the page as it is now, once nothing moves any more."""
    tab.run("Promise.all(document.getAnimations().map(each => each.finished.catch(() => null)))")
    axe = resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    tab.run(f"{axe}; null")
    return tab.run(FLAWS)


@pytest.mark.parametrize(("screen", "dark"), [("desktop", False), ("small phone", True)])
def test_axe_finds_nothing(url: str, tab: Tab, screen: str, dark: bool) -> None:
    """On no page, before and after what it is for, nor while a notice stands there."""
    tab.screen(*SCREENS[screen], dark=dark)
    for page in PAGES:
        tab.open(url + page)
        assert flaws(tab) == [], page
    sign_in(tab, url, "ann")
    assert flaws(tab) == []
    for page, button, place, text in [
        ("/cart", "#add-pot", "#said", "Teapot"),
        ("/", "#run", "#result", "With a lock"),
        ("/chat", "#send", "#talk", "Counted"),
        ("/socket", "#click", "#state", "stored"),
    ]:
        tab.open(url + page)
        tab.run(
            "{ const field = document.querySelector('main input'); if (field) field.value = 'Is tea good?' }"
        )
        press(tab, button)
        shows(tab, place, text)
        assert flaws(tab) == [], page
    other = tab.another()
    other.open(url + "/account")
    press(other, "#sign-out")
    shows(tab, "#notice", "This session has ended.")
    assert flaws(tab) == []
