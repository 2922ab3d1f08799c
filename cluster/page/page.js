// status.json -> the page. Content of a run enters as textContent, never as markup.
"use strict";

const POLL_MS = 700, HIDDEN_POLL_MS = 10000;

// name, unit, [[series, label]...], further: from (start of the axis), percent, note
const SPEED = [
  ["Throughput", "img/s", [["images_per_s"]], { from: 0 }],
  ["Pixel pairs", "pairs/s", [["pixel_pairs_per_s"]], { from: 0 }],
  ["Data wait", "", [["wait_fraction"]], { from: 0, percent: true, note: "fraction of the time that the device waited for data" }],
  ["Step", "s", [["step_s"]], { from: 0 }],
  ["Memory", "MiB", [["memory_mib"]], { from: 0 }],
  ["Checkpoint", "s", [["checkpoint_s"]], { from: 0 }],
  ["Workers", "", [["world_size"]], { from: 0, changes: true }],
];
const HEALTH = [
  ["Equivariance error", "", [["equivariance_error"]], { from: 0, note: "0: embeddings follow the warp; 1: no better than chance" }],
  ["Online probe", "Dice", [["probe_dice"]], { from: 0 }],
  ["Effective rank", "", [["health.effective_rank"]], { from: 0, note: "dimensions in use; near 1: collapse" }],
  ["Dead dimensions", "", [["health.dead_dimensions_fraction"]], { from: 0, percent: true }],
  ["Alignment", "", [["health.alignment"]], { note: "distance within pairs: lower is closer" }],
  ["Uniformity", "", [["health.uniformity"]], { note: "lower: spread more evenly over the sphere" }],
  ["Gradient norm", "", [["gradient_norm"]], { from: 0, note: "before clipping" }],
  ["Learning rate", "", [["learning_rate"]], { from: 0 }],
  ["Skipped steps", "", [["skipped_steps"]], { from: 0, changes: true }],
];

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  const made = tag in SVG_TAGS ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(name, value);
  for (const child of children.flat()) if (child !== null) made.append(child);
  return made;
}
const SVG_TAGS = Object.fromEntries(["svg", "g", "path", "line", "text", "circle", "rect", "title"].map((tag) => [tag, true]));

// --- numbers as text

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(size >= 100 ? 4 : digits)));
}
const percent = (value) => (value === null || value === undefined ? "–" : value > 0 && value < 0.0005 ? "< 0.1 %" : `${number(100 * value)} %`);
const dice = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));

function seconds(value) {
  if (value === null || value === undefined) return "–";
  const s = Math.max(0, Math.round(value));
  if (s < 100) return `${s} s`;
  if (s < 100 * 60) return `${Math.round(s / 60)} min`;
  if (s < 48 * 3600) return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
  return `${Math.round(s / 86400)} days`;
}

