// The live view: models with their page pool by tenant, sequences with their verbs, services. Asks once a second while it is seen.

import { get, post } from "./api.js";
import { duration, find, make, toast } from "./dom.js";

const CELLS = 240;
const POINTS = 60;
const MOST_ROWS = 200;
const rates = new Map(); // model -> {tokens, at, points}

export async function look() {
  const [status, sequences, tenants] = await Promise.all([
    get("/llmos/v1/status"), get("/llmos/v1/sequences"), get("/llmos/v1/tenants"),
  ]);
  find("lanes").replaceChildren(...status.lanes.map((lane) => showLane(lane, tenants.tenants.filter((row) => row.model === lane.model))));
  showSequences(sequences.sequences);
  showServices(status.services);
  const down = status.services.filter((service) => service.state !== "running").map((service) => service.name);
  find("state").className = down.length ? "bad" : "";
  find("state").textContent = down.length ? `${down.join(", ")}: not running` : `llmos ${status.version}, up ${duration(status.uptime_ms)}`;
}

function hue(name) {
  let hash = 0;
  for (const letter of name) hash = (hash * 31 + letter.codePointAt(0)) >>> 0;
  return `hsl(${hash % 360} 55% 50%)`;
}

function rate(lane) {
  const now = performance.now();
  const seen = rates.get(lane.model) || { tokens: lane.tokens_committed, at: now, points: [] };
  const seconds = (now - seen.at) / 1000;
  if (seconds > 0.2) {
    // A microkernel that was restarted counts from nothing.
    seen.points = [...seen.points, Math.max(0, lane.tokens_committed - seen.tokens) / seconds].slice(-POINTS);
    seen.tokens = lane.tokens_committed;
    seen.at = now;
  }
  rates.set(lane.model, seen);
  return seen.points;
}

function showLane(lane, tenants) {
  const used = lane.pages_total - lane.pages_free - lane.pages_cached;
  const points = rate(lane);
  const figures = [
    [(points.at(-1) || 0).toFixed(0), "tokens/s"], [lane.running, "running"], [lane.waiting, "waiting"], [lane.suspended, "suspended"],
    [lane.blocked, "at rest"], [lane.preemptions, "preemptions"],
    [lane.prefix_query_tokens ? `${Math.round((100 * lane.prefix_hit_tokens) / lane.prefix_query_tokens)} %` : "–", "prompt from cache"],
  ];
  return make(
    "div", { class: "lane" },
    make("h3", {}, lane.model, make("small", {}, lane.ready ? `${lane.device}, ${lane.dtype}, up to ${lane.max_context} tokens` : "no executor now")),
    make("div", { class: "figures" }, ...figures.map(([value, name]) => make("div", {}, make("b", {}, String(value)), make("span", {}, name)))),
    spark(points),
    ...pool(lane, used, tenants),
  );
}

