"use strict";

// Draws the report from the JSON data in the page, without libraries or network access.

const page = JSON.parse(document.getElementById("page").textContent);
const { report, split } = page;
const main = document.querySelector("main");
const classes = page.distribution.some((row) => "class" in row);

// Titles of metrics, in the order of table columns.
const TITLES = {
  "queries": "queries", "database": "tiles", "map": "mAP", "trapezoidal map": "trapezoidal mAP", "map@5": "mAP@5", "recall@1": "R@1",
  "recall@5": "R@5", "recall@10": "R@10", "hit@5": "hit@5", "median_rank": "median rank",
  "median_error_m": "median error (m)", "mean_rank": "mean rank", "mrr": "MRR", "mp@1": "mP@1",
  "mp@5": "mP@5", "mp@10": "mP@10", "within_1_tiles": "within 1 tile", "auc": "AUC", "eer": "EER", "fpr": "FPR", "tpr": "TPR", "query_year": "query",
  "database_year": "searched",
};
const SHARES = /^(map|trapezoidal|recall|relevant|within|hit|mp|mrr|auc|eer|fpr|tpr|precision|calibration)/;
const MAIN = ["queries", "database", "map", "map@5", "recall@1", "recall@5", "recall@10", "median_rank", "median_error_m"];
const BY = {
  classes: ["class", ""],
  regions: ["region", ""],
  content: ["content", "Blank: the descriptor equals that of another place, as for tiles without content. " +
    "Ambiguous: the first two answers are of different places and tie."],
  changed: ["how much of the ground changed", ""],
};
const titleOf = (key) => TITLES[key] ?? key.replaceAll("_", " ");
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function format(value, key = "") {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (key === "ahead") return (value > 0 ? "+" : "") + value.toFixed(3);
  if (SHARES.test(key) || key === "threshold" || key === "score") return value.toFixed(3);
  return value.toLocaleString("en-GB", { maximumFractionDigits: 1 });
}

// Elements

function make(name, attributes = {}, ...children) {
  const within = ["svg", "g", "path", "line", "text", "circle"].includes(name);
  const element = within
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") element.style.cssText = value;
    else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function section(id, name, title, note, ...children) {
  main.append(make("section", { id }, make("h2", {}, title), make("p", { class: "note" }, note), ...children));
  document.querySelector("nav").append(make("a", { href: `#${id}` }, name));
}

const key = (colour) => make("span", { class: "key", style: `background:${colour}` });

// Tables

// `columns` are keys of the rows; the first names the row. A row with `part` is indented.
function table(rows, columns, { id = null, caption = null, sortable = false, shares = false } = {}) {
  const words = new Set(columns.filter((c) => rows.some((row) => typeof row[c] === "string")));
  const body = make("tbody");
  const fill = (some) => body.replaceChildren(...some.map((row) => make("tr", { class: row.part ? "part" : null },
    ...columns.map((c, i) => {
      if (row[c] instanceof Node) return make("td", { class: "stack text" }, row[c]);
      const share = shares && SHARES.test(c) && typeof row[c] === "number";
      return make(i ? "td" : "th", {
        scope: i ? null : "row",
        class: share ? "share" : words.has(c) ? "text" : null,
        style: share ? `--share:${row[c]}` : "",
      }, format(row[c], c), interval(row, c));
    }))));
  const heads = columns.map((c, i) => {
    const head = make("th", { scope: "col", class: words.has(c) ? "text" : null });
    if (!sortable) return head.append(titleOf(c)), head;
    const button = make("button", { type: "button" }, titleOf(c));
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== (i ? "descending" : "ascending") === !i;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const sign = rising ? 1 : -1;
      fill([...rows].sort((a, b) => sign * compare(a[c], b[c])));
    });
    return head.append(button), head;
  });
  fill(rows);
  const long = rows.length > 14;
  return make("div", { class: "tabled", id }, caption && make("p", { class: "note" }, caption),
    make("div", { class: long ? "scroll long" : "scroll", tabindex: 0, role: "group", "aria-label": caption ?? "Table" },
      make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body)));
}

function compare(a, b) {
  if (typeof a === "string") return a.localeCompare(b, "en", { numeric: true });
  return (a ?? -Infinity) - (b ?? -Infinity);
}

function interval(metrics, name) {
  const range = metrics.intervals?.[name];
  return range ? make("span", { class: "interval" }, range.map((v) => format(v, name)).join(" – ")) : null;
}

