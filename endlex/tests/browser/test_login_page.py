"""Logging in and out of a public server in a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from endlex.server.api.auth import create_token
from endlex.server.settings import Settings

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
pytestmark = pytest.mark.browser


def test_a_token_logs_in_once_and_stays_out_of_reach(
    page: Any, make_server: Callable[..., Any], tmp_path: Path
) -> None:
    token = create_token(tmp_path / "data", "me", ["read", "write"])
    server = make_server(Settings(public=True))
    page.goto(f"{server.url}/?q=tag%3Agood")
    page.wait_for_url("**/login?next=*")
    page.get_by_label("Token").fill("endlex_wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("[role=alert]")).not_to_be_empty()
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("searchbox")).to_have_value("tag:good")  # where it was going
    assert token not in page.url
    stored = page.evaluate("() => document.cookie + JSON.stringify({ ...localStorage })")
    assert "endlex_" not in stored  # scripts see neither the token nor the cookie
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/login")
    page.goto(server.url)
    page.wait_for_url("**/login?next=*")


@pytest.mark.parametrize("place", ["https://example.org/", "//example.org/", "/\\example.org"])
def test_logging_in_leads_to_no_other_site(
    page: Any, make_server: Callable[..., Any], tmp_path: Path, place: str
) -> None:
    token = create_token(tmp_path / "data", "me", ["read"])
    server = make_server(Settings(public=True))
    page.goto(f"{server.url}/login")
    page.evaluate("(next) => history.replaceState(null, '', '/login?next=' + next)", place)
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_selector(".list-toolbar")
    assert page.url.startswith(server.url)
