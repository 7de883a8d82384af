"""The demo app: what its pages show is what the package promises."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from demo_site import SECRET, demo_module, ended, events, running_demo
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from asgi_sessions import InMemorySessionStore, session_hash


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    """The module `examples/demo.py`."""
    with demo_module() as module:
        yield module


@pytest.fixture
def store() -> InMemorySessionStore:
    """A fresh store in memory."""
    return InMemorySessionStore()


@pytest.fixture
def client(demo: ModuleType, store: InMemorySessionStore) -> Iterator[TestClient]:
    """A browser in front of the demo, where nothing is slow."""
    with TestClient(demo.build(store, SECRET, pause=0, slow=0)) as client:
        yield client


def second_browser(client: TestClient) -> TestClient:
    """Another browser at the same server."""
    return TestClient(client.app)


def facts(client: TestClient) -> dict[str, str]:
    """What the strip at the top of each page says."""
    answer: dict[str, str] = client.get("/session").json()
    return answer


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/", "Start the race"),
        ("/cart", "On the shelf"),
        ("/chat", "Hang up"),
        ("/socket", "/web/socket.js"),
        ("/account", "Sign in"),
        ("/web/socket.js", "new WebSocket("),
        ("/readme", "# asgi-server-sessions"),
        ("/code", "async def add_to_cart"),
    ],
)
def test_each_page_is_served(client: TestClient, path: str, content: str) -> None:
    """Each page answers 200, carries its content, and leaves no unfilled mark."""
    answer = client.get(path)
    assert answer.status_code == 200
    assert content in answer.text
    assert "{{" not in answer.text


def test_looking_stores_nothing(client: TestClient, store: InMemorySessionStore) -> None:
    """A visitor who only looks gets no cookie and no record."""
    for path in ("/", "/cart", "/chat", "/socket", "/account", "/session", "/readme", "/web/page.js"):
        assert "set-cookie" not in client.get(path).headers
    assert asyncio.run(store.count_active()) == 0


def test_sign_in_changes_the_id_and_keeps_the_cart(client: TestClient) -> None:
    """Signing in gives another cookie, the page names both ids by their hashes, and the cart stays."""
    client.post("/cart/add", data={"sku": "assam"})
    cookie, before = client.cookies["session"], facts(client)["id"]
    page = client.post("/sign-in", data={"name": "ann"}).text
    assert client.cookies["session"] != cookie
    after = facts(client)
    assert (after["user"], after["cart"]) == ("ann", "1")
    assert "Hello, ann" in page
    assert before in page
    assert after["id"] in page
    assert before != after["id"]


def test_a_session_is_named_as_in_the_log(client: TestClient) -> None:
    """By the hash that events have, so that its lines below the page can be told."""
    client.post("/cart/add", data={"sku": "assam"})
    session_id = client.cookies["session"].partition(".")[0]
    assert facts(client)["id"] == session_hash(session_id, SECRET)


def test_old_cookie_is_dead_after_sign_in(client: TestClient) -> None:
    """Who presents the id from before the sign-in is anonymous and gets nothing of the session."""
    client.post("/cart/add", data={"sku": "assam"})
    planted = client.cookies["session"]
    client.post("/sign-in", data={"name": "ann"})
    thief = second_browser(client)
    thief.cookies["session"] = planted
    assert facts(thief)["user"] == "anonymous"
    assert facts(thief)["cart"] == "0"


@pytest.mark.parametrize("name", ["ann -- lee", '"ann"', "ann;", "delete everything", "x" * 300])
def test_unusable_names_are_refused(client: TestClient, name: str) -> None:
    """A name that cannot be a user id gives the form again with the reason, and signs nobody in."""
    answer = client.post("/sign-in", data={"name": name})
    assert answer.status_code == 422
    assert "cannot be used" in answer.text
    assert facts(client)["user"] == "anonymous"


def test_names_are_escaped(client: TestClient) -> None:
    """What a visitor types comes back as text, never as markup or as a mark of the page's template."""
    page = client.post("/sign-in", data={"name": "<script>{{store}}</script>"}).text
    assert "Hello, &lt;script&gt;{{store}}&lt;/script&gt;" in page
    assert "<script>{{" not in page


def test_sign_out_removes_cookie_and_record(client: TestClient, store: InMemorySessionStore) -> None:
    """After signing out nothing is left, neither in the browser nor in the store."""
    client.post("/sign-in", data={"name": "ann"})
    client.post("/sign-out")
    assert "session" not in client.cookies
    assert asyncio.run(store.count_active()) == 0


def test_sign_out_everywhere_ends_the_other_browsers_session(client: TestClient) -> None:
    """Each browser of a user is listed, and signing out everywhere ends all of them, but no other user's."""
    other, stranger = second_browser(client), second_browser(client)
    other.post("/sign-in", data={"name": "ann"})
    stranger.post("/sign-in", data={"name": "bob"})
    page = client.post("/sign-in", data={"name": "ann"}).text
    assert f'<code class="id">{facts(other)["id"]}</code>' in page
    assert page.count("this browser") == 1
    client.post("/sign-out-everywhere")
    assert [facts(browser)["user"] for browser in (client, other, stranger)] == [
        "anonymous",
        "anonymous",
        "bob",
    ]