// Keys with a value in some row, texts first.
function columnsOf(rows, omit = []) {
  const keys = new Set(rows.flatMap((row) => Object.keys(row)));
  const order = Object.keys(TITLES);
  const place = (k) => (rows.some((row) => typeof row[k] === "string") ? -1 : (order.indexOf(k) + 1) || order.length + 1);
  return [...keys].sort((a, b) => place(a) - place(b)).filter((k) => !omit.includes(k) && rows.some((row) => (row[k] ?? null) !== null && typeof row[k] !== "object"));
}

function headline() {
  const metrics = report.splits[split];
  const roc = metrics.roc;
  const cards = ["map@5", "map", "recall@1", "recall@5", "recall@10", "median_rank", "median_error_m"]
    .filter((name) => metrics[name] !== null && metrics[name] !== undefined)
    .map((name) => (name === "median_error_m"
      ? ["median error", `${format(metrics[name])} m`, interval(metrics, name)]
      : [titleOf(name), format(metrics[name], name), interval(metrics, name)]));
  if (roc) cards.push(["AUC of pairs", format(roc.auc, "auc"), interval(roc, "auc")]);
  const list = make("dl", { class: "cards" }, ...cards.map(([name, value, range]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value, range))));
  const rows = Object.entries(report.splits).flatMap(([name, f]) => [
    { split: name, ...f },
    ...(f.pairs?.length > 1 ? f.pairs.map((p) => ({ split: `${p.query_year} in ${p.database_year}`, part: true, ...p })) : []),
  ]);
  const columns = columnsOf(rows, ["split", "part", "query_year", "database_year"]);
  const share = metrics["recall@1"];
  const title = share === null ? `No ${split} query has a match`
    : `${(100 * share).toFixed(1)} % of the ${split} queries find ${classes ? "their class" : "their place"} first`;
  const precision = classes ? "the mean average precision at five;"
    : "the mean of 1/rank if the match is among the first five, else 0;";
  const main = columns.filter((c) => MAIN.includes(c)), further = columns.filter((c) => !MAIN.includes(c));
  const ranges = metrics.intervals ? " Small ranges contain 95 % of bootstrap samples of places." : "";
  const drawn = metrics.drawn_from ? `, drawn at random from ${format(metrics.drawn_from)},` : "";
  section("metrics", "Metrics", title, `${format(metrics.queries)} queries${drawn} among ${format(metrics.database)} tiles. ` +
    `mAP@5 is ${precision} R@k is the share of queries with a match among the first k. Ties never help. Search is exact.${ranges}`,
    list, table(rows, ["split", ...main], { id: "splits", caption: classes ? "Each split" : "Each split, and each pair of years: queries of the one in the other" }),
    further.length ? make("details", {}, make("summary", {}, "More metrics"), table(rows, ["split", ...further])) : "");
}

// Baselines and other runs on the same queries

function others() {
  if (!report.others?.length) return;
  const rows = [{ name: report.embeddings, splits: report.splits }, ...report.others].map(({ name, splits, differences }) => {
    const [ahead, ...ends] = differences?.[split]?.["map@5"] ?? [null];
    return { name, ...splits[split], ahead, intervals: { ...splits[split].intervals, ...(ends.length && { ahead: ends }) } };
  });
  section("others", "Others", `How ${report.embeddings} compares with others on the ${split} split`,
    `Ahead: how much higher mAP@5 of ${report.embeddings} is on the same queries, with the range of 95 % of bootstrap samples of places.`,
    table(rows, ["name", ...columnsOf(rows, ["name"]).filter((c) => MAIN.includes(c) || c === "ahead")], { id: "beside", sortable: true }));
}

// Graded answers

function graded() {
  if (!report.graded) return;
  const rows = ["easy", "medium", "hard"].map((grade) => ({ grade, ...report.graded[grade] }));
  section("graded", "Graded", "Queries with graded answers, by the revisited Oxford and Paris protocol",
    `${format(report.graded.queries)} queries among ${format(report.graded.database)} tiles. Easy treats hard answers as junk, hard treats easy ones as junk; mAP is trapezoidal.`,
    table(rows, ["grade", ...columnsOf(rows, ["grade"])], { id: "grades" }));
}

// Curves

const NAMED = { train: "train", validation: "validation", test: "test", "same place": "same", "other places": "other" };
const colourOf = (name) => `var(--${NAMED[name] ?? "accent"})`;

