"""The upper part of a frame: the daemon, each model with its pages, and the services.

Four levels of detail; the richest one that fits its share of the screen is taken:
    3  as 2, and a line for each service
    2  a line of counts and a bar of pages for each model (and a bar of host pages), one line of services
    1  a line for each model, one line of services
    0  a line for each model as far as there is room; services only if something is wrong with them
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from llmos.client.types import LaneStatus, ServiceStatus, StatusReply, TenantRow
from llmos.codes import ServiceState
from llmos.ctl.render import duration, percent, state_name
from llmos.ctl.render_tenants import short_count
from llmos.ctl.top.look import (
    SERVICE_STYLES,
    Look,
    Piece,
    arrange,
    clean,
    cut,
    line,
    pad,
    sparkline,
    spread,
)
from llmos.ctl.top.state import State

_LABEL = 9  # cells in front of bars
_WRONG_FIRST = (
    ServiceState.FATAL, ServiceState.BACKOFF, ServiceState.STOPPED, ServiceState.STOPPING, ServiceState.STARTING,
    ServiceState.RUNNING,
)  # fmt: skip


def title(state: State, width: int, look: Look, now: float) -> Text:
    """The first line: the daemon, what the table shows, how fast it is, how often it is asked."""
    if state.polled is None:
        alarm = Piece(f" {cut(state.trouble, width - 2, look.glyphs)} ", look.alarm)
        return arrange(
            [alarm if state.trouble else Piece("llmosd", "bold")], [Piece(_pace(state), "dim", 1)], width, look
        )
    status = state.polled.status
    left = [
        Piece("llmosd", "bold"),
        Piece(clean(status.version), "", 5),
        Piece(f"up {duration(status.uptime_ms)}", "", 3),
    ]
    if state.trouble:
        text = f" {cut(state.trouble, width - 2, look.glyphs)} "
        ago = f"last answer {duration((now - state.polled.at) * 1000)} ago"
        return arrange([Piece(text, look.alarm)], [Piece(ago, "", 1)], width, look)
    listing = state.sequences
    shown = f"{len(listing.rows)} of {listing.total}" if listing.filter else str(listing.total)
    left.append(Piece(f"{shown} sequence{'' if listing.total == 1 else 's'}", "", 1))
    total = state.total_throughput
    speed = "" if total is None else f"{short_count(total)} tok/s"
    curve = sparkline(list(state.history), 20 if width < 120 else 40, look.glyphs) if look.live else ""
    right = [
        Piece(curve, "green", 4),
        Piece(speed, "bold", 0),
        Piece(_pace(state) if look.live else "", "dim" if not state.paused else "bold yellow", 2),
    ]
    return arrange(left, right, width, look)


def _pace(state: State) -> str:
    return "PAUSED" if state.paused else f"every {state.interval_s:g}s"


def header(state: State, width: int, height: int, look: Look) -> list[Text]:
    """At most `height` lines under the title."""
    if state.polled is None or height <= 0:
        return []
    status, tenants = state.polled.status, state.polled.tenants
    made: list[Text] = []
    for level in (3, 2, 1, 0):
        made = _models(state, status, tenants, width, look, level)
        made += _services(status.services, width, look, level)
        if len(made) <= height and (level < 3 or height >= 2 * len(made)):
            return made
    wrong = _services(status.services, width, look, 0)
    room = height - len(wrong)
    models = _models(state, status, tenants, width, look, 0)
    if 0 < room < len(models):
        hidden = len(models) - room + 1
        models[room - 1 :] = [line((cut(f"and {hidden} more models", width, look.glyphs), "dim"))]
    return [*models[: max(0, room)], *wrong][:height]


def _models(
    state: State, status: StatusReply, tenants: Sequence[TenantRow], width: int, look: Look, level: int
) -> list[Text]:
    made: list[Text] = []
    several = len(status.lanes) > 1
    for lane in status.lanes:
        mine = [row for row in tenants if row.model == lane.model]
        if level < 2:
            made.append(_short_model(state, lane, mine, width, look))
            continue
        speed = state.throughput(lane.model) if several else None
        made.append(_model(lane, speed, width, look))
        if lane.ready:
            made.append(_pages(state, lane, mine, width, look))
        if lane.ready and lane.host_pages_total:
            made.append(_host_pages(lane, width, look))
    if not status.lanes:
        made.append(line((cut("no model is served", width, look.glyphs), "dim")))
    return made


def _counts(lane: LaneStatus) -> list[Piece]:
    shown = (
        (lane.running, "running", "green", 0),
        (lane.waiting, "waiting", "yellow", 0),
        (lane.blocked, "blocked", "cyan", 1),
        (lane.suspended, "suspended", "bright_blue", 2),
    )
    return [
        Piece(f"{short_count(count)} {word}", style if count else "dim", rank) for count, word, style, rank in shown
    ]


def _name(lane: LaneStatus, width: int, look: Look) -> Piece:
    name = clean(lane.model)
    return Piece(
        pad(name, _LABEL - 1) if cell_len(name) < _LABEL else cut(name, max(8, width // 3), look.glyphs), "bold"
    )


def _model(lane: LaneStatus, speed: float | None, width: int, look: Look) -> Text:
    if not lane.ready:
        return arrange([_name(lane, width, look), Piece("starting", "yellow")], [], width, look)
    left = [_name(lane, width, look), *_counts(lane)]
    hits = percent(lane.prefix_hit_tokens, lane.prefix_query_tokens)
    right = [
        Piece(f"{lane.preemptions} preempted" if lane.preemptions else "", "", 8),
        Piece(f"{lane.deadline_misses} deadlines missed" if lane.deadline_misses else "", "red", 7),
        Piece(f"cache hits {hits}", "", 6),
        Piece(f"context {short_count(lane.max_context)}", "dim", 9),
        Piece(f"{clean(lane.device)} {clean(lane.dtype)}", "dim", 5),
        Piece("" if speed is None else f"{short_count(speed)} tok/s", "bold", 3),
    ]
    return arrange(left, right, width, look)


def _short_model(state: State, lane: LaneStatus, mine: Sequence[TenantRow], width: int, look: Look) -> Text:
    """Counts and pages in one line."""
    if not lane.ready:
        return _model(lane, None, width, look)
    used = percent(lane.pages_total - lane.pages_free, lane.pages_total)
    pieces = [
        _name(lane, width, look),
        Piece(f"{short_count(lane.running)} run", "green" if lane.running else "dim"),
        Piece(f"{short_count(lane.waiting)} wait", "yellow" if lane.waiting else "dim"),
    ]
    made = arrange(pieces, [], width, look)
    room = width - made.cell_len - len(used) - 4
    if room < 10:
        return arrange(pieces, [Piece(f"pages {used}", "", 1)], width, look)
    return made.append("  ").append_text(_page_bar(state, lane, mine, room, look)).append(f"  {used}")


def _pages(state: State, lane: LaneStatus, mine: Sequence[TenantRow], width: int, look: Look) -> Text:
    used = lane.pages_total - lane.pages_free
    return _bar_line("pages", lambda room: _page_bar(state, lane, mine, room, look), used, lane.pages_total, width)


def _host_pages(lane: LaneStatus, width: int, look: Look) -> Text:
    used = lane.host_pages_total - lane.host_pages_free
    parts = [("swapped", used, "magenta", look.glyphs.full), ("free", lane.host_pages_free, "dim", look.glyphs.free)]
    return _bar_line("host", lambda room: _bar(parts, room, look), used, lane.host_pages_total, width)


def _bar_line(label: str, bar: Callable[[int], Text], used: int, total: int, width: int) -> Text:
    end = f"{short_count(used)}/{short_count(total)} {percent(used, total):>4}"
    room = width - _LABEL - 1 - len(end) - 1
    if room < 10:
        end = f"{percent(used, total):>4}"
        room = width - _LABEL - len(end) - 2
    made = line((pad(label, _LABEL + 1), "dim"))
    return made.append_text(bar(room)).append(f" {end}")


def _page_bar(state: State, lane: LaneStatus, mine: Sequence[TenantRow], width: int, look: Look) -> Text:
    """Who has the pages. Shared pages count for each of their tenants, so tenants may have more than is used, together."""
    used = max(0, lane.pages_total - lane.pages_free - lane.pages_cached)
    held: dict[str, int] = defaultdict(int)
    for row in mine:
        held[row.tenant] += row.pages
    known = sum(held.values())
    scale = min(1.0, used / known) if known else 1.0
    owners = sorted((name for name in held if held[name]), key=lambda name: -held[name])
    full = look.glyphs.full
    parts = [(clean(name), held[name] * scale, state.owner_styles.get(name, ""), full) for name in owners]
    parts.append(("others", max(0.0, used - known), "white", full))
    parts.append(("cached", lane.pages_cached, "dim", look.glyphs.cached))
    parts.append(("free", lane.pages_free, "dim", look.glyphs.free))
    return _bar(parts, width, look)


def _bar(parts: Sequence[tuple[str, float, str, str]], width: int, look: Look) -> Text:
    """A bar of (name, count, style, fill), the names written into it: what colours say, words say, too."""
    made = line()
    for (name, _, style, fill), cells in zip(parts, spread([part[1] for part in parts], width)):
        solid = fill == look.glyphs.full
        if solid:
            shown = _segment_name(name, cells, look)
        else:
            shown = name if cell_len(name) < cells else ""
        made.append(shown, f"reverse {style}" if solid else style or None)
        made.append(fill * (cells - cell_len(shown)), style or None)
    return made


def _segment_name(name: str, cells: int, look: Look) -> str:
    """What of a name goes into a solid segment, which ends with its fill so that it does not touch the next one's name."""
    if cells < 4:
        return set_cell_size(name, min(cells, max(1, cells - 1), cell_len(name)))
    return cut(name, cells - 1, look.glyphs)