def test_cart_changed_in_place_survives(client: TestClient) -> None:
    """A product added twice counts twice, and the total is that of both products."""
    for sku in ("assam", "pot", "assam"):
        client.post("/cart/add", data={"sku": sku})
    assert facts(client)["cart"] == "3"
    assert "€ 46.80" in client.get("/cart").text


def test_product_taken_out_of_the_cart_is_gone(client: TestClient) -> None:
    """Removing takes the whole line and leaves the others."""
    for sku in ("assam", "pot", "assam"):
        client.post("/cart/add", data={"sku": sku})
    page = client.post("/cart/remove", data={"sku": "assam"}).text
    assert "Remove Teapot" in page
    assert "Remove Assam" not in page


def test_payment_empties_the_cart(client: TestClient) -> None:
    """What was paid is no longer in the cart, and nobody waits for it any more."""
    client.post("/cart/add", data={"sku": "assam"})
    assert "Nothing yet" in client.post("/cart/pay").text
    assert (facts(client)["cart"], facts(client)["turn"]) == ("0", "")


def test_a_poll_is_no_activity(client: TestClient, store: InMemorySessionStore) -> None:
    """An open page keeps no session alive, although it asks for the facts all the time."""
    client.post("/cart/add", data={"sku": "assam"})
    session_id = client.cookies["session"].partition(".")[0]
    before = asyncio.run(store.get(session_id))
    facts(client)
    after = asyncio.run(store.get(session_id))
    assert before is not None
    assert after is not None
    assert after.last_activity == before.last_activity


def test_unknown_product_is_not_found(client: TestClient) -> None:
    """What is not on the shelf is answered with 404 and nothing is stored."""
    assert client.post("/cart/add", data={"sku": "coffee"}).status_code == 404
    assert "session" not in client.cookies


def test_streamed_answer_counts_when_it_ends(client: TestClient) -> None:
    """A new visitor's answers come as events, the last of which tells the count that is stored."""
    for count in ("1", "2"):
        answer = client.post("/chat", data={"question": "Is <b>tea</b>\n\nevent: done good?"})
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer.text)
        assert [data for kind, data in told if kind == "done"] == [count]
        assert ("word", "<b>tea</b>") in told
        assert facts(client)["messages"] == count


def test_socket_counts_clicks(client: TestClient) -> None:
    """Each click is stored before it is answered, over one connection and the next."""
    client.post("/cart/add", data={"sku": "assam"})
    for start in (0, 2):
        with client.websocket_connect("/socket/clicks") as connection:
            for click in (1, 2):
                connection.send_text("click")
                assert connection.receive_text() == "stored"
                assert facts(client)["clicks"] == str(start + click)


def test_socket_begins_a_session(client: TestClient) -> None:
    """A new visitor's cookie rides on the accept, and names the session in which the clicks count."""
    with client.websocket_connect("/socket/clicks") as connection:
        headers: dict[bytes, bytes] = dict(connection.extra_headers or [])
        connection.send_text("click")
        connection.receive_text()
    client.cookies["session"] = headers[b"set-cookie"].decode().partition("=")[2].partition(";")[0]
    assert facts(client)["clicks"] == "1"


def test_socket_of_an_ended_session_closes(client: TestClient) -> None:
    """A click after the session ended elsewhere closes the socket and does not bring the session back."""
    client.post("/sign-in", data={"name": "ann"})
    with client.websocket_connect("/socket/clicks") as connection:
        client.post("/sign-out")
        connection.send_text("click")
        with pytest.raises(WebSocketDisconnect) as closed:
            connection.receive_text()
    assert closed.value.code == 4001
    assert facts(client)["user"] == "anonymous"


def test_race(client: TestClient, store: InMemorySessionStore) -> None:
    """With the lock all is stored, with versions the losers know, the naive way loses silently."""
    result = client.post("/race/run").json()
    versions, naive = result["versions"], result["naive"]
    for mode in ("locked", "auto"):
        counted = result[mode]
        assert (counted["acknowledged"], counted["stored"], counted["lost"]) == (10, 10, 0)
        assert counted["refused"] == 0
    assert versions["lost"] == 0
    assert versions["acknowledged"] + versions["refused"] == 10
    assert naive["acknowledged"] == 10
    assert naive["lost"] > 0
    assert asyncio.run(store.count_active()) == 0


def test_script_serves_until_it_is_interrupted() -> None:
    """`python examples/demo.py` says where it is, serves the home page, and ends cleanly by Ctrl-C."""
    with running_demo() as demo:
        page = httpx.get(demo.url, timeout=30)
        assert "Sessions that never lose a change" in page.text