function ticks(low, high, count) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function chart(spec) {
  const series = Object.entries(spec.series);
  const points = series.flatMap(([, p]) => p).filter(([, y]) => y !== null);
  const xs = points.map((p) => p[0]).concat(spec.bins ? series[0][1].at(-1)[0] : []);
  const ys = points.map((p) => p[1]);
  const box = spec.share ? [0, 1, 0, 1]
    : [Math.min(...xs), Math.max(...xs), Math.min(0, ...ys), Math.max(...ys) * 1.05 || 1];
  const output = make("output", { "aria-live": "polite" });
  const drawing = make("svg", { role: "img", tabindex: 0, "aria-label": `${spec.title}. Arrow keys step through the values.` });
  const figure = make("figure", { class: "chart", id: `chart-${spec.name}` },
    make("figcaption", {}, make("strong", {}, spec.title),
      make("span", { class: "legend" }, ...series.map(([name]) => make("span", {}, key(colourOf(name)), name)),
        spec.mark && make("span", {}, `┆ ${spec.mark[0]}: ${format(spec.mark[1], spec.bins ? "score" : "")}`))),
    drawing, output);
  const height = 280, left = 52, right = 12, top = 10, bottom = 42;
  let width = 0, cursor = null, shown = null;
  const sx = (x) => left + (x - box[0]) / (box[1] - box[0] || 1) * (width - left - right);
  const sy = (y) => height - bottom - (y - box[2]) / (box[3] - box[2] || 1) * (height - top - bottom);

  function draw() {
    width = figure.clientWidth;
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.style.height = `${height}px`;
    const parts = [];
    for (const y of ticks(box[2], box[3], 5)) {
      parts.push(make("line", { class: "grid", x1: left, x2: width - right, y1: sy(y), y2: sy(y) }),
        make("text", { x: left - 8, y: sy(y) + 4, "text-anchor": "end" }, tick(y)));
    }
    for (const x of ticks(box[0], box[1], width > 420 ? 6 : 4)) {
      parts.push(make("text", { x: sx(x), y: height - bottom + 18, "text-anchor": "middle" }, tick(x)));
    }
    parts.push(make("text", { x: width - right, y: height - 6, "text-anchor": "end" }, spec.x),
      make("text", { x: 0, y: 0, "text-anchor": "end", transform: `translate(11 ${top}) rotate(-90)` }, spec.y));
    if (spec.diagonal) parts.push(make("line", { class: "grid", x1: sx(0), y1: sy(0), x2: sx(1), y2: sy(1) }));
    for (const [name, p] of series) parts.push(spec.bins ? bins(name, p) : curve(name, p));
    if (spec.mark) {
      const x = sx(spec.mark[1]);
      if (x >= left && x <= width) parts.push(make("line", { class: "mark", x1: x, x2: x, y1: top, y2: height - bottom }));
    }
    cursor = make("g");
    drawing.replaceChildren(...parts, cursor);
    if (shown) show(...shown);
  }
  function curve(name, p) {
    const d = p.map(([x, y], i) => `${i ? "L" : "M"}${sx(x).toFixed(1)} ${sy(y).toFixed(1)}`).join("");
    const dots = p.length <= 40
      ? p.map(([x, y]) => make("circle", { cx: sx(x), cy: sy(y), r: 2.5, fill: colourOf(name) })) : [];
    return make("g", {}, make("path", { class: "curve", d, stroke: colourOf(name) }), ...dots);
  }
  function bins(name, p) {
    let d = `M${sx(p[0][0])} ${sy(0)}`;
    p.slice(0, -1).forEach(([x, y], i) => { d += `L${sx(x).toFixed(1)} ${sy(y).toFixed(1)}L${sx(p[i + 1][0]).toFixed(1)} ${sy(y).toFixed(1)}`; });
    d += `L${sx(p.at(-1)[0])} ${sy(0)}`;
    return make("path", { class: "bins", d, stroke: colourOf(name), fill: colourOf(name) });
  }
  function show(line, i) {
    shown = [line, i];
    const [name, p] = series[line];
    const [x, y] = p[i];
    const dot = (colour, v) => make("circle", { cx: sx(spec.bins ? (x + p[i + 1][0]) / 2 : x), cy: sy(v), r: 4.5, fill: colour });
    if (spec.bins) {
      cursor.replaceChildren(...series.map(([n, q]) => dot(colourOf(n), q[i][1])));
      output.textContent = `${spec.x} ${x.toFixed(3)} to ${p[i + 1][0].toFixed(3)}: ` +
        series.map(([n, q]) => `${format(q[i][1])} of ${n === "same place" ? "the same place" : n}`).join(", ");
    } else {
      cursor.replaceChildren(dot(colourOf(name), y));
      output.textContent = `${name}: ${spec.x} ${spec.share ? x.toFixed(3) : format(x)}, ${spec.y} ${y.toFixed(3)}`;
    }
  }
  drawing.addEventListener("pointermove", (event) => {
    const at = drawing.getBoundingClientRect();
    const [px, py] = [event.clientX - at.left, event.clientY - at.top];
    let best = [Infinity, 0, 0];
    series.forEach(([, p], line) => p.slice(0, spec.bins ? -1 : undefined).forEach(([x, y], i) => {
      const centre = spec.bins ? (x + p[i + 1][0]) / 2 : x;
      const far = spec.share ? Math.hypot(sx(x) - px, sy(y) - py) : Math.abs(sx(centre) - px) * 1e4 + Math.abs(sy(y) - py);
      if (far < best[0]) best = [far, line, i];
    }));
    show(best[1], best[2]);
  });
  drawing.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const line = ((shown?.[0] ?? 0) + step[0] + series.length) % series.length;
    const last = series[line][1].length - (spec.bins ? 2 : 1);
    show(line, Math.min(last, Math.max(0, (shown?.[1] ?? -1) + step[1])));
  });
  new ResizeObserver(() => { if (figure.clientWidth !== width) draw(); }).observe(figure);
  return figure;
}

