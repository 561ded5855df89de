"use strict";

// Names of tiles, years and files come from elsewhere: they are set as text, never as HTML.

const at = (id) => document.getElementById(id);
const SHOWN = 2000; // tiles that the map draws
const LISTED = 60; // tiles that the list shows
const PICTURE_FROM = 40; // pixels along a tile on the map, from which it shows its picture
const PICTURES = 400; // pictures on the map, at most

let project = null;
let asked = null; // {tile} or {lon, lat, from_year} or {file}
let liked = new Set();
let unliked = new Set();
let running = null;

// Asking

async function get(path, parameters, options) {
  const query = new URLSearchParams(parameters);
  const response = await fetch(`${path}?${query}`, options);
  if (response.ok) return response;
  const { error, hint } = await response.json().catch(() => ({ error: `HTTP ${response.status}` }));
  throw new Error(hint ? `${error}\n${hint}` : error);
}

const encoded = (id) => id.split("/").map(encodeURIComponent).join("/");
const picture = (id, side) => `thumbnail/${encoded(id)}?side=${side}`;

function parameters() {
  const found = [["top", at("top").value || "5"]];
  for (const box of document.querySelectorAll("#years input:checked")) found.push(["year", box.value]);
  for (const name of ["rotate", "verify"]) if (at(name).value) found.push([name, at(name).value]);
  if (at("area").value.trim()) found.push(["bbox", at("area").value.trim()]);
  for (const id of liked) found.push(["like", id]);
  for (const id of unliked) found.push(["unlike", id]);
  return found;
}

function request(format) {
  const { file, ...target } = asked;
  const found = [...parameters(), ...Object.entries(target)];
  if (format) found.push(["format", format]);
  if (!file) return [found, {}];
  for (const gsd of at("gsd").value.split(",")) if (gsd.trim()) found.push(["gsd", gsd.trim()]);
  return [[...found, ["name", file.name]], { method: "POST", body: file }];
}

async function ask(target) {
  if (target) {
    asked = target;
    liked = new Set();
    unliked = new Set();
  }
  if (!asked) return;
  running?.abort();
  const mine = (running = new AbortController());
  document.body.classList.add("waiting");
  at("status").textContent = "Searching …";
  at("failure").hidden = true;
  at("again").disabled = false;
  try {
    const [values, options] = request();
    const response = await get("query", values, { ...options, signal: mine.signal });
    show(await response.json());
    if (target && matchMedia("(max-width: 60rem)").matches) at("results").scrollIntoView();
  } catch (error) {
    if (error.name === "AbortError") return;
    show(null);
    at("failure").textContent = error.message;
    at("failure").hidden = false;
  } finally {
    if (running === mine) document.body.classList.remove("waiting");
  }
}