def test_sessions_in_a_file_survive_a_restart(tmp_path: Path) -> None:
    """Everybody is still signed in, with their cart; the file's secret is kept beside it, for its owner."""
    file, cookies = tmp_path / "demo.db", httpx.Cookies()
    for run in range(3):
        with running_demo("--sqlite", str(file)) as demo:
            with httpx.Client(base_url=demo.url, timeout=30, cookies=cookies) as browser:
                if run == 0:
                    browser.post("/sign-in", data={"name": "ann"})
                browser.post("/cart/add", data={"sku": "pot"})
                facts = browser.get("/session").json()
                cookies = browser.cookies
            assert (facts["user"], facts["cart"]) == ("ann", str(run + 1))
    assert stat.S_IMODE((tmp_path / "demo.db.key").stat().st_mode) == 0o600


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    """The script ends with the reason."""
    (tmp_path / "demo.db").write_text("dear diary " * 1000)
    for path, reason in (("demo.db", "no SQLite database"), ("nowhere/demo.db", "no folder")):
        code, _, errors = ended("--port", "0", "--sqlite", str(tmp_path / path))
        assert code == 1
        assert errors.startswith("--sqlite: ")
        assert reason in errors


def test_a_port_in_use_is_named_with_the_remedy() -> None:
    """One sentence that names the port and `--port`, and no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, errors = ended("--port", str(port))
    assert code == 1
    assert errors.startswith(f"Port {port} is in use")
    assert "--port" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (("--port", "eighty"), 2, "'eighty' is no port: 0 to 65535"),
        (("--port", "65536"), 2, "'65536' is no port: 0 to 65535"),
        (("--host", "192.0.2.1", "--port", "0"), 1, "Cannot listen on 192.0.2.1"),
    ],
)
def test_an_address_that_cannot_be_used(options: tuple[str, ...], code: int, reason: str) -> None:
    """The script ends with the reason and names the option."""
    ended_with, _, errors = ended(*options)
    assert ended_with == code
    assert reason in errors
    assert options[0] in errors
    assert "Traceback" not in errors


def test_help_explains_each_option(demo: ModuleType) -> None:
    """None is left without a sentence, and each default is named."""
    for action in demo.command_line()._actions:
        assert action.help, action.dest
    text = " ".join(ended("--help")[1].split())
    for option in ("--host", "--port", "--sqlite", "--redis", "SESSION_SECRET"):
        assert option in text
    for default in ("127.0.0.1", "8000", "demo.db", "redis://127.0.0.1:6379/0", "in memory"):
        assert default in text


def test_ctrl_c_ends_a_stream_a_payment_and_a_socket() -> None:
    """None of them is waited for: the stream breaks off and counts nothing, the payment is taken back."""
    with running_demo() as demo, httpx.Client(base_url=demo.url, timeout=30) as browser:
        browser.post("/cart/add", data={"sku": "pot"})
        headers = {
            "cookie": f"session={browser.cookies['session']}",
            "user-agent": browser.headers["user-agent"],
        }
        address = f"ws://127.0.0.1:{demo.port}/socket/clicks"
        with connect(address, additional_headers=headers, user_agent_header=None) as clicks:
            with browser.stream("POST", "/chat", data={"question": "Is tea good?"}) as answer:
                parts = answer.iter_text()
                text = next(parts)
                with ThreadPoolExecutor() as threads:
                    payment = threads.submit(browser.post, "/cart/pay")
                    while not browser.get("/session").json()["turn"]:
                        assert not payment.done()
                    demo.interrupt()
                    text += "".join(parts)
                    assert payment.result().status_code == 503
            with pytest.raises(ConnectionClosed):
                clicks.recv(timeout=30)
        demo.process.wait(timeout=30)
    assert "word" in dict(events(text))
    assert "done" not in dict(events(text))


def test_hanging_up_is_not_counted() -> None:
    """Who leaves before a streamed answer ends is not counted, and the next request gets its turn."""
    with running_demo() as demo, httpx.Client(base_url=demo.url, timeout=30) as browser:
        with browser.stream("POST", "/chat", data={"question": "Is tea good?"}) as answer:
            next(answer.iter_text())
        assert browser.post("/cart/add", data={"sku": "pot"}).status_code == 303
        facts = browser.get("/session").json()
        assert (facts["cart"], facts["messages"]) == ("1", "0")


def test_clicks_over_a_real_connection() -> None:
    """Browser and server speak WebSocket: the cookie of the accept names the session that counts."""
    with running_demo() as demo, connect(f"ws://127.0.0.1:{demo.port}/socket/clicks") as connection:
        assert connection.request is not None
        assert connection.response is not None
        headers = {
            "cookie": connection.response.headers["set-cookie"].partition(";")[0],
            "user-agent": connection.request.headers["user-agent"],
        }
        connection.send("click")
        assert connection.recv() == "stored"
        facts = httpx.get(f"{demo.url}/session", headers=headers).json()
        assert facts["clicks"] == "1"