function tick(value) {
  const size = Math.abs(value);
  if (size >= 10000) return `${+(value / 1000).toFixed(1)}k`;
  return String(+value.toPrecision(4));
}

// Verification of pairs, and queries without a match

// The metrics of each split under a key, with the intervals that a table shows.
const judged = (key) => Object.entries(report.splits).filter(([, f]) => f[key]).map(([name, { [key]: f }]) => ({
  split: name, ...f, intervals: { threshold: f.threshold_interval, fpr: f.fpr_interval },
  calibration_error: f.calibration?.error ?? f.error,
}));

function judgement(key, title, note) {
  const rows = judged(key);
  if (!rows.length) return [];
  const worse = rows.some((row) => row.split === "test" && row.holds === false);
  return [make("h3", {}, title),
    make("p", { class: "note" }, `${note} The threshold is chosen on validation tiles.${worse ? " On test, more false ones pass than were asked for, beyond what is uncertain." : ""}`),
    table(rows, ["split", ...columnsOf(rows, ["split", "holds", "error"])])];
}

function verification() {
  let matrix = null;
  const parts = [
    ...judgement("roc", "Same place or not", "For each tile, one pair of the same place and one of different places are drawn."),
    ...judgement("no_match", "A match or none", "Each tile is a query among all tiles of the other years, with its place and without. FPR: the share of queries without a match whose first answer passes; TPR: the share of those with one whose first answer is right and passes."),
  ];
  const roc = report.splits[split].roc;
  if (roc) {
    const name = (text, mark) => make("small", {}, `${mark} ${text}`);
    const cell = (count, all, text, mark) =>
      make("td", { style: `--share:${all ? count / all : 0}` }, format(count), name(`${text}, ${(100 * count / (all || 1)).toFixed(1)} %`, mark));
    const [[tn, fp], [fn, tp]] = roc.confusion;
    const title = `Confusion matrix at the threshold, ${split}`;
    matrix = make("figure", { class: "chart", id: "confusion" }, make("figcaption", {}, make("strong", {}, title),
      make("span", { class: "legend" }, "Pairs, with their share of the row")), make("table", { class: "matrix", "aria-label": title },
      make("thead", {}, make("tr", {}, make("td", { style: "border:0" }), make("th", { scope: "col", class: "text" }, "predicted other"), make("th", { scope: "col", class: "text" }, "predicted same"))),
      make("tbody", {},
        make("tr", {}, make("th", { scope: "row" }, "other place"), cell(tn, tn + fp, "right", "✓"), cell(fp, tn + fp, "wrong", "✗")),
        make("tr", {}, make("th", { scope: "row" }, "same place"), cell(fn, fn + tp, "wrong", "✗"), cell(tp, fn + tp, "right", "✓")))));
  }
  return [matrix, parts];
}

// Queries with their answers

const SELECTIONS = {
  best: ["Best", "The match is first, with the highest scores."],
  worst: ["Worst", "The match has the worst ranks."],
  random: ["At random", "Drawn with a fixed seed."],
};