async function save(format) {
  at("failure").hidden = true;
  try {
    const [values, options] = request(format);
    const blob = await (await get("query", values, options)).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `answers.${format}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    at("failure").textContent = error.message;
    at("failure").hidden = false;
  }
}

// Answers

function element(kind, text, ...inside) {
  const made = document.createElement(kind);
  if (text) made.textContent = text;
  made.append(...inside);
  return made;
}

function button(text, label, act, pressed) {
  const made = element("button", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  if (pressed !== undefined) made.setAttribute("aria-pressed", pressed);
  made.addEventListener("click", act);
  return made;
}

const metres = (value) => (value < 9950 ? `${value.toFixed(0)} m` : `${(value / 1000).toFixed(1)} km`);

function facts(match) {
  const found = [];
  if (match.year !== null) found.push(["year", match.year]);
  found.push(["score", match.score.toFixed(3)]);
  if (match.probability !== null) found.push(["probability", match.probability.toFixed(2)]);
  if (match.match === false) found.push(["verdict", "no match", "bad"]);
  if (match.turn !== undefined) found.push(["turn", `${Math.round(match.turn) % 360}°`]);
  if (match.windows !== undefined) {
    found.push(["m per pixel", match.gsd], ["windows", `${match.agreeing} of ${match.windows}`]);
    found.push(["confidence", match.confidence.toFixed(2)]);
  }
  if (match.confirmed !== undefined) {
    found.push(["details", match.confirmed ? "agree" : "do not agree", match.confirmed ? "good" : "bad"]);
    found.push(["inliers", match.inliers]);
  }
  if (match.distance_m !== null) found.push(["distance", metres(match.distance_m)]);
  const list = document.createElement("dl");
  for (const [name, value, kind] of found) {
    const text = element("dd", String(value));
    if (kind) text.className = kind;
    list.append(element("dt", name), text);
  }
  return list;
}

function toggle(set, other, id) {
  other.delete(id);
  if (!set.delete(id)) set.add(id);
  ask();
}

function card(match) {
  const image = document.createElement("img");
  image.src = picture(match.tile, 384);
  image.alt = "";
  const name = match.tile;
  const act = element("div");
  act.className = "buttons";
  if (map) act.append(button("Map", `Show ${name} on the map`, () => focus(match)));
  act.append(
    button("Ask", `Ask for ${name}`, () => ask({ tile: name })),
    button("Right", `${name} is right: more like it`, () => toggle(liked, unliked, name), liked.has(name)),
    button("Wrong", `${name} is wrong: leave it out`, () => toggle(unliked, liked, name), unliked.has(name)),
  );
  const body = element("div", "", element("h3", `${match.rank}: ${name}`), facts(match), act);
  body.className = "body";
  const item = element("li", "", image, body);
  if (match.confirmed) item.className = "confirmed";
  if (match.match === false) item.className = "unmatched";
  item.dataset.tile = name;
  return item;
}

function show(answer) {
  const matches = answer?.matches ?? [];
  at("answers").replaceChildren(...matches.map(card));
  at("remarks").replaceChildren(...(answer?.remarks ?? []).map((text) => element("li", text)));
  at("save").hidden = !matches.length;
  if (!answer) at("status").textContent = "";
  else {
    const none = matches.some((match) => match.match === false);
    const left = unliked.size ? `; ${unliked.size} left out as wrong` : "";
    const count = `${matches.length} answer${matches.length === 1 ? "" : "s"}`;
    at("status").textContent = none ? `No match; the nearest tiles${left}.` : `${count}, the best first${left}.`;
    if (!matches.length) at("status").textContent = `No tile passes the filters${left}.`;
    if (unliked.size) {
      const forget = () => { liked.clear(); unliked.clear(); ask(); };
      at("status").append(" ", button("Forget right and wrong", "Forget right and wrong", forget));
    }
    at("asked").hidden = false;
    at("asked-picture").src = answer.picture ?? picture(answer.tile, 192);
    at("asked-name").textContent = answer.query;
    at("asked-about").textContent = answer.tile ? "a tile of the project" : "an image";
  }
  if (map) mark(answer);
}

// The map

let map = null;
const marks = window.L?.layerGroup();
let areaMark = null;
const tiles = new Map(); // what the map draws, by id

const latlngs = (ring) => ring.map(([lon, lat]) => [lat, lon]);

// The colours of CSS, as the canvas takes them.
function painted(name) {
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// A picture between the corners of a footprint, which north need not be up in.
const TilePicture = window.L?.Layer.extend({
  initialize(url, ring) {
    this._url = url;
    this._ring = latlngs(ring);
  },
  onAdd(onto) {
    this._image = L.DomUtil.create("img", "tile-picture", onto.getPane("pictures"));
    this._image.alt = "";
    this._image.src = this._url;
    onto.on("zoom viewreset", this._place, this);
    this._place();
  },
  onRemove(from) {
    from.off("zoom viewreset", this._place, this);
    this._image.remove();
  },
  _place() {
    const [below, , right, corner] = this._ring.map((each) => this._map.latLngToLayerPoint(each));
    const along = right.subtract(corner).divideBy(256);
    const down = below.subtract(corner).divideBy(256);
    this._image.style.transform = `matrix(${along.x}, ${along.y}, ${down.x}, ${down.y}, ${corner.x}, ${corner.y})`;
  },
});

function begin() {
  for (const id of ["map-field", "area-field", "gsd-field"]) at(id).hidden = false;
  map = L.map("map", { preferCanvas: true, zoomAnimation: false, zoomSnap: 0.25, maxZoom: 24, attributionControl: false });
  map.createPane("pictures").style.zIndex = 350;
  L.control.scale({ imperial: false }).addTo(map);
  marks.addTo(map);
  const [west, south, east, north] = project.bbox;
  map.fitBounds([[south, west], [north, east]], { padding: [30, 30], maxZoom: 18 });
  map.on("moveend", drawTiles);
  map.on("click", (event) => pick(event.latlng));
  at("map").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target === at("map")) pick(map.getCenter());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAnew);
  beginDrawing();
  drawTiles();
}

function pick(place) {
  const { lat, lng } = place.wrap();
  ask({ lon: lng.toFixed(7), lat: lat.toFixed(7), from_year: at("map-year").value });
}

function view() {
  const bounds = map.getBounds();
  const sides = [bounds.getWest(), bounds.getSouth(), bounds.getEast(), bounds.getNorth()];
  return sides.map((side, i) => Math.max(i % 2 ? -90 : -180, Math.min(i % 2 ? 90 : 180, side)).toFixed(6)).join(",");
}

let drawn = 0;
async function drawTiles() {
  const mine = ++drawn;
  const values = { bbox: view(), year: at("map-year").value, limit: SHOWN };
  let found;
  try {
    found = await (await get("tiles", values)).json();
  } catch (error) {
    at("tiles-note").textContent = error.message;
    return;
  }
  if (mine !== drawn) return;
  const part = found.tiles.length < found.total;
  const count = found.total.toLocaleString("en");
  at("tiles-note").textContent = part ? `${found.tiles.length.toLocaleString("en")} of ${count} in view: zoom in for all` : `${count} in view`;
  const wanted = new Set(found.tiles.map((tile) => tile.id));
  for (const [id, layers] of tiles) {
    if (!wanted.has(id)) {
      layers.outline.remove();
      layers.picture?.remove();
      tiles.delete(id);
    }
  }
  const style = { color: painted("--accent"), weight: 1, opacity: 0.55, fillOpacity: 0.08, interactive: false };
  for (const tile of found.tiles) {
    if (!tiles.has(tile.id)) tiles.set(tile.id, { tile, outline: L.polygon(latlngs(tile.footprint), style).addTo(map) });
  }
  drawPictures(!part && found.tiles.length <= PICTURES);
}

function drawPictures(few) {
  for (const layers of tiles.values()) {
    const [one, , other] = latlngs(layers.tile.footprint).map((each) => map.latLngToLayerPoint(each));
    const side = one.distanceTo(other) / Math.SQRT2;
    if (few && side >= PICTURE_FROM) {
      layers.picture ??= new TilePicture(picture(layers.tile.id, side > 160 ? 512 : 256), layers.tile.footprint).addTo(map);
    } else if (layers.picture) {
      layers.picture.remove();
      layers.picture = undefined;
    }
  }
}

function drawAnew() {
  for (const layers of tiles.values()) {
    layers.outline.remove();
    layers.picture?.remove();
  }
  tiles.clear();
  drawTiles();
}

function mark(answer) {
  marks.clearLayers();
  if (!answer) return;
  const around = (ring, name, weight) =>
    L.polygon(latlngs(ring), { color: painted(name), weight, fillOpacity: 0.15, interactive: false }).addTo(marks);
  if (answer.footprint) around(answer.footprint, "--accent", 4);
  // Years of one place share a mark.
  const places = new Map();
  for (const match of answer.matches) {
    const key = match.footprint.join();
    if (!places.has(key)) places.set(key, { ring: match.footprint, ranks: [] });
    places.get(key).ranks.push(match.rank);
  }
  for (const { ring, ranks } of places.values()) {
    const shown = ranks.length > 3 ? `${ranks.slice(0, 3).join(", ")} …` : ranks.join(", ");
    around(ring, "--right", 2).bindTooltip(shown, { permanent: true, direction: "center", className: "rank" });
  }
}

function focus(match) {
  for (const item of at("answers").children) item.classList.toggle("shown", item.dataset.tile === match.tile);
  if (project.years.includes(match.year) && at("map-year").value !== match.year) {
    at("map-year").value = match.year;
    drawAnew();
  }
  map.fitBounds(L.polygon(latlngs(match.footprint)).getBounds().pad(1.5), { maxZoom: 22 });
  at("map").scrollIntoView({ block: "nearest" });
  at("map").focus({ preventScroll: true });
}

// The area

function markArea() {
  areaMark?.remove();
  areaMark = null;
  const [west, south, east, north] = at("area").value.split(",").map(Number);
  if (![west, south, east, north].every(Number.isFinite) || !at("area").value.trim()) return;
  const style = { color: painted("--ink"), weight: 2, dashArray: "6 5", fill: false, interactive: false };
  areaMark = L.rectangle([[south, west], [north, east < west ? east + 360 : east]], style).addTo(map);
}

function setArea(text) {
  at("area").value = text;
  markArea();
  ask();
}

function beginDrawing() {
  const field = at("map");
  let start = null;
  const place = (event) => map.mouseEventToLatLng(event);
  const drawing = (on) => {
    at("area-draw").setAttribute("aria-pressed", on);
    field.classList.toggle("drawing", on);
    for (const each of ["dragging", "boxZoom", "doubleClickZoom"]) map[each][on ? "disable" : "enable"]();
    if (on) at("map").scrollIntoView({ block: "nearest" });
  };
  const text = (one, other) =>
    [Math.min(one.lng, other.lng), Math.min(one.lat, other.lat), Math.max(one.lng, other.lng), Math.max(one.lat, other.lat)]
      .map((side) => side.toFixed(6)).join(",");
  at("area-draw").addEventListener("click", () => drawing(at("area-draw").getAttribute("aria-pressed") !== "true"));
  at("area-view").addEventListener("click", () => setArea(view()));
  at("area-clear").addEventListener("click", () => setArea(""));
  field.addEventListener("pointerdown", (event) => {
    if (field.classList.contains("drawing") && event.isPrimary) start = place(event);
  });
  field.addEventListener("pointermove", (event) => {
    if (!start) return;
    at("area").value = text(start, place(event));
    markArea();
  });
  window.addEventListener("pointerup", (event) => {
    if (!start) return;
    const found = text(start, place(event));
    start = null;
    // The click that ends it picks no tile.
    field.addEventListener("click", (click) => click.stopPropagation(), { capture: true, once: true });
    setTimeout(() => drawing(false));
    setArea(found);
  });
}

// The list, where tiles have no place

let listed = 0;
async function drawList() {
  const mine = ++listed;
  const values = { limit: LISTED };
  if (at("search").value.trim()) values.search = at("search").value.trim();
  if (at("map-year").value) values.year = at("map-year").value;
  const found = await (await get("tiles", values)).json();
  if (mine !== listed) return;
  const items = found.tiles.map((tile) => {
    const image = document.createElement("img");
    image.src = picture(tile.id, 128);
    image.alt = "";
    image.loading = "lazy";
    const made = button("", `Ask for ${tile.id}`, () => ask({ tile: tile.id }));
    made.append(image, tile.id);
    return element("li", "", made);
  });
  at("list").replaceChildren(...items);
  const more = found.total === null ? found.tiles.length === LISTED : found.total > found.tiles.length;
  at("tiles-note").textContent = more ? `${found.tiles.length} of ${found.total?.toLocaleString("en") ?? "many"}: search for others` : `${found.tiles.length}`;
}

// The page

function take(files) {
  const file = [...files].find((each) => each.size);
  if (file) ask({ file });
}

function listen() {
  const filters = ["top", "rotate", "verify", "gsd"];
  for (const id of filters) at(id).addEventListener("change", () => ask());
  at("years").addEventListener("change", () => ask());
  at("area").addEventListener("change", () => setArea(at("area").value));
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  at("file").addEventListener("change", () => {
    take(at("file").files);
    at("file").value = "";
  });
  at("save").addEventListener("click", (event) => {
    if (event.target.dataset.format) save(event.target.dataset.format);
  });
  at("map-year").addEventListener("change", () => (map ? drawAnew() : drawList()));
  let typing;
  at("search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(drawList, 200);
  });
  let depth = 0;
  const dragging = (step) => document.body.classList.toggle("dragging", (depth += step) > 0);
  document.addEventListener("dragenter", () => dragging(1));
  document.addEventListener("dragleave", () => dragging(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(-depth);
    take(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
}

async function start() {
  project = await (await get("project", {})).json();
  document.title = `${project.name} – geomatch`;
  at("title").textContent = project.name;
  const about = [`${project.tiles.toLocaleString("en")} tiles`];
  if (project.gsd) about.push(`${project.size} px at ${project.gsd} m`);
  about.push(`index ${project.index}`);
  at("about").textContent = about.join(" · ");
  for (const year of project.years) {
    const box = document.createElement("input");
    box.type = "checkbox";
    box.value = year;
    at("years").append(element("label", "", box, year));
    at("map-year").prepend(new Option(year, year));
  }
  at("map-year").selectedIndex = 0;
  at("years-field").hidden = at("map-year-field").hidden = !project.years.length;
  listen();
  if (project.bbox) begin();
  else {
    at("list").hidden = at("search-field").hidden = false;
    for (const format of ["gpkg", "geojson"]) {
      if (project.placement === "none") document.querySelector(`[data-format=${format}]`).hidden = true;
    }
    await drawList();
  }
}

start().catch((error) => {
  at("failure").textContent = error.message;
  at("failure").hidden = false;
});