function bytes(value) {
  if (value === null || value === undefined) return "–";
  let unit = 0;
  for (; value >= 1024 && unit < 4; unit++) value /= 1024;
  return `${number(value)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

const clock = (time_s) => new Date(time_s * 1000).toISOString().slice(0, 19).replace("T", " ") + " UTC";

// --- charts

function ticks(low, high, most) {
  const raw = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw * 0.999);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(Number((index * step).toPrecision(12)));
  return found;
}

function chart(spec, status, height) {
  const [name, unit, wanted, more = {}] = spec;
  const lines = wanted.map(([key, label]) => [label || name, status.series[key] || []]).filter(([, points]) => points.length);
  if (!lines.length) return null;
  const all = lines.flatMap(([, points]) => points.map((point) => point[1]));
  if (more.changes && Math.min(...all) === Math.max(...all)) return null;
  const shown = (value) => (more.percent ? percent(value) : number(value, 4) + (unit ? ` ${unit}` : ""));
  const reading = el("span", { class: "reading" });
  const box = el("div", { class: "chart" }, el("div", { class: "row" }, el("h3", {}, name), reading));
  const place = el("div");
  box.append(place);
  if (lines.length > 1) box.append(legend(lines.map(([label], index) => [label, index])));
  if (more.note) box.append(el("p", { class: "faint" }, more.note));
  if (more.marks) box.append(markLegend(status));
  const tell = (index) => {
    const at = lines[0][1][index];
    reading.textContent = `step ${at[0].toLocaleString("en")}: ` + lines.map(([, points]) => shown((points.find((point) => point[0] === at[0]) || [])[1])).join(" · ");
  };
  const points = lines[0][1];
  tell(points.length - 1);
  const drawn = { draw: (width) => place.replaceChildren(picture(lines, all, width, height, more, status, name, shown, tell)), place, box };
  return drawn;
}

function picture(lines, all, width, height, more, status, name, shown, tell) {
  let low = Math.min(...all), high = Math.max(...all);
  if (more.from !== undefined) low = Math.min(more.from, low);
  if (low === high) [low, high] = low === 0 ? [0, more.percent ? 0.1 : 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const room = (high - low) * 0.06;
  high += room;
  if (more.from === undefined || low < more.from) low -= room;
  const steps = lines.flatMap(([, points]) => [points[0][0], points[points.length - 1][0]]);
  const first = Math.min(...steps, more.marks ? 0 : Infinity), last = Math.max(...steps, first + 1);
  const marks = ticks(low, high, height / 45);
  const label = (value) => (more.percent ? `${number(100 * value)} %` : number(value));
  const left = 12 + 6.2 * Math.max(...marks.map((mark) => label(mark).length)), right = 10, top = more.marks ? 18 : 8, bottom = 22;
  const x = (step) => left + ((step - first) / (last - first)) * (width - left - right);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const begin = lines[0][1][0], end = lines[0][1][lines[0][1].length - 1];
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${name}: ${shown(begin[1])} at step ${begin[0]}, ${shown(end[1])} at step ${end[0]}` });
  for (const mark of marks) {
    svg.append(el("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }));
    svg.append(el("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, label(mark)));
  }
  for (const mark of ticks(first, last, Math.max(1, Math.floor(width / 80))).filter((one) => Number.isInteger(one)))
    svg.append(el("text", { x: x(mark), y: height - 6, "text-anchor": x(mark) > width - 24 ? "end" : x(mark) < left + 8 ? "start" : "middle" }, mark.toLocaleString("en")));
  for (const one of status.resumed.filter((one) => one.from >= first && one.from <= last)) {
    const mark = el("line", { class: "resumed", x1: x(one.from), x2: x(one.from), y1: top - 4, y2: height - bottom });
    mark.append(el("title", {}, `resumed from step ${one.from}`));
    svg.append(mark);
  }
  lines.forEach(([, points], index) => {
    const way = points.map((point, number) => `${number ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("");
    svg.append(el("path", { class: `line c${index % 5}`, d: way }));
    if (points.length < 3) for (const point of points) svg.append(el("circle", { class: `dot c${index % 5}`, r: 3, cx: x(point[0]), cy: y(point[1]) }));
  });
  if (more.marks) {
    for (const saved of status.checkpoints.filter((one) => one.step !== null && one.step >= first && one.step <= last)) {
      const at = x(saved.step), base = height - bottom;
      svg.append(el("path", { class: "saved", d: `M${at - 4} ${base}l4 -7l4 7z` }, el("title", {}, `checkpoint of step ${saved.step}`)));
    }
    for (const fault of status.faults.filter((one) => one.from_step !== null && one.from_step >= first && one.from_step <= last)) {
      const at = x(fault.from_step);
      svg.append(el("path", { class: "fault", d: `M${at - 5} 3h10l-5 9z` }, el("title", {}, `${fault.cause}: ${fault.what}`)));
    }
  }
  const hair = el("line", { class: "hair", y1: top, y2: height - bottom, visibility: "hidden" }), dot = el("circle", { class: "dot c0", r: 3.5, visibility: "hidden" });
  svg.append(hair, dot);
  const points = lines[0][1];
  svg.addEventListener("pointermove", (event) => {
    const at = first + ((event.clientX - svg.getBoundingClientRect().left - left) / (width - left - right)) * (last - first);
    let nearest = 0;
    points.forEach((point, index) => { if (Math.abs(point[0] - at) < Math.abs(points[nearest][0] - at)) nearest = index; });
    for (const [attribute, value] of [["x1", x(points[nearest][0])], ["x2", x(points[nearest][0])], ["visibility", "visible"]]) hair.setAttribute(attribute, value);
    for (const [attribute, value] of [["cx", x(points[nearest][0])], ["cy", y(points[nearest][1])], ["visibility", "visible"]]) dot.setAttribute(attribute, value);
    tell(nearest);
  });
  svg.addEventListener("pointerleave", () => {
    for (const one of [hair, dot]) one.setAttribute("visibility", "hidden");
    tell(points.length - 1);
  });
  return svg;
}

function swatch(child) {
  return el("svg", { viewBox: "0 0 18 10", height: 10, "aria-hidden": "true" }, child);
}

function legend(entries) {
  return el("ul", { class: "legend" }, entries.map(([label, colour]) => el("li", {}, swatch(el("path", { class: `line c${colour % 5}`, d: "M0 5H18" })), label)));
}

function markLegend(status) {
  const entries = [];
  if (status.resumed.length) entries.push([el("path", { class: "resumed", d: "M9 0V10" }), "resumed"]);
  if (status.faults.some((one) => one.from_step !== null)) entries.push([el("path", { class: "fault", d: "M4 1h10l-5 9z" }), "fault"]);
  if (status.checkpoints.length) entries.push([el("path", { class: "saved", d: "M5 9l4 -7l4 7z" }), "checkpoint"]);
  return el("ul", { class: "legend" }, entries.map(([mark, label]) => el("li", {}, swatch(mark), label)));
}

let drawings = {};
function charts(id, title, specs, status, height) {
  const made = specs.map((spec) => chart(spec, status, height)).filter((one) => one !== null);
  drawings[id] = made;
  if (!made.length) return byId(id).replaceChildren();
  byId(id).replaceChildren(el("h2", {}, title), el("div", { class: specs.length > 1 ? "charts" : "" }, made.map((one) => one.box)));
  made.forEach((one) => one.draw(Math.max(200, Math.round(one.place.clientWidth))));
}

function fewShot(curves, titles) {
  // x: the numbers of patients, evenly spaced, because 1, 5 and all are far apart
  const numbers = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
  const values = curves.flatMap((curve) => curve.points.map((point) => point[1]));
  const place = el("div"), box = el("div", { class: "chart" }, el("h3", {}, `Few-shot curve so far: ${curves[0].task}, mean Dice of ${curves[0].split} patients`), place);
  box.append(legend(curves.map((curve, index) => [titles[curve.mode] || curve.mode, index])));
  const draw = (width) => {
    const height = 240, left = 44, right = 24, top = 10, bottom = 36;
    const low = Math.max(0, Math.min(...values) - 0.05), high = Math.min(1, Math.max(...values) + 0.05);
    const x = (labelled) => (numbers.length === 1 ? (left + width - right) / 2 : left + 12 + (numbers.indexOf(labelled) / (numbers.length - 1)) * (width - left - right - 24));
    const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
    const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Few-shot curve of ${curves[0].task}` });
    for (const mark of ticks(low, high, 5)) svg.append(el("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }), el("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, number(mark)));
    for (const labelled of numbers) svg.append(el("text", { x: x(labelled), y: height - 20, "text-anchor": "middle" }, String(labelled)));
    svg.append(el("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "labelled patients"));
    curves.forEach((curve, index) => {
      const colour = index % 5;
      svg.append(el("path", { class: `line c${colour}`, d: curve.points.map((point, number) => `${number ? "L" : "M"}${x(point[0])} ${y(point[1])}`).join("") }));
      for (const point of curve.points) svg.append(el("circle", { class: `dot c${colour}`, r: 4, cx: x(point[0]), cy: y(point[1]) }, el("title", {}, `${curve.mode}, ${point[0]} labelled: ${dice(point[1])}, ${point[2]} draws`)));
    });
    place.replaceChildren(svg);
  };
  return { draw, place, box };
}

// --- tables

function table(name, columns, rows) {
  const kinds = columns.map((_, column) => (rows.length && rows.every((row) => /^([\d.,–]|e[-+]\d| s| min| h| (Ki|Mi|Gi|Ti)?B|^$)+$/.test(row[column])) ? "number" : ""));
  const kind = (text, column) => kinds[column] || (text.length > 40 && columns[column] !== "settings" ? "long" : "short");
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": name },
    el("table", {},
      el("thead", {}, el("tr", {}, columns.map((text, column) => el("th", { scope: "col", class: kinds[column] }, text)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((text, column) => (column ? el("td", { class: kind(text, column) }, text) : el("th", { scope: "row", class: kind(text, column) }, text))))))));
}

// --- sections: each is redrawn only when its data change

const below = (line, s) => line.replaceAll(`${s.url}/`, "");
const text = (value) => (value === null || value === undefined ? "–" : String(value));
const SECTIONS = {
  name: [(s) => [s.name, s.url], (s) => {
    byId("name").textContent = s.name;
    byId("url").textContent = s.url;
    document.title = `${s.name} · p2r`;
  }],
  progress: [(s) => s.training && [s.training.step, s.training.num_steps], (s) => {
    if (!s.training) return byId("progress").replaceChildren();
    const { step, num_steps } = s.training;
    byId("progress").replaceChildren(
      el("progress", { value: Math.min(step, num_steps), max: Math.max(1, num_steps), "aria-label": "Steps of pretraining" }),
      el("p", { class: "faint" }, `step ${step.toLocaleString("en")} of ${num_steps.toLocaleString("en")}` + (step < num_steps && s.training.last.eta_s ? ` · ${seconds(s.training.last.eta_s)} to go` : "")));
  }],
  stages: [(s) => [s.stages, s.url], (s) => byId("stages").replaceChildren(...s.stages.map((stage) => el("li", { class: stage.text ? "has" : "" }, el("b", {}, stage.name), stage.text ? below(stage.text, s) : "–")))],
  notes: [(s, trouble) => [s.url, s.problems, s.failed, trouble], (s, trouble) => {
    const lines = [...(trouble ? [trouble] : []), ...s.problems.map((line) => below(line, s))];
    if (s.failed.length) lines.push(`${s.failed.length} ${s.failed.length === 1 ? "trial" : "trials"} failed: ` + s.failed.slice(0, 3).map((one) => `${one.trial} (${one.reason})`).join("; "));
    byId("notes").replaceChildren(...lines.map((line) => el("p", { class: "note", role: "note" }, line)));
  }],
  figures: [(s) => [s.training, s.faults.length, s.resumed.length], (s) => {
    if (!s.training) return byId("figures").replaceChildren();
    const last = s.training.last, has = (name) => last[name] !== undefined;
    const cards = [["loss", number(last.loss, 4), s.training.negatives ? `negatives ${s.training.negatives}` : ""]];
    if (has("images_per_s")) cards.push(["images", `${number(last.images_per_s)} /s`, has("samples_seen") ? `${number(last.samples_seen)} seen` : ""]);
    if (has("pixel_pairs_per_s")) cards.push(["pixel pairs", `${number(last.pixel_pairs_per_s)} /s`, ""]);
    if (has("wait_fraction")) cards.push(["data wait", percent(last.wait_fraction), "of the time"]);
    if (has("equivariance_error")) cards.push(["equivariance error", number(last.equivariance_error), "1: chance"]);
    if (has("probe_dice")) cards.push(["online probe", dice(last.probe_dice), "Dice"]);
    if (has("health.effective_rank")) cards.push(["effective rank", number(last["health.effective_rank"]), has("health.dead_dimensions_fraction") ? `${percent(last["health.dead_dimensions_fraction"])} dead` : ""]);
    if (has("gradient_norm")) cards.push(["gradient norm", number(last.gradient_norm), has("learning_rate") ? `lr ${last.learning_rate.toExponential(1)}` : ""]);
    if (last.skipped_steps) cards.push(["skipped steps", number(last.skipped_steps), "not finite"]);
    if (last.num_replaced) cards.push(["damaged samples", number(last.num_replaced), "replaced"]);
    if (has("memory_mib")) cards.push(["memory", bytes(last.memory_mib * 2 ** 20), "peak of a worker"]);
    cards.push(["faults", String(s.faults.length), s.resumed.length ? `resumed ${s.resumed.length === 1 ? "once" : `${s.resumed.length} times`}` : "never resumed"]);
    byId("figures").replaceChildren(el("dl", { class: "cards" }, cards.map(([what, value, detail]) => el("div", { class: "card" }, el("dt", {}, what), el("dd", { class: "value" }, value), el("dd", { class: "detail" }, detail)))));
  }],
  loss: [(s) => [s.series.loss, s.resumed, s.faults, s.checkpoints], (s) => charts("loss", "Pretraining", [["Loss", "", [["loss"]], { marks: true }]], s, 280)],
  speed: [(s) => [SPEED.map((spec) => s.series[spec[2][0][0]]), s.resumed], (s) => charts("speed", "Speed", SPEED, s, 140)],
  health: [(s) => [HEALTH.map((spec) => s.series[spec[2][0][0]]), s.resumed], (s) => {
    const parts = Object.keys(s.series).filter((name) => name.startsWith("loss_parts.")).sort();
    const more = parts.length ? [["Parts of the loss", "", parts.map((name) => [name, name.slice(11)])]] : [];
    charts("health", "Health", [...HEALTH, ...more], s, 140);
  }],
  faults: [(s) => s.faults, (s) => {
    if (!s.faults.length) return byId("faults").replaceChildren();
    const rows = [...s.faults].reverse().map((one) => [one.time.slice(0, 19).replace("T", " "), one.cause, one.what, one.decision, text(one.from_step), text(one.attempt), one.count === null ? "–" : one.count + (one.limit === null ? "" : ` of ${one.limit}`)]);
    byId("faults").replaceChildren(el("h2", {}, "Faults"), table("Faults", ["time (UTC)", "cause", "what", "decision", "from step", "attempt", "count"], rows));
  }],
  checkpoints: [(s) => s.checkpoints, (s) => {
    if (!s.checkpoints.length) return byId("checkpoints").replaceChildren();
    const rows = [...s.checkpoints].reverse().map((one) => [text(one.step), clock(one.written_at_s), bytes(one.num_bytes), text(one.world_size), one.path]);
    byId("checkpoints").replaceChildren(el("h2", {}, "Checkpoints"), table("Checkpoints", ["step", "written", "size", "workers", "below the storage"], rows));
  }],
  variants: [(s) => s.variants, (s) => {
    if (!s.variants.length) return byId("variants").replaceChildren();
    const rows = s.variants.map((one) => [one.name, text(one.step), text(one.num_steps), number(one.loss, 4)]);
    byId("variants").replaceChildren(el("h2", {}, "Variants"), el("p", { class: "faint" }, "Each has its own page: p2r status URL/variants/NAME --web"), table("Variants", ["variant", "step", "of", "loss"], rows));
  }],
  sweep: [(s) => s.sweep, (s) => {
    const sweep = s.sweep;
    if (!sweep.trials.length) return byId("sweep").replaceChildren();
    const tasks = [...new Set(sweep.curves.map((curve) => curve.task))];
    drawings.sweep = tasks.map((task) => fewShot(sweep.curves.filter((curve) => curve.task === task), sweep.mode_titles));
    const rows = sweep.trials.map((one) => [one.task, one.purpose, text(one.num_labelled), text(one.draw), sweep.mode_titles[one.mode] || one.mode, dice(one.validation_dice), dice(one.test_dice), seconds(one.seconds), one.settings]);
    const total = sweep.num_search + sweep.num_final;
    byId("sweep").replaceChildren(
      el("h2", {}, "Few labelled patients"),
      el("p", { class: "faint" }, `${sweep.num_search} search and ${sweep.num_final} final trials have ended` + (sweep.num_unread ? `; ${sweep.num_unread} are still being read` : "") + (rows.length < total ? `; the table shows ${rows.length} of them` : "")),
      el("div", { class: "charts" }, drawings.sweep.map((one) => one.box)),
      table("Trials", ["task", "purpose", "patients", "draw", "mode", "validation Dice", "test Dice", "time", "settings"], rows));
    drawings.sweep.forEach((one) => one.draw(Math.max(200, Math.round(one.place.clientWidth))));
  }],
  pictures: [(s) => s.pictures, (s) => {
    if (!s.pictures.length) return byId("pictures").replaceChildren();
    byId("pictures").replaceChildren(el("h2", {}, "Pictures"), el("div", { class: "pictures" }, s.pictures.map((one) => {
      const source = `pictures/${one.path.split("/").map(encodeURIComponent).join("/")}?v=${encodeURIComponent(one.version)}`;
      return el("figure", {}, el("a", { href: source, target: "_blank", rel: "noopener" }, el("img", { src: source, alt: one.caption, loading: "lazy" })), el("figcaption", {}, one.caption));
    })));
  }],
  data: [(s) => s.training && s.training.data, (s) => {
    const counters = s.training ? Object.entries(s.training.data) : [];
    if (!counters.length) return byId("data").replaceChildren();
    byId("data").replaceChildren(el("h2", {}, "Counters of the first worker's stream"), table("Counters", ["counter", "value"], counters.map(([name, value]) => [name, number(value, 4)])));
  }],
};

// --- reading

let timer = null, tag = null, newest = null, trouble = null, lost = null, skew_s = 0, age_s = 0;
const seen = {};

function show() {
  for (const [name, [of, draw]] of Object.entries(SECTIONS)) {
    const key = JSON.stringify(of(newest, trouble) ?? null);
    if (seen[name] !== key) {
      seen[name] = key;
      draw(newest, trouble);
    }
  }
}

function showState() {
  const pill = byId("state");
  const say = (words, kind) => { if (pill.textContent !== words) { pill.textContent = words; pill.className = `pill ${kind}`; } };
  if (!newest) return say(lost || "reading", lost ? "bad" : "");
  const training = newest.training, now_s = Date.now() / 1000 + skew_s, since = training ? seconds(now_s - training.written_at_s) : "";
  if (lost) say(lost, "bad");
  else if (trouble) say("storage cannot be read", "bad");
  else if (!training) say("not pretraining yet", "");
  else if (training.state === "silent") say("silent", "warn");
  else say(training.state === "done" ? "pretrained" : "running", "good");
  byId("read").textContent = (training ? `Last report ${since} ago. ` : "") + (lost ? "" : `Storage read ${seconds(age_s)} ago; read-only.`);
}

async function poll() {
  timer = null;
  const asked = performance.now();
  try {
    const response = await fetch("status.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {}, signal: AbortSignal.timeout(8000) });
    lost = response.ok || response.status === 304 ? null : response.status === 401 ? "token refused" : `server answered ${response.status}`;
    age_s = Number(response.headers.get("X-Read-Age"));
    const date = Date.parse(response.headers.get("Date"));
    if (date) skew_s = (date - Date.now()) / 1000;
    const body = await response.text(); // of a 304, too: what is not read is cancelled
    if (response.status === 200) {
      const found = JSON.parse(body);
      tag = response.headers.get("ETag");
      [newest, trouble] = [found.status, found.trouble];
      show();
    }
  } catch (error) {
    if (!(error instanceof TypeError || error.name === "TimeoutError" || error.name === "AbortError")) throw error;
    lost = "p2r status has ended, or cannot be reached";
  } finally {
    showState();
    timer = setTimeout(poll, Math.max(100, (document.hidden ? HIDDEN_POLL_MS : lost ? 3000 : POLL_MS) - (performance.now() - asked)));
  }
}

let resized = null;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => Object.values(drawings).flat().forEach((one) => one.draw(Math.max(200, Math.round(one.place.clientWidth)))), 100);
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden || timer === null) return;
  clearTimeout(timer);
  poll();
});
poll();