function queries() {
  const parts = Object.entries(page.shown).filter(([, some]) => some.length).flatMap(([name, some]) => [
    make("h3", {}, SELECTIONS[name][0]), make("p", { class: "note" }, SELECTIONS[name][1]),
    make("div", { class: "queries" }, ...some.map(query)),
  ]);
  if (parts.length) {
    section("queries", "Queries", "Best, worst and random queries, each with its first answers",
      `One query per ${classes ? "class" : "place"} of the ${split} split. ✓ and a solid frame: the right ${classes ? "class" : "place"}; ✗ and a dashed frame: another.`, ...parts);
  }
}

function query(shown) {
  const thumb = (tile, kind, text, ...lines) => make("figure", { class: kind },
    make("img", { src: tile.picture, alt: text, width: 96, height: 96 }),
    make("figcaption", { title: tile.id }, lines[0], make("br"), lines[1] || "\u00a0"));
  return make("article", { class: "query" },
    make("h4", {}, shown.place, make("span", {}, ` · match at rank ${format(shown.rank)}`)),
    make("div", { class: "row" },
      thumb(shown, "asked", `Query ${shown.id}`, "query", shown.year),
      ...shown.answers.map((answer, i) => thumb(answer, answer.right ? "right" : "wrong",
        `Answer ${i + 1}, ${answer.right ? "right" : "wrong"}: ${answer.id}`,
        make("span", {}, make("b", {}, answer.right ? "✓" : "✗"), ` ${format(answer.score, "score")}`),
        (answer.year || answer.place) + (answer.away === null ? "" : `, ${format(answer.away)} m`)))));
}

// The map

const RANKS = [[1, "rank 1", "#0072b2"], [5, "2–5", "#56b4e9"], [20, "6–20", "#e69f00"], [Infinity, "above", "#d55e00"]];
const rankClass = (rank) => RANKS.findIndex(([most]) => rank <= most);