function spark(points) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 20`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "tokens per second in the last minute");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const most = Math.max(1, ...points);
  line.setAttribute("points", points.map((value, index) => `${POINTS - points.length + index},${(19 - (18 * value) / most).toFixed(2)}`).join(" "));
  for (const [name, value] of [["fill", "none"], ["stroke", "currentColor"], ["stroke-width", "1.5"], ["vector-effect", "non-scaling-stroke"]]) line.setAttribute(name, value);
  svg.append(line);
  return svg;
}

// The pool as a picture: each cell is an equal share of the pages, in the colour of who holds them.
function pool(lane, used, tenants) {
  const cells = Math.min(CELLS, lane.pages_total);
  const holders = tenants.filter((row) => row.pages).sort((a, b) => b.pages - a.pages).map((row) => [row.tenant, row.pages, hue(row.tenant)]);
  const others = used - holders.reduce((sum, [, pages]) => sum + pages, 0);
  if (others > 0) holders.push(["others", others, "var(--dim)"]);
  const grid = make("div", { class: "pool", role: "img", "aria-label": `${used} of ${lane.pages_total} pages used, ${lane.pages_cached} cached` });
  const add = (count, name, colour, kind) => {
    for (let index = 0; index < count && grid.childElementCount < cells; index++) {
      const cell = make("i", { class: kind, title: name });
      if (colour) cell.style.background = colour;
      grid.append(cell);
    }
  };
  const share = (pages) => (pages ? Math.max(1, Math.round((pages * cells) / lane.pages_total)) : 0);
  for (const [name, pages, colour] of holders) add(share(pages), `${name}: ${pages} pages`, colour, "");
  add(share(lane.pages_cached), `cached: ${lane.pages_cached} pages`, "", "cached");
  add(cells, `free: ${lane.pages_free} pages`, "", "");
  const key = make("div", { class: "key" });
  for (const [name, pages, colour] of holders) {
    const mark = make("i");
    mark.style.background = colour;
    key.append(make("span", {}, mark, `${name} ${pages}`));
  }
  key.append(make("span", {}, make("i", { class: "cached" }), `cached ${lane.pages_cached}`), make("span", {}, make("i"), `free ${lane.pages_free} of ${lane.pages_total} pages`));
  return [grid, key];
}

const verbs = {
  kill: (rid) => post(`/llmos/v1/sequences/${rid}/kill`),
  suspend: (rid) => post(`/llmos/v1/sequences/${rid}/suspend`),
  resume: (rid) => post(`/llmos/v1/sequences/${rid}/resume`),
  fork: (rid) => post(`/llmos/v1/sequences/${rid}/fork`),
};

async function act(verb, rid) {
  try {
    await verbs[verb](rid);
    await look();
  } catch (error) {
    toast(`${verb} ${rid}: ${error.message}`);
  }
}

const shown = new Map(); // rid -> {row, parts}: rows stay where they are, so that a click does not miss

function showSequences(rows) {
  find("how-many").textContent = rows.length > MOST_ROWS ? `${MOST_ROWS} of ${rows.length}` : String(rows.length);
  const body = find("sequences").tBodies[0];
  const seen = new Set(rows.slice(0, MOST_ROWS).map((row) => row.rid));
  for (const [rid, { row }] of shown) {
    if (seen.has(rid)) continue;
    row.remove();
    shown.delete(rid);
  }
  body.querySelector(".none")?.remove();
  for (const row of rows.slice(0, MOST_ROWS)) {
    if (!shown.has(row.rid)) {
      shown.set(row.rid, newRow(row));
      body.append(shown.get(row.rid).row);
    }
    fill(shown.get(row.rid), row);
  }
  if (!rows.length) body.append(make("tr", { class: "none" }, make("td", { colspan: 10 }, "Nobody is here.")));
}

function newRow({ rid }) {
  const button = (name) => make("button", { class: name, "aria-label": `${name} ${rid}`, onclick: () => act(name, rid) }, name);
  const parts = {
    state: make("td"), nice: make("td", { class: "number wide" }), out: make("td", { class: "number" }), pages: make("td", { class: "number wide" }),
    rate: make("td", { class: "number" }), age: make("td", { class: "number wide" }), owner: make("td"), model: make("td", { class: "wide" }),
    suspend: button("suspend"), resume: button("resume"),
  };
  const row = make(
    "tr", {},
    make("td", {}, String(rid)), parts.owner, parts.model, parts.state, parts.nice, parts.out, parts.pages, parts.rate, parts.age,
    make("td", { class: "number" }, parts.suspend, parts.resume, button("fork"), button("kill")),
  );
  return { row, parts };
}

function fill({ parts }, row) {
  const texts = {
    owner: row.owner, model: row.model, nice: row.nice, out: row.output_tokens, pages: row.pages, rate: row.tokens_per_s.toFixed(1), age: duration(row.age_ms),
  };
  for (const [name, text] of Object.entries(texts)) parts[name].textContent = text;
  parts.state.replaceChildren(make("span", { class: `dot ${row.state}` }), row.state);
  parts.suspend.hidden = row.state === "suspended";
  parts.resume.hidden = row.state !== "suspended";
}

function showServices(rows) {
  find("services").tBodies[0].replaceChildren(
    ...rows.map((row) => make(
      "tr", {},
      make("td", {}, row.name), make("td", {}, make("span", { class: `dot ${row.state}` }), row.state),
      make("td", { class: "number" }, String(row.restarts)), make("td", { class: "number" }, duration(row.uptime_ms)), make("td", { class: "wide detail" }, row.detail),
    )),
  );
}
