"""The page in a real browser against a whole daemon: chat, the live view, its verbs, and that it asks nobody else. Needs Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import FAKE, running

from llmos.services.executor.fake import STEP_MS_VARIABLE

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("no Chromium on this machine", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=30_000)
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PICTURES = os.environ.get("LLMOS_PAGE_PICTURES")  # a folder: to look at


@pytest.fixture(scope="module")
def daemon():
    os.environ[STEP_MS_VARIABLE] = "50"
    try:
        with running(FAKE + '\n[http]\naddress = "127.0.0.1:0"\n') as started:
            yield started
    finally:
        del os.environ[STEP_MS_VARIABLE]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield launched
        launched.close()


def ctl(daemon, *arguments):
    command = [Path(sys.executable).with_name("llmosctl"), "--run-dir", str(daemon.run_dir), *arguments, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


def enter(browser, daemon, size=DESKTOP):
    """(page, what it asked for, its errors), in through a one-time link."""
    context = browser.new_context(viewport=size)
    page = context.new_page()
    page.set_default_timeout(30_000)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(ctl(daemon, "open")["url"])
    expect(page.locator("main")).to_be_visible()
    return page, asked, errors


def picture(page, name):
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png")


def say(page, text, most=40):
    page.locator("#most").fill(str(most))
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def row_of(page, state):
    return page.locator("#sequences tbody tr").filter(has=page.locator(f".dot.{state}")).first


def test_a_chat_streams_its_answer_and_a_second_message_goes_on(browser, daemon):
    page, asked, errors = enter(browser, daemon)
    say(page, "hello")
    notes = page.locator("#talk article.assistant footer")
    expect(notes.last).to_contain_text("40 tokens, length")
    say(page, "and again", most=8)
    expect(notes).to_have_count(2)
    expect(notes.last).to_contain_text("8 tokens, length")
    picture(page, "chat-desktop")
    page.locator("#anew").click()
    expect(page.locator("#talk article.assistant")).to_have_count(0)
    assert errors == []
    assert {url.split("/")[2] for url in asked} == {page.url.split("/")[2]}, "it asks only the gateway that served it"
    page.context.close()


def test_suspend_resume_fork_and_kill_from_the_table(browser, daemon):
    page, _, errors = enter(browser, daemon)
    say(page, "run", most=5000)
    running_row = row_of(page, "running")
    expect(running_row).to_be_visible()
    rid = running_row.locator("td").first.inner_text()
    running_row.get_by_role("button", name=f"suspend {rid}").click(force=True)
    expect(row_of(page, "suspended")).to_contain_text(rid)
    assert [row["rid"] for row in ctl(daemon, "ps") if row["state"] == "suspended"] == [int(rid)]
    page.get_by_role("button", name=f"resume {rid}").click(force=True)
    expect(row_of(page, "running")).to_contain_text(rid)
    page.get_by_role("button", name=f"fork {rid}").click(force=True)
    expect(page.locator("#sequences tbody tr")).to_have_count(2)
    picture(page, "machine-desktop")
    for row in ctl(daemon, "ps"):
        page.get_by_role("button", name=f"kill {row['rid']}").click(force=True)
    expect(page.locator("#sequences tbody")).to_contain_text("Nobody is here")
    expect(page.locator("#talk article.assistant footer")).to_contain_text("killed", ignore_case=True)
    assert ctl(daemon, "ps") == []
    assert errors == []
    page.context.close()


def test_on_a_phone_one_view_at_a_time_and_nothing_sticks_out(browser, daemon):
    page, _, _ = enter(browser, daemon, PHONE)
    expect(page.locator("#machine")).to_be_hidden()
    say(page, "hello", most=8)
    expect(page.locator("#talk article.assistant footer")).to_contain_text("8 tokens")
    picture(page, "chat-phone")
    page.locator("#tab-machine").click()
    expect(page.locator("#chat")).to_be_hidden()
    expect(page.locator("#services tbody")).to_contain_text("microkernel")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    picture(page, "machine-phone")
    page.context.close()


def test_a_stranger_is_asked_for_a_key_and_a_wrong_one_is_refused(browser, daemon):
    url = ctl(daemon, "env")["OPENAI_BASE_URL"].removesuffix("/v1")
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#door")).to_be_visible()
    expect(page.locator("main")).to_be_hidden()
    page.locator("#key").fill("llmos_sk_wrong")
    page.get_by_role("button", name="Enter").click()
    expect(page.locator("#door-error")).not_to_be_empty()
    picture(page, "door-desktop")
    page.locator("#key").fill(ctl(daemon, "env")["OPENAI_API_KEY"])
    page.get_by_role("button", name="Enter").click()
    expect(page.locator("main")).to_be_visible()
    page.locator("#leave").click()
    expect(page.locator("#door")).to_be_visible()
    context.close()


def test_text_of_models_and_people_is_never_markup(browser, daemon):
    page, _, errors = enter(browser, daemon)
    say(page, "<img src=x onerror=document.title='owned'>", most=2)
    expect(page.locator("#talk article.user")).to_have_text("<img src=x onerror=document.title='owned'>")
    expect(page).to_have_title("llmos")
    assert page.locator("#talk img").count() == 0
    assert errors == []
    page.context.close()