function map() {
  const data = page.map;
  const texts = [...document.querySelectorAll("script.sheet")].map((element) => element.textContent);
  const SMALL = 64, SIDE = 16;
  const images = [];
  let pair = 0, view = null, chosen = null, waiting = false;

  const ground = make("canvas", { class: "ground", tabindex: 0, role: "application",
    "aria-label": "Map of the queries. Arrow keys choose a query, plus and minus zoom, 0 shows all." });
  const queryTile = make("canvas", { width: SMALL, height: SMALL }), answerTile = make("canvas", { width: SMALL, height: SMALL });
  const text = make("p");
  const answerFigure = make("figure", {}, answerTile, make("figcaption", {}));
  const thumbs = make("div", { class: "row" }, make("figure", {}, queryTile, make("figcaption", {})), answerFigure);
  const tip = make("div", { class: "tip", hidden: "", role: "status" }, thumbs, text);
  const frame = make("div", { class: "map" }, ground, tip);
  const legend = make("div", { class: "legend" });
  const button = (sign, label, act) => {
    const b = make("button", { type: "button", "aria-label": label, title: label }, sign);
    b.addEventListener("click", act);
    return b;
  };
  const select = make("select", { "aria-label": "Years" },
    ...data.pairs.map(([a, b], i) => make("option", { value: i }, `${a} in ${b}`)));
  select.addEventListener("change", () => { pair = +select.value; choose(null); index(); refresh(); });
  const zoomAt = (factor, x = frame.clientWidth / 2, y = frame.clientHeight / 2) => {
    const k = Math.min(256, Math.max(view.least, view.k * factor));
    view.x += (x - frame.clientWidth / 2) * (1 / view.k - 1 / k);
    view.y -= (y - frame.clientHeight / 2) * (1 / view.k - 1 / k);
    view.k = k;
    refresh();
  };

  // Thumbnails, decoded on first use.
  function sheet(number) {
    if (!images[number]) {
      images[number] = new Image();
      images[number].onload = () => { refresh(); if (chosen !== null) choose(chosen); };
      images[number].src = `data:image/jpeg;base64,${texts[number]}`;
    }
    return images[number];
  }
  const has = (tile) => tile >= 0 && tile < texts.length * SIDE * SIDE;
  function picture(context, tile, x, y, size) {
    if (!has(tile)) return false;
    const image = sheet(Math.floor(tile / SIDE / SIDE)), i = tile % (SIDE * SIDE);
    if (!image.complete || !image.naturalWidth) return false;
    context.drawImage(image, i % SIDE * SMALL, Math.floor(i / SIDE) * SMALL, SMALL, SMALL, x, y, size, size);
    return true;
  }

  // Queries of the chosen pair of years, and those in each cell.
  let current = [], cells = new Map();
  function index() {
    current = data.pair.flatMap((p, i) => (p === pair ? [i] : []));
    current.sort((a, b) => rankClass(data.rank[b]) - rankClass(data.rank[a]));
    cells = new Map();
    for (const i of current) {
      const cell = `${Math.floor(data.x[i])} ${Math.floor(data.y[i])}`;
      if (!cells.has(cell)) cells.set(cell, []);
      cells.get(cell).push(i);
    }
    const counts = RANKS.map(() => 0);
    for (const i of current) counts[rankClass(data.rank[i])]++;
    legend.replaceChildren(...RANKS.map(([, name, colour], c) =>
      make("span", {}, key(colour), `${name}: ${format(counts[c])} (${(100 * counts[c] / (current.length || 1)).toFixed(0)} %)`)));
  }
  function under(px, py) {
    const x = (px - frame.clientWidth / 2) / view.k + view.x, y = view.y - (py - frame.clientHeight / 2) / view.k;
    for (const dx of [0, -1]) for (const dy of [0, -1]) {
      for (const i of cells.get(`${Math.floor(x) + dx} ${Math.floor(y) + dy}`) ?? []) {
        if (data.x[i] <= x && x < data.x[i] + 1 && data.y[i] <= y && y < data.y[i] + 1) return i;
      }
    }
    return null;
  }

  // The view: its centre in grid steps, and pixels per step.
  const across = 1 + data.x.reduce((a, b) => Math.max(a, b), 0), along = 1 + data.y.reduce((a, b) => Math.max(a, b), 0);
  function whole() {
    // A wide and low region needs no tall map.
    frame.style.height = `${Math.max(260, Math.min(0.66 * innerHeight, 24 + frame.clientWidth * along / across))}px`;
    const k = Math.min((frame.clientWidth - 24) / across, (frame.clientHeight - 24) / along, 96);
    view = { x: across / 2, y: along / 2, k, least: k / 2 };
    refresh();
  }
  const sx = (x) => (x - view.x) * view.k + frame.clientWidth / 2;
  const sy = (y) => (view.y - y) * view.k + frame.clientHeight / 2;
  function refresh() {
    if (!waiting) { waiting = true; requestAnimationFrame(draw); }
  }
  function draw() {
    waiting = false;
    const [width, height, ratio] = [frame.clientWidth, frame.clientHeight, devicePixelRatio];
    if (!width || !view) return;
    if (ground.width !== Math.round(width * ratio) || ground.height !== Math.round(height * ratio)) {
      ground.width = Math.round(width * ratio);
      ground.height = Math.round(height * ratio);
    }
    const context = ground.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const gap = view.k > 6 ? 1 : 0, side = Math.max(view.k - gap, 1.5);
    for (const i of current) {
      const x = sx(data.x[i]), y = sy(data.y[i] + 1);
      if (x > width || y > height || x + side < 0 || y + side < 0) continue;
      context.fillStyle = RANKS[rankClass(data.rank[i])][2];
      context.fillRect(x, y, side, side);
      if (view.k >= 40) picture(context, data.query[i], x + 4, y + 4, side - 8);
    }
    const ink = getComputedStyle(ground).color;
    if (chosen !== null) {
      context.strokeStyle = ink;
      context.lineWidth = 2;
      context.strokeRect(sx(data.x[chosen]) - 1, sy(data.y[chosen] + 1) - 1, side + 2, side + 2);
    }
    if (data.metres) scale(context, ink, height);
  }
  function scale(context, ink, height) {
    const most = 120 / view.k * data.metres, power = 10 ** Math.floor(Math.log10(most));
    const metres = [5, 2, 1].map((m) => m * power).find((m) => m <= most), long = metres / data.metres * view.k;
    const label = metres >= 1000 ? `${metres / 1000} km` : `${metres} m`;
    context.font = "12px system-ui, sans-serif";
    const wide = Math.max(long, context.measureText(label).width) + 16;
    context.fillStyle = getComputedStyle(tip).backgroundColor;
    context.globalAlpha = 0.85;
    context.fillRect(8, height - 38, wide, 30);
    context.globalAlpha = 1;
    context.fillStyle = ink;
    context.fillText(label, 16, height - 21);
    context.fillRect(16, height - 16, long, 2);
  }

  function choose(i) {
    chosen = i;
    tip.hidden = i === null;
    refresh();
    if (i === null) return;
    const [query, found] = [data.query[i], data.answer[i]];
    const right = data.rank[i] === 1;
    for (const [canvas, tile] of [[queryTile, query], [answerTile, found]]) {
      const context = canvas.getContext("2d");
      context.clearRect(0, 0, SMALL, SMALL);
      canvas.parentNode.hidden = !has(tile);
      picture(context, tile, 0, 0, SMALL);
    }
    answerFigure.className = right ? "right" : "wrong";
    queryTile.nextSibling.textContent = "query";
    answerTile.nextSibling.textContent = `${right ? "✓" : "✗"} first answer`;
    const away = data.away[i] ? `, ${format(data.away[i])} m away` : "";
    thumbs.hidden = !has(query) && !has(found);
    text.replaceChildren(make("b", {}, `${data.ids[query]}: match at rank ${format(data.rank[i])}`), make("br"),
      `First answer ${data.ids[found] ?? "none"}, score ${format(data.score[i], "score")}${away}`);
    const x = sx(data.x[i] + 1), y = sy(data.y[i] + 1);
    const [wide, high] = [tip.offsetWidth, tip.offsetHeight];
    const placed = x + 8 + wide <= frame.clientWidth ? x + 8 : Math.max(4, sx(data.x[i]) - wide - 8);
    tip.style.left = `${Math.min(placed, frame.clientWidth - wide - 4)}px`;
    tip.style.top = `${Math.max(4, Math.min(y, frame.clientHeight - high - 4))}px`;
  }

  // One pointer drags, two pinch; a hovering mouse or a tap chooses a query.
  const down = new Map();
  let moved = 0;
  const place = (event) => {
    const at = ground.getBoundingClientRect();
    return [event.clientX - at.left, event.clientY - at.top];
  };
  ground.addEventListener("pointerdown", (event) => {
    ground.setPointerCapture(event.pointerId);
    down.set(event.pointerId, place(event));
    moved = down.size > 1 ? Infinity : 0;
  });
  ground.addEventListener("pointermove", (event) => {
    const [x, y] = place(event);
    if (!down.has(event.pointerId)) {
      if (event.pointerType === "mouse") choose(under(x, y));
      return;
    }
    const before = down.get(event.pointerId);
    const other = [...down].find(([id]) => id !== event.pointerId)?.[1];
    const share = other ? 0.5 : 1;
    view.x -= share * (x - before[0]) / view.k;
    view.y += share * (y - before[1]) / view.k;
    if (other) {
      const far = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
      zoomAt(far([x, y]) / far(before), (x + other[0]) / 2, (y + other[1]) / 2);
    }
    moved += Math.hypot(x - before[0], y - before[1]);
    down.set(event.pointerId, [x, y]);
    if (moved > 4) choose(null);
    refresh();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    ground.addEventListener(name, (event) => {
      if (name === "pointerup" && moved <= 4) choose(under(...place(event)));
      down.delete(event.pointerId);
    });
  }
  ground.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && !down.size) choose(null); });
  ground.addEventListener("wheel", (event) => {
    event.preventDefault();
    choose(null);
    zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), ...place(event));
  }, { passive: false });
  ground.addEventListener("keydown", (event) => {
    const towards = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    const acts = { "+": () => zoomAt(1.5), "=": () => zoomAt(1.5), "-": () => zoomAt(1 / 1.5), "0": whole, Escape: () => choose(null) };
    if (towards) step(...towards);
    else if (acts[event.key]) acts[event.key]();
    else return;
    event.preventDefault();
  });
  // The nearest query in a direction; the distance to the side counts double.
  function step(dx, dy) {
    const from = chosen === null ? [view.x - 0.5, view.y - 0.5] : [data.x[chosen], data.y[chosen]];
    let best = null, least = Infinity;
    for (const i of current) {
      const [x, y] = [data.x[i] - from[0], data.y[i] - from[1]];
      const ahead = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
      const far = chosen === null ? Math.hypot(x, y) : ahead + 2 * aside;
      if ((chosen === null || ahead > 0) && far < least) [best, least] = [i, far];
    }
    if (best === null) return;
    const [x, y] = [sx(data.x[best]), sy(data.y[best])];
    if (x < 0 || y < 0 || x > frame.clientWidth || y > frame.clientHeight) [view.x, view.y] = [data.x[best], data.y[best]];
    choose(best);
  }

  const drawn = data.query.length;
  const pictured = data.query.filter((tile, i) => has(tile) && (has(data.answer[i]) || data.answer[i] < 0)).length;
  const sampled = (drawn < data.total ? ` The map shows a random sample of ${format(drawn)} of ${format(data.total)} queries.` : "") +
    (pictured < drawn ? ` To keep this file small, only a random sample of ${format(pictured)} queries has thumbnails.` : "");
  section("map", "Map", `Where places of the ${split} split are found`,
    "Each square is a query at its place, coloured by the rank of its match. Point at or tap a square to see the query and its first answer." + sampled,
    make("div", { class: "tools" }, legend, data.pairs.length > 1 ? select : null,
      make("div", { class: "zoom" }, button("+", "Zoom in", () => zoomAt(1.5)), button("−", "Zoom out", () => zoomAt(1 / 1.5)), button("All", "Show all", whole))),
    frame);
  index();
  new ResizeObserver(() => { if (view) refresh(); else whole(); }).observe(frame);
  addEventListener("themechange", refresh);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
}