def _services(services: Sequence[ServiceStatus], width: int, look: Look, level: int) -> list[Text]:
    if level == 3:
        return [_service(each, width, look) for each in services]
    if level == 0:
        services = [each for each in services if each.state != ServiceState.RUNNING]
    return [_all_services(services, width, look)] if services else []


def _service(each: ServiceStatus, width: int, look: Look) -> Text:
    word = state_name(ServiceState, each.state)
    left = [
        Piece(pad(clean(each.name), 24, glyphs=look.glyphs)),
        Piece(pad(word, 9), _service_style(each)),
        Piece(f"up {duration(each.uptime_ms):<6}", "", 2),
        Piece(
            f"{each.restarts} restart{' ' if each.restarts == 1 else 's'}", "bold yellow" if each.restarts else "dim", 1
        ),
        Piece(f"pid {each.pid:<8}" if each.pid else "", "dim", 3),
    ]
    room = width - sum(cell_len(piece.text) + 2 for piece in left)
    return arrange([*left, Piece(cut(clean(each.detail), max(0, room), look.glyphs), "", 4)], [], width, look)


def _all_services(services: Sequence[ServiceStatus], width: int, look: Look) -> Text:
    """By state, what is wrong first; the word once for all of them. Where room is short, names of healthy ones are left out."""
    order: dict[int, int] = {state: number for number, state in enumerate(_WRONG_FIRST)}
    found: dict[int, list[ServiceStatus]] = defaultdict(list)
    for each in sorted(services, key=lambda each: (order.get(each.state, -1), -each.restarts)):
        found[each.state].append(each)
    made = _grouped(found, brief=False)
    if made.cell_len > width:
        made = _grouped(found, brief=True)
    if made.cell_len > width:
        made.truncate(width - 1, overflow="crop")
        made.append(look.glyphs.dots)
    return made


def _grouped(found: dict[int, list[ServiceStatus]], *, brief: bool) -> Text:
    made = line((pad("services", _LABEL), "dim"))
    for value, group in found.items():
        healthy = [each for each in group if value == ServiceState.RUNNING and not each.restarts] if brief else []
        all_well = len(found) == 1 and len(healthy) == len(group)
        made.append(" " if value == next(iter(found)) else "  ").append(f"all {len(group)} " if all_well else "")
        made.append(state_name(ServiceState, value), _service_style(group[0]))
        for each in group:
            if each not in healthy:
                made.append(f" {clean(each.name)}")
                if each.restarts:
                    made.append(f" ({each.restarts} restart{'' if each.restarts == 1 else 's'})", "bold yellow")
        if healthy and not all_well:
            made.append(f" {len(healthy)} others")
    return made


def _service_style(each: ServiceStatus) -> str:
    return SERVICE_STYLES.get(each.state, "bold red")
