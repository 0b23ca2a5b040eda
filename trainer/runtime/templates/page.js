"use strict";
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const show = value => value == null ? "–" : String(Number(value.toPrecision(4)));
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

/* Tables: a heading sorts by its column; cells without a value stay at the end. */
function makeSortable(table) {
  const headings = [...table.tHead.querySelectorAll("th")];
  const valueOf = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
    return text === "" || isNaN(text) ? text : Number(text);
  };
  headings.forEach((heading, column) => heading.querySelector("button")?.addEventListener("click", () => {
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((one, other) => {
      const a = valueOf(one, column), b = valueOf(other, column);
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return ascending ? order : -order;
    }));
  }));
}

/* Charts: lines are {name, x, y, color, dashed, best}; best is the x of the point that is marked. */
const charts = [];
function drawChart(place, title, unit, lines, logarithmic = false) {
  const positions = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b);
  const index = new Map(positions.map((x, i) => [x, i]));
  const data = [positions, ...lines.map(line => {
    const values = Array(positions.length).fill(null);
    line.x.forEach((x, i) => { values[index.get(x)] = logarithmic && !(line.y[i] > 0) ? null : line.y[i]; });
    return values;
  })];
  const axis = {stroke: () => style("--quiet"), grid: {stroke: () => style("--line"), width: 1}, ticks: {stroke: () => style("--line"), width: 1}};
  const markBest = chart => lines.forEach((line, i) => {
    const y = line.best == null ? null : data[i + 1][index.get(line.best)];
    if (y == null || !chart.series[i + 1].show) return;
    const context = chart.ctx, [left, top] = [chart.valToPos(line.best, "x", true), chart.valToPos(y, "y", true)];
    context.save();
    context.beginPath();
    context.arc(left, top, 5 * devicePixelRatio, 0, 2 * Math.PI);
    context.fillStyle = style("--page");
    context.fill();
    context.lineWidth = 2 * devicePixelRatio;
    context.strokeStyle = style(line.color);
    context.stroke();
    context.restore();
  });
  const figure = make("figure", {className: "chart"}, make("figcaption", {textContent: title}));
  place.append(figure);
  const width = () => Math.max(200, figure.clientWidth - 20);
  const options = {
    width: width(), height: 240, scales: {x: {time: false}, y: {distr: logarithmic ? 3 : 1}},
    cursor: {sync: {key: unit}, drag: {x: true, y: false}},
    series: [{label: unit, value: (_, value) => show(value)}, ...lines.map(line => ({
      label: line.name, stroke: () => style(line.color), width: 1.75, dash: line.dashed ? [6, 4] : undefined,
      spanGaps: true, points: {show: line.x.length < 2}, value: (_, value) => show(value),
    }))],
    axes: [{...axis, label: unit, labelSize: 18, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6]}, {...axis, size: 58, values: (_, splits) => splits.map(value => value == null ? "" : show(value))}],
    hooks: {draw: [markBest]},
  };
  const chart = new uPlot(options, data, figure);
  chart.root.setAttribute("role", "img");
  chart.root.setAttribute("aria-label", `${title} by ${unit}: ${lines.map(line => line.name).join(", ")}`);
  chart.title = title;
  charts.push(chart);
  new ResizeObserver(() => { if (chart.width !== width()) chart.setSize({width: width(), height: 240}); }).observe(figure);
}
const recolor = () => charts.forEach(chart => {
  chart.redraw(false, true);
  chart.root.querySelectorAll(".u-marker").forEach((marker, i) => { if (i) marker.style.borderColor = chart.series[i].stroke(chart, i); });
});
for (const media of ["print", "(prefers-color-scheme: dark)"]) matchMedia(media).addEventListener("change", recolor);