// Groups of queries, tiles and settings

function groups() {
  const tables = Object.entries(report.splits[split]).filter(([name, rows]) =>
    name !== "pairs" && Array.isArray(rows) && rows.length > 1 && typeof rows[0] === "object");
  if (!tables.length) return;
  section("groups", "Groups", `How groups of ${split} queries differ`, "Click a heading to sort.", ...tables.map(([name, rows]) => {
    const [what, note] = BY[name] ?? [titleOf(name), ""];
    return table(rows, columnsOf(rows), { id: `by-${name}`, caption: `${capital(split)}, by ${what}. ${note}`, sortable: true, shares: true });
  }));
}

function distribution() {
  const names = ["train", "validation", "test"];
  const first = classes ? "class" : "year";
  const most = Math.max(1, ...page.distribution.map((row) => names.reduce((sum, n) => sum + row[n], 0)));
  const rows = page.distribution.map((row) => ({
    [first]: row[first],
    " ": make("span", { class: "stack", "aria-hidden": "true" }, ...names.map((n) =>
      make("span", { style: `width:${100 * row[n] / most}%;background:${colourOf(n)}` }))),
    ...Object.fromEntries(names.map((n) => [n, row[n]])),
    total: names.reduce((sum, n) => sum + row[n], 0),
  }));
  section("tiles", "Tiles", `How many tiles of each ${first} are in each split`,
    "Training never sees tiles of validation and test.",
    make("p", { class: "legend" }, ...names.map((n) => make("span", {}, key(colourOf(n)), n))),
    table(rows, [first, " ", ...names, "total"], { sortable: rows.length > 2 }));
}

