"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

/* Light and dark: as the system says until the button is pressed. */
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
try { chosen = localStorage.getItem("iou-d2-theme"); } catch { /* a browser that keeps nothing */ }
const showTheme = () => { root.dataset.theme = chosen || (system.matches ? "dark" : "light"); };
system.addEventListener("change", showTheme);
document.getElementById("theme").addEventListener("click", () => {
  chosen = root.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("iou-d2-theme", chosen); } catch { /* lasts as long as the page */ }
  showTheme();
});
showTheme();

/* Elements. Text goes in as text, never as HTML. */
const fill = (element, attributes, children) => {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const colorOf = (series) => `var(--c${series.color % 8})`;
const dashOf = (series) => ["", "7 4", "2 4", "9 3 2 3"][series.color % 4];
const short = (value) => Math.abs(value) >= 1e4 ? value.toLocaleString("en") : String(+value.toPrecision(3));

/* Round numbers between two values, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

function rangeOf(values, fixed, fromZero) {
  if (fixed) return fixed;
  let low = fromZero ? Math.min(0, ...values) : Math.min(...values);
  let high = Math.max(...values);
  if (!Number.isFinite(low) || !Number.isFinite(high)) return [0, 1];
  if (low === high) [low, high] = low > 0 && fromZero ? [0, high * 1.25] : [low - 1, high + 1];
  return [low, high];
}

/* A frame with axes: the SVG, and functions from values to places in it. */
function frame(plot, chart, xRange, yRange, height) {
  const width = Math.max(220, plot.clientWidth);
  const [left, right, top, bottom] = [46, 10, 8, 40];
  const x = (value) => left + (value - xRange[0]) / (xRange[1] - xRange[0]) * (width - left - right);
  const y = (value) => height - bottom - (value - yRange[0]) / (yRange[1] - yRange[0]) * (height - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": describe(chart) });
  for (const value of ticks(...yRange, 5)) {
    picture.append(svg("line", { class: "rule", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    picture.append(svg("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(...xRange, width < 300 ? 4 : 5)) {
    picture.append(svg("text", { x: x(value), y: height - bottom + 16, "text-anchor": "middle" }, short(value)));
  }
  picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(yRange[0]), y2: y(yRange[0]) }));
  picture.append(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, chart.x));
  picture.append(svg("text", { transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, chart.y));
  plot.replaceChildren(picture);
  return { picture, x, y, width };
}

/* What a chart says to those who do not see it. */
function describe(chart) {
  if (chart.type === "heat") return `${chart.title}: density of detections.`;
  const last = (series) => {
    const points = series.points ? series.points.filter((point) => point[1] !== null) : [];
    return points.length ? `from ${short(points[0][1])} to ${short(points[points.length - 1][1])}` : "empty";
  };
  const says = (series) => series.values
    ? chart.groups.map((group, n) => `${group} ${series.values[n] === null ? "–" : short(series.values[n])}`).join(", ")
    : last(series);
  return `${chart.title}. ${chart.series.map((series) => `${series.name}: ${says(series)}`).join("; ")}.`;
}

function legend(plot, chart) {
  if (chart.series.length < 2) return;
  plot.append(html("div", { class: "legend" }, ...chart.series.map((series) => html("span", {},
    svg("svg", { "aria-hidden": "true" }, svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, style: `stroke:${colorOf(series)}`, "stroke-width": 2.5, "stroke-dasharray": chart.type === "bars" ? "" : dashOf(series) })),
    series.name))));
}

function drawLines(plot, chart) {
  const points = chart.series.flatMap((series) => series.points).filter((point) => point[1] !== null);
  const xRange = rangeOf(points.map((point) => point[0]), chart.x_range, chart.x_from_zero);
  const yRange = rangeOf(points.map((point) => point[1]), chart.y_range, chart.y_from_zero);
  const { picture, x, y } = frame(plot, chart, xRange, yRange, 250);
  if (chart.diagonal) picture.append(svg("line", { class: "ideal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }));
  for (const series of chart.series) {
    let path = "", pen = "M";
    for (const [a, b] of series.points) {
      if (b === null) { pen = "M"; continue; }
      path += `${pen}${x(a).toFixed(1)} ${y(b).toFixed(1)}`;
      pen = "L";
    }
    picture.append(svg("path", { class: "line", d: path, style: `stroke:${colorOf(series)}`, "stroke-dasharray": dashOf(series) }));
    if (!chart.markers) continue;
    const most = Math.max(...(series.weights || [1]));
    series.points.forEach(([a, b], n) => {
      if (b === null) return;
      const r = series.weights ? 2.5 + 4.5 * Math.sqrt(series.weights[n] / most) : 3;
      picture.append(svg("circle", { cx: x(a), cy: y(b), r, style: `fill:${colorOf(series)}`, "fill-opacity": series.weights ? 0.75 : 1 }));
    });
  }
  hover(plot, picture, chart, x, y);
  legend(plot, chart);
}

/* The value of the nearest point under the pointer. */
function hover(plot, picture, chart, x, y) {
  const tip = html("div", { class: "tip", hidden: "" });
  plot.append(tip);
  picture.addEventListener("pointerleave", () => { tip.hidden = true; });
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let nearest = null, least = 60 ** 2;
    for (const series of chart.series) {
      series.points.forEach(([a, b], n) => {
        if (b === null) return;
        const far = (x(a) - px) ** 2 + (y(b) - py) ** 2;
        if (far < least) [least, nearest] = [far, { series, a, b, n }];
      });
    }
    tip.hidden = nearest === null;
    if (!nearest) return;
    const name = chart.series.length > 1 ? `${nearest.series.name}: ` : "";
    const weight = nearest.series.weights ? `, ${nearest.series.weights[nearest.n].toLocaleString("en")} detections` : "";
    tip.textContent = `${name}${short(nearest.b)} at ${short(nearest.a)}${weight}`;
    tip.style.left = `${Math.min(Math.max(x(nearest.a), 70), box.width - 70)}px`;
    tip.style.top = `${y(nearest.b)}px`;
  });
}

function drawBars(plot, chart) {
  const width = Math.max(220, plot.clientWidth), [left, right, thick] = [92, 44, 13];
  const rows = chart.series.length, step = rows * (thick + 2) + 12, height = chart.groups.length * step + 22;
  const most = Math.max(1e-9, ...chart.series.flatMap((series) => series.values));
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": describe(chart) });
  chart.groups.forEach((group, n) => {
    const top = n * step + 4;
    picture.append(svg("text", { class: "value", x: left - 8, y: top + (step - 12) / 2 + 3, "text-anchor": "end" }, group));
    chart.series.forEach((series, place) => {
      const value = series.values[n], y = top + place * (thick + 2);
      const long = value === null ? 0 : value / most * (width - left - right);
      picture.append(svg("rect", { x: left, y, width: Math.max(1, long), height: thick, rx: 2, style: `fill:${colorOf(series)}` }));
      picture.append(svg("text", { x: left + long + 6, y: y + thick - 2.5 }, value === null ? "–" : value.toFixed(1)));
    });
  });
  picture.append(svg("text", { x: left, y: height - 4 }, chart.x));
  plot.replaceChildren(picture);
  legend(plot, chart);
}

function drawHeat(plot, chart) {
  const { picture, x, y } = frame(plot, chart, [0, 1], [0, 1], 270);
  const bins = chart.cells.length, most = Math.log1p(Math.max(1, ...chart.cells.flat()));
  const [wide, high] = [x(1 / bins) - x(0), y(0) - y(1 / bins)];
  chart.cells.forEach((column, i) => column.forEach((count, j) => {
    if (!count) return;
    const attributes = { x: x(i / bins), y: y((j + 1) / bins), width: wide + 0.3, height: high + 0.3, style: `fill:${colorOf(chart)}`, "fill-opacity": (0.1 + 0.9 * Math.log1p(count) / most).toFixed(2) };
    picture.append(svg("rect", attributes, svg("title", {}, count.toLocaleString("en"))));
  }));
}

const DRAW = { lines: drawLines, bars: drawBars, heat: drawHeat };
function draw(plot) {
  if (plot.drawnAt === plot.clientWidth) return;
  plot.drawnAt = plot.clientWidth;
  const chart = data.charts[plot.parentElement.dataset.chart];
  DRAW[chart.type](plot, chart);
}
/* In a frame of its own: drawing changes sizes. */
const resized = new ResizeObserver((entries) => requestAnimationFrame(() => entries.forEach((entry) => draw(entry.target))));
document.querySelectorAll("figure[data-chart] .plot").forEach((plot) => { draw(plot); resized.observe(plot); });

/* Images: ground truth beside detections, by list, class and type. */
const KINDS = { found: "#4ade80", class: "#fb923c", localisation: "#60a5fa", both: "#c084fc", duplicate: "#f1f5f9", background: "#f43f5e", missed: "#fde047", ignored: "#94a3b8" };
const LISTS = { best: "Best", worst: "Worst", wrong: "Most confidently wrong" };

function boxOf(record, classes, isTruth) {
  const [x, y, w, h, place, kind, score, iou, predicted] = record;
  const says = isTruth
    ? `${classes[place]}, ${kind === "ignored" ? "crowd" : kind}`
    : `${classes[place]} ${score}, ${kind}, IoU ${iou}${predicted === null ? "" : `, predicted ${predicted}`}`;
  const at = { x, y, width: Math.max(0.5, w), height: Math.max(0.5, h) };
  const dashed = isTruth && kind === "missed" ? " truth-missed" : "";
  return svg("g", {}, svg("rect", { ...at, class: "halo" }),
    svg("rect", { ...at, class: `box${dashed}`, style: `stroke:${KINDS[kind]}` }, svg("title", {}, says)));
}

function side(image, records, classes, isTruth, wanted) {
  const [width, height] = image.size;
  const what = isTruth ? "ground truth" : "detections";
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${what} of ${image.name}: ${records.length} boxes` });
  if (image.picture >= 0) {
    picture.append(svg("image", { href: data.thumbnails[image.picture], width, height, preserveAspectRatio: "none" }));
  }
  for (const record of [...records].reverse()) {
    const box = boxOf(record, classes, isTruth);
    if (!wanted(record)) box.classList.add("faded");
    picture.append(box);
  }
  return picture;
}

function card(image, classes, wanted, listed) {
  const number = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
  let says = `${number(image.truths.length, "object")}, ${number(image.detections.length, "detection")}`;
  if (image.quality !== null) says += `, quality ${image.quality.toFixed(2)}`;
  if (listed === "wrong" && image.wrong !== null) says += `, wrong with score ${image.wrong.toFixed(2)}`;
  if (image.left_out) says += `, ${number(image.left_out, "more box").replace("boxs", "boxes")} not drawn`;
  const words = [html("h3", {}, image.name), html("p", {}, says)];
  if (image.why) words.push(html("p", {}, image.why));
  return html("article", { class: "card" }, ...words, html("div", { class: "sides" },
    side(image, image.truths, classes, true, wanted), side(image, image.detections, classes, false, wanted)));
}

function showImages() {
  const [runs, classes, cards] = ["run", "class", "cards"].map((id) => document.getElementById(id));
  if (!cards) return;
  const state = { list: "worst", kind: "" };
  const choice = (id, names, key, color) => {
    const buttons = Object.entries(names).map(([value, name]) => {
      const dot = color && KINDS[value] ? [html("i", { style: `--kind:${KINDS[value]}` })] : [];
      const button = html("button", { type: "button", "aria-pressed": state[key] === value }, ...dot, name);
      button.addEventListener("click", () => {
        state[key] = value;
        buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
        show();
      });
      return button;
    });
    document.getElementById(id).replaceChildren(...buttons);
  };
  const fillClasses = () => {
    const names = data.galleries[runs.value || 0].classes;
    classes.replaceChildren(html("option", { value: "" }, "all"), ...names.map((name, n) => html("option", { value: n }, name)));
  };
  const show = () => {
    const gallery = data.galleries[runs.value || 0];
    const wanted = (record) =>
      (classes.value === "" || record[4] === +classes.value) && (state.kind === "" || record[5] === state.kind);
    const filtered = classes.value !== "" || state.kind !== "";
    const listed = gallery.lists[state.list].map((n) => gallery.images[n]);
    const kept = listed.filter((image) => !filtered || [...image.truths, ...image.detections].some(wanted));
    cards.replaceChildren(...kept.map((image) => card(image, gallery.classes, wanted, state.list)));
    document.getElementById("shown").textContent =
      `${kept.length}${filtered ? ` of ${listed.length}` : ""} images. Left: ground truth, right: detections.`;
  };
  choice("list", LISTS, "list", false);
  const kinds = Object.keys(KINDS).filter((kind) => kind !== "ignored");
  choice("kinds", { "": "all", ...Object.fromEntries(kinds.map((kind) => [kind, kind])) }, "kind", true);
  runs.addEventListener("change", () => { fillClasses(); show(); });
  classes.addEventListener("change", show);
  fillClasses();
  show();
}
showImages();