function measured() {
  const text = (value) => (value !== null && typeof value === "object" && !Array.isArray(value)
    ? Object.entries(value).map(([k, v]) => `${k} ${text(v)}`).join(", ")
    : Array.isArray(value) ? value.join(", ") || "none" : value === null ? "none" : String(value));
  section("measured", "Settings", "What was evaluated", "Tiles, embeddings, and the settings of the run.",
    ...Object.entries(page.measured).map(([name, facts], i) => make("details", i < 2 ? { open: "" } : {},
      make("summary", {}, name),
      make("dl", { class: "facts" }, ...Object.entries(facts).flatMap(([k, v]) =>
        [make("dt", {}, titleOf(k)), make("dd", {}, text(v))])))));
  document.querySelector("footer").append(`geomatch ${page.version}`);
}

// The page

const searched = { split: "the tiles of each query's split", all: "the tiles of all splits", train: "the tiles of the training split" };
document.title = `${report.name}: geomatch report`;
document.querySelector("h1").textContent = report.name;
document.getElementById("about").textContent = `How well ${report.embeddings} finds places again among ${searched[report.database]}.`;
headline();
others();
graded();
if (page.map) map();
queries();
const curves = page.charts.map(chart);
const [matrix, checked] = verification();
if (matrix) curves.push(matrix);
if (curves.length || checked.length) {
  section("curves", "Curves", page.charts.some((c) => c.name === "loss") ? "Training, and how well scores tell places apart" : "How well scores tell places apart", "Point at a curve to read its values.", make("div", { class: "charts" }, ...curves), ...checked);
}
groups();
distribution();
measured();

const theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
const label = () => { theme.textContent = isDark() ? "☀ Light" : "☾ Dark"; };
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  label();
  dispatchEvent(new Event("themechange"));
});
dark.addEventListener("change", label);
label();
